"""Checks that networks make by ``assert``. They stand here since pytest writes the asserts of test files otherwise."""

from __future__ import annotations

import torch
from torch import Tensor


def reads(x: Tensor, y: Tensor) -> Tensor:
    assert torch.isfinite(x).all().item(), "not a number"
    assert y.max().item() < 1e9, f"too large: {y.max().item():.3f}"
    assert float(x.max()) < 1e9 and x.min().item() > -1e9
    if torch.isnan(y).any().item():
        raise ValueError(f"not a number: {y.min().item()}")
    return y


def compares(x: Tensor, y: Tensor) -> Tensor:
    assert torch.allclose(x, x), "not the same"
    assert torch.equal(y, y) and 0 <= (x > 0).float().mean() <= 1
    torch.testing.assert_close(y, y)
    return y
