"""How far a repaired network's outputs are from the original's, on inputs that were not fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.compat import tree_leaves


def unlikeness(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """A distance, 0 where all agree: of each tensor of the outputs the mean squared error, as a share of what is wanted's variance.

    Where an output may be class scores, (samples, classes), the distance of its softmax from the wanted one counts as much: scores that are
    shrunk towards their mean have a small error and name other classes.

    Args:
        found: Outputs of one network, a nest of tensors for each batch.
        wanted: The original's on the same batches.
    """
    pairs = [list(zip(_tensors(a), _tensors(b), strict=True)) for a, b in zip(found, wanted, strict=True)]
    return sum(_apart([p[i][0] for p in pairs], [p[i][1] for p in pairs]) for i in range(len(pairs[0]))) / max(1, len(pairs[0]))


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def _apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    if any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
        return 0.0  # hidden states that lost channels themselves
    together = torch.cat([b.flatten() for b in wanted]).abs()
    missed = sum(float((a - b).abs().square().sum()) for a, b in zip(found, wanted, strict=True))
    if wanted[0].ndim == 2 and wanted[0].shape[1] > 1 and not wanted[0].is_complex():
        rows = sum(len(b) for b in wanted)
        a, b = (torch.cat([t - t.mean(1, keepdim=True) for t in each]).float() for each in (found, wanted))
        variance = float((b - b.mean(0)).square().sum())
        missed = float((a - b).square().sum())
        apart = float((a.softmax(1) - b.softmax(1)).abs().sum() / 2) / rows
        return (missed / max(variance, 1e-30) + apart) / 2
    return missed / max(float(together.square().sum()), 1e-30)
