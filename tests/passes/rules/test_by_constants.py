"""Channels that a constant picks, through expansions to the input's sizes; diagonals, and pools that give positions as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, zeroed

ORDER = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])


class Net(nn.Module):
    def __init__(self, how: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.register_buffer("order", ORDER)
        self.gain = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.square = nn.Parameter(torch.randn(8, 8))
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.last(self.how(self, self.first(x))).mean((2, 3))


def row(net: Any) -> Any:
    return net.order.view(1, 8, 1, 1)


HOW: dict[str, Callable[[Any, Any], Any]] = {
    "expand": lambda net, y: y.gather(1, row(net).expand(len(y), 8, *y.shape[2:])),
    "expand by -1": lambda net, y: torch.gather(y, dim=1, index=row(net).expand(y.shape[0], -1, y.shape[2], y.shape[3])),
    "broadcast_to": lambda net, y: torch.gather(y, -3, torch.broadcast_to(row(net), (y.size(0), 8, y.size(2), y.size(3)))),
    "expand_as": lambda net, y: y.gather(1, row(net).expand_as(y)),
    "expand_as of two axes": lambda net, y: y.mean((2, 3)).gather(1, net.order.view(1, 8).expand(len(y), -1))[..., None, None],
    "a mask expanded": lambda net, y: y.masked_fill((row(net) > 5).expand_as(y), 0.0),
    "a parameter expanded": lambda net, y: y * net.gain.expand_as(y),
    "diag_embed": lambda net, y: (torch.diag_embed(y.mean((2, 3))) @ y.flatten(2)).view_as(y),
    "diag": lambda net, y: torch.einsum("bchw,cd->bdhw", y, torch.diag(net.gain.flatten())),
    "einsum over a diagonal": lambda net, y: torch.einsum("bchw,cc->bchw", y, net.square),
    "einsum over a diagonal, with dots": lambda net, y: torch.einsum("b...c,cc->bc...", y.movedim(1, -1), net.square),
    "einsum over a diagonal of activations": lambda net, y: torch.einsum("bcchw->bchw", y[:, :, None] * y[:, None]),
    "einsum, its output not said": lambda net, y: torch.einsum("adbc,de", y, net.square).movedim(-1, 1),
    "einsum, its output not said, with dots": lambda net, y: torch.einsum("...d,df", y.movedim(1, -1), net.square).movedim(-1, 1),
    "einsum by lists": lambda net, y: torch.einsum(y, [0, 4, 1, 2], net.square, [4, 7]).movedim(-1, 1),
    "einsum of a trace": lambda net, y: y * torch.einsum("ii", net.square),
    "roll by one number along listed axes": lambda net, y: y.roll(3, dims=(-1,)) + torch.roll(y, -y.shape[2] // 2, [2]) + y.roll(2, (1,)),
    "atleast_3d": lambda net, y: torch.atleast_3d(y),
    "max_pool with positions": lambda net, y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), (2, 2), output_size=y.shape[-2:]),
    "adaptive_max_pool with positions": lambda net, y: F.adaptive_max_pool2d(y, 2, return_indices=True)[0],
}


@pytest.mark.parametrize("name", HOW)
def test_it_is_pruned(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(HOW[name]).eval(), torch.randn(2, 3, 8, 8)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    kept = fxprune.record(slim).kept
    assert slim.get_parameter("first.weight").shape[0] == 4 and slim.get_parameter("last.weight").shape[1] == 4
    reference = zeroed(model, kept)
    for other in (x, torch.randn(3, 3, 8, 8), torch.randn(1, 3, 12, 6)):
        with torch.no_grad():
            assert gap(reference(other), slim(other)) < 1e-5


def test_a_diagonal_with_an_axis_of_fixed_size_keeps_them() -> None:
    model = Net(lambda net, y: torch.einsum("bccw->bcw", y)[..., None])  # as many rows as channels
    assert "a diagonal is taken" in str(next(g for g in fxprune.analyze(model, torch.randn(2, 3, 8, 8)).groups).reason)


def test_a_shifted_diagonal_keeps_them() -> None:
    model = Net(lambda net, y: (torch.diag_embed(y.mean((2, 3)), 1)[:, :8, :8] @ y.flatten(2)).view_as(y))
    assert "it is put beside a diagonal" in str(next(g for g in fxprune.analyze(model, torch.randn(2, 3, 8, 8)).groups).reason)
