"""The same share of every group, to the unit: what an allocation has to be better than."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fxprune.allocation.prices import output_channels
from fxprune.importance.registry import Scores
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.planning.cost_model import cost_model
from fxprune.passes.planning.naming import limits
from fxprune.passes.planning.plan import Keep, Rounding, keep_counts

TOLERANCE = 1e-9  # of the rounding of floats, by which a share may be above its bound


class Uniform:
    """Allocations that take the same share of every group, to the unit, and what they leave."""

    def __init__(
        self, graph: CouplingGraph, ranking: Scores, bounds: Mapping[str, float], round_to: int, most: Mapping[str, float] | float | None
    ) -> None:
        self.graph, self.ranking, self.bounds = graph, ranking, bounds
        self.groups = [group for group in graph.groups if group.prunable]
        allowed = limits(graph, most)
        self.room = [min(allowed.get(g.name, g.size), g.size - g.least) for g in self.groups]
        self.grain = round_to
        self.rounding: Callable[[Mapping[str, int]], dict[str, int]] = Rounding(graph, round_to) if round_to > 1 else dict
        costs = cost_model(graph)
        self.costs = {"macs": costs.macs, "params": costs.params, "memory": costs.memory}
        self.whole = {name: max(cost(), 1) for name, cost in self.costs.items()}
        channels, fixed = output_channels(graph)
        self.channels = {g.name: channels[g.name] for g in self.groups}
        self.all_channels = max(sum(g.size * channels[g.name] for g in self.groups) + fixed, 1)

    def keep(self, counts: Mapping[str, int]) -> Keep:
        return keep_counts(self.graph, counts, self.ranking)

    def left(self, counts: Mapping[str, int]) -> dict[str, float]:
        """What is left of each bounded metric, as a share of the original."""
        keep = self.keep(counts)
        gone = sum(count * self.channels[name] for name, count in counts.items())
        return {m: 1 - gone / self.all_channels if m == "sparsity" else self.costs[m](keep) / self.whole[m] for m in self.bounds}

    def fits(self, counts: Mapping[str, int]) -> bool:
        left = self.left(counts)
        return all(left[metric] <= share + TOLERANCE for metric, share in self.bounds.items())

    def counts(self) -> dict[str, int]:
        """The fewest units by which the bounds are met; where they cannot be, as many as may go."""
        order = self._order()
        low, high = 0, len(order)
        if not self.fits(self._first(order, high)):
            return self._first(order, high)
        while high - low > 1:  # costs fall as units go, so the boundary is found by halving
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(self._first(order, middle)) else (middle, high)
        return self._returned(self._first(order, high))

    def _order(self) -> Any:
        """The groups in the order in which they lose units, so that all have lost about the same share at any point."""
        names = [np.full(room, i) for i, room in enumerate(self.room)]
        shares = [np.arange(1, room + 1) / group.size for group, room in zip(self.groups, self.room, strict=True)]
        return np.concatenate(names)[np.argsort(np.concatenate(shares), kind="stable")] if names else np.zeros(0, dtype=np.int64)

    def _first(self, order: Any, number: int) -> dict[str, int]:
        taken = np.bincount(order[:number], minlength=len(self.groups))
        return self.rounding({group.name: int(n) for group, n in zip(self.groups, taken, strict=True)})

    def _returned(self, counts: dict[str, int]) -> dict[str, int]:
        """Units given back, as long as the bounds hold: those that bring it nearest to them."""
        while True:
            best, slack = counts, self._slack(counts)
            for group in self.groups:
                if counts[group.name]:
                    less = self.rounding({**counts, group.name: max(counts[group.name] - self.grain, 0)})
                    if less != counts and self.fits(less) and self._slack(less) < slack:
                        best, slack = less, self._slack(less)
            if best is counts:
                return counts
            counts = best

    def _slack(self, counts: Mapping[str, int]) -> float:
        left = self.left(counts)
        return min(share - left[metric] for metric, share in self.bounds.items())
