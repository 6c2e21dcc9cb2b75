"""How far a repaired network's outputs are from the original's, on inputs that were not fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.compat import tree_leaves


def unlikeness(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The mean of ``distances``."""
    return float(distances(found, wanted).mean())


def distances(found: Sequence[Any], wanted: Sequence[Any]) -> Tensor:
    """How far outputs are from the wanted ones by sample, 0 where they agree: the squared error as a share of the wanted variance.

    Where an output may be class scores, (samples, classes), the distance of its softmax from the wanted one counts as much: scores that are
    shrunk towards their mean have a small error and name other classes. Several tensors of an output count alike.

    Args:
        found: Outputs of one network, a nest of tensors for each batch.
        wanted: The original's on the same batches.

    Returns:
        (samples,), float64; where outputs have no first axis in common, one number for each batch.
    """
    pairs = [list(zip(outputs_of(a), outputs_of(b), strict=True)) for a, b in zip(found, wanted, strict=True)]
    parts = [_apart([p[i][0] for p in pairs], [p[i][1] for p in pairs]) for i in range(len(pairs[0]))]
    if not parts:
        return torch.zeros(1, dtype=torch.float64)
    if len({len(part) for part in parts}) > 1:
        parts = [part.mean().reshape(1) for part in parts]
    return torch.stack(parts).mean(0)


def outputs_of(output: Any) -> list[Tensor]:
    """The tensors of an output that can be near or far."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def _apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    if any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
        return torch.zeros(sum(_rows(b) for b in wanted), dtype=torch.float64)  # hidden states that lost channels themselves
    if not _scores(wanted[0]):
        missed = torch.cat([_by_row((a - b).abs().square()) for a, b in zip(found, wanted, strict=True)])
        energy = torch.cat([_by_row(b.abs().square()) for b in wanted])
        return missed / energy.mean().clamp_min(1e-30)
    a, b = (torch.cat([centred(t) for t in each]).float() for each in (found, wanted))
    missed = _by_row((a - b).square()) / _by_row((b - b.mean(0)).square()).mean().clamp_min(1e-30)
    return (missed + _by_row((a.softmax(1) - b.softmax(1)).abs()) / 2) / 2


def centred(tensor: Tensor) -> Tensor:
    """An output of one batch; of what may be class scores each sample's less their mean."""
    return tensor - tensor.mean(1, keepdim=True) if _scores(tensor) else tensor


def _scores(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.shape[1] > 1 and not tensor.is_complex()


def _rows(tensor: Tensor) -> int:
    return int(tensor.shape[0]) if tensor.ndim else 1


def _by_row(tensor: Tensor) -> Tensor:
    """Sums over all but the first axis, (rows,), float64 on the CPU."""
    return tensor.reshape(_rows(tensor), -1).sum(1).cpu().double()
