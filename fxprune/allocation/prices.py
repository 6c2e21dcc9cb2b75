"""What an allocation costs, from the number of units that each group loses alone: many allocations at once, no unit chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fxprune.passes.coupling.blocks import Block, dead_nodes
from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.planning.cost_model import cost_model

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
TRACE = 1e-7
METRICS = ("macs", "params", "memory", "sparsity")


class Prices:
    """Remaining shares of MACs, parameters, activation memory and output channels, for arrays of removals (allocations, groups).

    A count shrinks by the kept share of each of its axes, and a share by what each group loses along the axis: so costs are exact products,
    and what a unit saves falls as its neighbours shrink. ``groups``: what may lose units, in the order of the removals; ``blocks``: what
    may be left out, a column each behind them, where a 1 leaves it out. No block holds another.
    """

    def __init__(self, graph: CouplingGraph, groups: Sequence[Group], blocks: Sequence[Block] = ()) -> None:
        self.graph, self.groups = graph, list(groups)
        self._number = {group.number: i for i, group in enumerate(self.groups)}
        model = cost_model(graph)
        lives = model.lifetimes()
        self._terms = {name: self._products(model.products(name)) for name in ("macs", "params")}
        self._terms["memory"] = self._products([(size, along) for _, _, size, along in lives])
        self._totals = {name: max(float(counts.sum()), 1.0) for name, (counts, _, _) in self._terms.items()}
        self._starts = np.array([start for start, _, _, _ in lives], dtype=np.int64)
        self._ends = np.array([end + 1 for _, end, _, _ in lives], dtype=np.int64)
        self._moments = int(max(self._ends, default=0)) + 1
        dead = [model.without(dead_nodes(graph.traced, block), block.tensors) for block in blocks]
        self._dead = {name: np.array([one[name] for one in dead], dtype=np.float64) for name in self._terms if dead}
        self._peak = max(float(self._peaks(np.zeros((1, len(self.groups) + len(blocks)), dtype=np.int64))[0]), 1.0)
        self._channels, self._all = self._outputs()

    def shares(self, metric: str, removed: IntArray) -> FloatArray:
        """What is left of a metric of ``METRICS``, as a share of the original: (allocations,)."""
        if metric == "sparsity":
            return np.asarray(1 - removed[:, : len(self.groups)] @ self._channels / max(self._all, 1), dtype=np.float64)
        if metric == "memory":
            found: FloatArray = self._peaks(removed) / self._peak
        else:
            found = self._sizes(metric, removed).sum(1) / self._totals[metric]
        return found

    def _sizes(self, metric: str, removed: IntArray) -> FloatArray:
        """Each term of a metric, (allocations, terms)."""
        counts, axes, slopes = self._terms[metric]
        kept = np.ones((len(removed), len(slopes) + 1))
        kept[:, :-1] -= removed[:, : len(self.groups)] @ slopes.T
        found: FloatArray = kept[:, axes].prod(2) * counts
        if self._dead:
            found = found * (1 - removed[:, len(self.groups) :] @ self._dead[metric]).clip(0)
        return found

    def _peaks(self, removed: IntArray) -> FloatArray:
        """Most bytes of activations alive at once, (allocations,)."""
        held = self._sizes("memory", removed)
        change = np.zeros((len(removed), self._moments))
        np.add.at(change.T, self._starts, held.T)
        np.subtract.at(change.T, self._ends, held.T)
        held_at = change.cumsum(1)
        peaks = np.maximum(held_at.max(1), 1e-9)
        # Where several moments are as full, no single step lowers the peak: a trace of how many there are says which steps lead down.
        trace = (held_at / peaks[:, None]) ** 8
        found: FloatArray = peaks * (1 + TRACE * trace.mean(1))
        return found

    def _products(self, products: Sequence[tuple[int, list[IntArray]]]) -> tuple[FloatArray, IntArray, FloatArray]:
        """Counts (terms,), the axes of each (terms, most axes; the last axis is a constant 1), and what a unit of each group takes off the
        kept share of every axis (axes, groups)."""
        seen: dict[int, int] = {}
        slopes: list[FloatArray] = []
        rows: list[list[int]] = []
        for _, along in products:
            rows.append([])
            for units in along:
                if id(units) not in seen:
                    seen[id(units)] = len(slopes)
                    slopes.append(self._slope(units))
                rows[-1].append(seen[id(units)])
        width = max((len(row) for row in rows), default=0)
        axes = np.array([row + [len(slopes)] * (width - len(row)) for row in rows], dtype=np.int64).reshape(len(rows), width)
        counts = np.array([count for count, _ in products], dtype=np.float64)
        return counts, axes, np.array(slopes).reshape(len(slopes), len(self.groups))

    def _slope(self, units: IntArray) -> FloatArray:
        found = np.zeros(len(self.groups))
        numbers, times = np.unique(self.graph.group_of_unit[units[units >= 0]], return_counts=True)
        for number, count in zip(numbers.tolist(), times.tolist(), strict=True):
            if number in self._number:
                i = self._number[number]
                found[i] = count / self.groups[i].size / max(len(units), 1)
        return found

    def _outputs(self) -> tuple[FloatArray, int]:
        """Output channels that go with a unit of each group, and how many there are in all but for the network's own outputs."""
        channels, total = output_channels(self.graph)
        per = np.array([channels[group.name] for group in self.groups], dtype=np.float64)
        sizes = np.array([group.size for group in self.groups], dtype=np.float64)
        return per, int((per * sizes).sum()) + total


def output_channels(graph: CouplingGraph) -> tuple[Mapping[str, int], int]:
    """Output channels of convolutions and linears per unit of each prunable group, by its name, and those in no prunable group.

    The network's own outputs are left out, as the paper counts (Wang 2024, sec. 4).
    """
    per_unit = np.zeros(int(graph.starts[-1]))
    fixed = 0
    for key in graph.keys:
        if graph.is_output(key):
            units = graph.unit_of[key]
            inside = graph.prunable_unit[units]
            per_unit += np.bincount(units[inside], minlength=len(per_unit))
            groups = [graph.by_number[g] for g in np.unique(graph.group_of_unit[units]).tolist() if g in graph.by_number]
            if not any(g.kind is ReasonKind.OUTPUT for g in groups):
                fixed += int((~inside).sum())
    return {g.name: round(per_unit[graph.starts[g.number]]) for g in graph.groups if g.prunable}, fixed
