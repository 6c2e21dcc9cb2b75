"""Axes that must keep equally many channels: halves of a ``chunk`` that the user's code splits, sizes that one attribute of it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.labels.values import Vector
from fxprune.passes.planning.plan import Keep, Rounding

Ties = Sequence[Sequence[Vector]]
Scores = npt.NDArray[np.float64]


def evened(graph: CouplingGraph, keep: Keep, scores: Mapping[str, Any], uneven: Callable[[Keep], Ties], round_to: int = 1) -> Keep:
    """``keep`` with units given back, the highest scores first, until ``uneven`` finds nothing more: it names, for a choice of units, axes
    of equal size (by their labels) of which different numbers of channels are left. ``round_to`` holds as in ``plan``.

    Where units of one group lie on several such axes, each axis first gets its equal share of what the group loses.
    """
    score = np.full(len(keep), np.inf)
    for name, values in scores.items():
        group = graph.by_name.get(name)
        if group is not None:
            score[graph.starts[group.number] : graph.starts[group.number + 1]] = np.asarray(values, dtype=np.float64)
    keep = keep.copy()
    shared: set[tuple[int, ...]] = set()
    while ties := uneven(keep):
        before = keep.copy()
        for tie in ties:
            units = [graph.units_of_labels(vector) for vector in tie]
            key = tuple(int(u[0]) for u in units)
            if key not in shared:  # once, so that what follows only gives back and ends
                shared.add(key)
                _shares(graph, keep, score, units)
            _give_back(keep, score, units)
        if round_to > 1:
            _rounded(graph, keep, score, round_to)
        if np.array_equal(before, keep):
            break
    return keep


def _shares(graph: CouplingGraph, keep: Keep, score: Scores, units: Sequence[Vector]) -> None:
    """Axes of distinct units of the same groups lose equally many: which axis a low score lies on does not count."""
    flat = np.concatenate(units)
    groups = [np.unique(graph.group_of_unit[u]) for u in units]
    if (flat < 0).any() or len(np.unique(flat)) < len(flat) or any(len(g) != 1 or g[0] != groups[0][0] for g in groups):
        return
    if not graph.prunable_unit[flat].all():
        return
    left = -(-sum(int(keep[u].sum()) for u in units) // len(units))
    for u in units:
        keep[u] = False
        keep[u[np.argsort(-score[u], kind="stable")[:left]]] = True


def _give_back(keep: Keep, score: Scores, units: Sequence[Vector]) -> None:
    """Removed units return where fewer than elsewhere are left; one that lies on an axis several times counts as often."""
    while True:
        left = [int((keep[u] | (u < 0)).sum()) for u in units]
        most = max(left)
        if min(left) == most:
            return
        for u in units:
            missing = most - int((keep[u] | (u < 0)).sum())  # asked again: the same axis may be named twice
            if missing <= 0:
                continue
            gone = np.unique(u[(u >= 0) & ~keep[u]])
            if not len(gone):  # of unequal size from the start: nothing would make them even
                return
            times = int((u == gone[0]).sum())
            keep[gone[np.argsort(-score[gone], kind="stable")[: -(-missing // times)]]] = True


def _rounded(graph: CouplingGraph, keep: Keep, score: Scores, multiple: int) -> None:
    """What had to be given back goes on to the next multiple."""
    removed = {g.name: int((~keep[graph.starts[g.number] : graph.starts[g.number + 1]]).sum()) for g in graph.groups}
    for name, count in Rounding(graph, multiple)(removed).items():
        back = removed[name] - count
        start = graph.starts[graph.by_name[name].number]
        gone = start + np.flatnonzero(~keep[start : graph.starts[graph.by_name[name].number + 1]])
        if back > 0:
            keep[gone[np.argsort(-score[gone], kind="stable")[:back]]] = True
