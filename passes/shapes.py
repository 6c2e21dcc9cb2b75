"""Result shapes of common modules by arithmetic: a kernel on the meta device costs a hundred times as much."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxprune.passes.rules import pointwise

_SAME = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))
_SAME_EXACT = frozenset(pointwise.KEEP_ZERO_MODULES) | frozenset(pointwise.MOVE_ZERO_MODULES)


def quick(module: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
    """What ``module(*args)`` would give, as a meta tensor; None where it has to be run to be known.

    Norms are never run: in training mode they refuse one value per channel, which says nothing about shapes.
    """
    if len(args) != 1 or not isinstance(args[0], torch.Tensor):
        return None
    x = args[0]
    kind = type(module)
    if isinstance(module, _SAME):
        return torch.empty_like(x)
    if kind in _SAME_EXACT:
        return x if getattr(module, "inplace", False) else torch.empty_like(x)
    if kind is nn.Linear and x.ndim > 1:
        return torch.empty((*x.shape[:-1], module.out_features), dtype=module.weight.dtype, device="meta")
    if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return _convolved(module, x)
    return None


def _convolved(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    n = len(module.kernel_size)
    if x.ndim != n + 2 or isinstance(module.padding, str) or x.shape[1] != module.in_channels:
        return None
    space = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(x.shape[2:], module.padding, module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    if min(space) < 1:
        return None
    return torch.empty((x.shape[0], module.out_channels, *space), dtype=module.weight.dtype, device="meta")
