"""Library calls that warn, made without the warning: the tests treat warnings as errors."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn


def old_weight_norm(module: nn.Module) -> nn.Module:
    """``torch.nn.utils.weight_norm``, the deprecated form; its computed weight carries no gradient, so copies work."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module)


def encoder(layer: nn.Module, count: int) -> Any:
    """``nn.TransformerEncoder``, which warns that it cannot use nested tensors with some layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.TransformerEncoder(layer, count)  # type: ignore[arg-type]
