"""Policy and scores to kept units: plain arrays, no tensors of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.planning.naming import limits, sparsities
from fxprune.passes.planning.parts import keep_one_of_each
from fxprune.policies import units_removed

Keep = npt.NDArray[np.bool_]


def plan(
    graph: CouplingGraph,
    policy: Mapping[str, float] | float,
    scores: Mapping[str, Any],
    round_to: int = 1,
    most: Mapping[str, float] | float | None = None,
) -> Keep:
    """Which units stay: one boolean per unit of the graph.

    ``policy``: as ``passes.planning.naming.resolved`` reads it. ``scores``: group name -> one number per unit; the lowest go first, the
    first of equals first. ``round_to``: the channels kept in every pruned dimension are rounded up to a multiple of it, never above the
    original. ``most``: the share that no group may lose more of; see ``passes.planning.naming.limits``.
    """
    counts = {name: units_removed(p, graph.by_name[name].size) for name, p in sparsities(graph, policy).items()}
    for name, allowed in limits(graph, most).items():
        counts[name] = min(counts.get(name, 0), allowed)
    return keep_counts(graph, {n: c for n, c in counts.items() if c}, scores, round_to)


def keep_counts(graph: CouplingGraph, removed: Mapping[str, int], scores: Mapping[str, Any], round_to: int = 1) -> Keep:
    """Like ``plan``, from the number of units to remove of each group. Of what an operation sees alone (a slice) one unit stays, and the
    next of its group goes instead."""
    keep = np.ones(int(graph.starts[-1]) if len(graph.starts) else 0, dtype=bool)
    counts = {name: min(n, graph.by_name[name].size - graph.by_name[name].least) for name, n in removed.items()}
    if round_to > 1:
        counts = Rounding(graph, round_to)(counts)
    for name, count in counts.items():
        if count <= 0:
            continue
        group = graph.by_name[name]
        keep[graph.starts[group.number] + _order(graph, name, scores[name])[:count]] = False
    keep_one_of_each(graph, keep, scores)
    return keep


def _order(graph: CouplingGraph, name: str, scores: Any) -> npt.NDArray[np.int64]:
    """A group's units from the lowest score to the highest; the candidates of a search are chosen by the same scores, ranked once."""
    given = np.asarray(scores, dtype=np.float64)
    content = given.tobytes()
    known = graph.orders.get(name)
    if known is None or known[0] != content:
        known = graph.orders[name] = content, np.argsort(given, kind="stable")
    return known[1]


class Rounding:
    """Units to remove by group name -> fewer of them, so that every pruned dimension keeps a multiple of ``multiple`` channels, or all.

    Experts are no channels that hardware would like even.
    """

    def __init__(self, graph: CouplingGraph, multiple: int) -> None:
        self.multiple = multiple
        dims: dict[tuple[int, tuple[tuple[str, int], ...]], None] = {}  # their size, and how often each group's units occur; each kind once
        for key in graph.keys:
            units = graph.unit_of[key]
            numbers, per = np.unique(graph.group_of_unit[units], return_counts=True)
            owners = [(graph.by_number[g], n) for g, n in zip(numbers.tolist(), per.tolist(), strict=True) if g in graph.by_number]
            inside = tuple((group.name, n // group.size) for group, n in owners if group.prunable and not group.experts)
            if inside:
                dims[len(units), inside] = None
        self.dims = list(dims)

    def __call__(self, removed: Mapping[str, int]) -> dict[str, int]:
        """Only ever gives back, so it ends."""
        counts, multiple = dict(removed), self.multiple
        changed = True
        while changed:
            changed = False
            for size, groups in self.dims:
                inside = [(name, times) for name, times in groups if counts.get(name)]
                gone = sum(counts[name] * times for name, times in inside)
                if gone == 0 or (size - gone) % multiple == 0:
                    continue
                changed = True
                name, times = max(inside, key=lambda one: (counts[one[0]] * one[1], one[0]))
                give = next((d for d in range(1, counts[name] + 1) if (size - gone + d * times) % multiple == 0), counts[name])
                counts[name] -= give
        return counts
