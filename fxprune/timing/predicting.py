"""What a candidate will take, reckoned before it is made: layers by their table, the rest by what it moves, the whole by what was measured.

The table says how a layer's time falls with its widths, which is not as its multiply-accumulates fall. What the layers do not explain of
the original's time is shared out to the bytes of the activations and to the operations as such. Measured candidates then set right what
is wrong with the sum: a share is read off the line through the measured ones.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxprune.evaluation.running import device_of
from fxprune.passes.coupling.blocks import Block, dead_nodes
from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.passes.labels.values import Value
from fxprune.timing.candidates import CandidateTimer
from fxprune.timing.layers import Layer, LayerTable, layer_of
from fxprune.timing.runtimes import Runtime

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Node = tuple[str, str]  # a graph and a node of it, by their names
CALL = {"eager": 4e-6}  # seconds that an operation costs as such, at most; elsewhere:
LEAN_CALL = 1e-6
REST = 0.05  # of the time that is never the layers'
PARTS = 3  # of a prediction: layers, other operations, and what never falls
NOISE, SURE, DOUBT = 0.02, 0.001, 0.7  # how far a measured share, the original's, and the weight of a part may be off
LIGHTEST = 0.1  # that a part may count
UNKNOWN = Layer("linear", (256,), 256, 256)  # by which products are reckoned where no layer is in the table


@dataclass
class _Terms:
    """Times of the original: seconds by layer with how they fall, and seconds that fall with axes."""

    outs: FloatArray  # (layers, 3) shares of the outputs at which there are times, rising
    ins: FloatArray  # (layers, 3)
    seconds: FloatArray  # (layers, 3, 3)
    places: IntArray  # (layers, 2) the axes of outputs and inputs
    others: FloatArray  # (terms,) seconds of what falls with the product of its axes
    axes: IntArray  # (terms, most axes)
    slopes: FloatArray  # (axes, groups) what a unit of each group takes off an axis; one further axis never loses anything
    fixed: float
    whole: float
    dead_layers: FloatArray  # (blocks, layers) 1 for what is gone without a block
    dead_others: FloatArray  # (blocks, terms)
    dead_operations: FloatArray  # (blocks,) the share of the operations


class LatencyModel:
    """Predicted shares of the original's time, for arrays of removals (allocations, groups).

    ``groups``: what may lose units, in the order of the removals. ``measured``: seconds that were measured, of the original and of layers;
    what is there already counts, what is measured is put there. ``blocks``: what may be left out, a column of the removals each, behind
    those of the groups; no block holds another.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        groups: Sequence[Group],
        runtime: Runtime,
        measured: MutableMapping[str, float],
        blocks: Sequence[Block] = (),
    ) -> None:
        self.graph, self.groups, self.runtime, self.measured = graph, list(groups), runtime, measured
        self.blocks = list(blocks)
        self.timer = CandidateTimer(graph, runtime, measured)
        self._points: list[tuple[float, float]] = []
        self._weights = np.ones(PARTS)

    def shares(self, removed: IntArray) -> FloatArray:
        """What is left of the time, as a share of the original's: (allocations,)."""
        return self._corrected(self._raw(removed))

    def correct(self, points: Sequence[tuple[IntArray, float]]) -> None:
        """Go by these measured shares of allocations, the last of which count most."""
        self._points, self._weights = [], np.ones(PARTS)
        if points:
            parts = self._parts(np.stack([removed for removed, _ in points]))
            self._weights = self._fitted(parts, np.array([share for _, share in points]))
            self._points = [(float(a), share) for a, (_, share) in zip(parts @ self._weights, points, strict=True)]

    def _fitted(self, parts: FloatArray, shares: FloatArray) -> FloatArray:
        """What the layers, the other operations and what never falls count, so that the sums come nearest to measured shares.

        Weighted least squares: of the shares relative to themselves, the original's share of 1, and the weights' own being near 1.
        """
        whole = self._parts(np.zeros((1, len(self.groups) + len(self.blocks)), dtype=np.int64))
        rows = np.concatenate([parts / shares[:, None] / NOISE, whole / SURE, np.eye(PARTS) / DOUBT])
        wanted = np.concatenate([np.full(len(shares), 1 / NOISE), [1 / SURE], np.full(PARTS, 1 / DOUBT)])
        found, free = np.full(PARTS, LIGHTEST), np.ones(PARTS, dtype=bool)
        while free.any():
            found[free] = np.linalg.lstsq(rows[:, free], wanted - rows[:, ~free] @ found[~free], rcond=None)[0]
            if (found[free] >= LIGHTEST).all():
                break
            free &= found > LIGHTEST
            found[~free] = LIGHTEST
        weights: FloatArray = found / float((whole @ found)[0])
        return weights

    def _corrected(self, raw: FloatArray) -> FloatArray:
        """Along the line through the measured points that rise with the prediction, the newest taken first, and the original."""
        chosen = {1.0: 1.0}
        for predicted, share in reversed(self._points):
            below = [s for p, s in chosen.items() if p < predicted - 1e-9]
            above = [s for p, s in chosen.items() if p > predicted + 1e-9]
            near = any(abs(p - predicted) < 1e-3 for p in chosen)
            if not near and all(s < share for s in below) and all(s > share for s in above):
                chosen[predicted] = share
        if len(chosen) == 1:
            return raw
        x = np.array(sorted(chosen))
        y = np.array([chosen[p] for p in x.tolist()])
        found: FloatArray = np.interp(raw, x, y)
        slope = (y[1] - y[0]) / (x[1] - x[0])
        below_all = raw < x[0]
        found[below_all] = np.maximum(y[0] - slope * (x[0] - raw[below_all]), y[0] * raw[below_all] / x[0] * 0.25)
        return found

    def _raw(self, removed: IntArray) -> FloatArray:
        found: FloatArray = self._parts(removed) @ self._weights
        return found

    def _parts(self, removed: IntArray) -> FloatArray:
        """What the table says of the layers, the other operations and what never falls, as shares of the whole: (allocations, PARTS)."""
        terms = self._terms
        kept = np.ones((len(removed), len(terms.slopes) + 1))
        widths, out = removed[:, : len(self.groups)], removed[:, len(self.groups) :]
        kept[:, :-1] -= widths @ terms.slopes.T
        others, layers = kept[:, terms.axes].prod(2) * terms.others, np.zeros((len(removed), 0))
        if len(terms.places):
            layers = _between(terms, kept)
        fixed = np.full(len(removed), terms.fixed)
        if self.blocks:
            others, layers = others * (1 - out @ terms.dead_others).clip(0), layers * (1 - out @ terms.dead_layers).clip(0)
            fixed = fixed * (1 - out @ terms.dead_operations).clip(0)
        found: FloatArray = np.stack([layers.sum(1), others.sum(1), fixed], axis=1) / terms.whole
        return found

    @cached_property
    def _terms(self) -> _Terms:
        whole = self.timer.seconds
        parts = _Parts(self.graph, self.groups, self.runtime)
        table = LayerTable(self.runtime, device_of(self.graph.model), self.measured)
        grids = [table.grid(layer) for layer, _, _ in parts.layers]
        rate = sum(grid[2][-1][-1] for grid in grids) / sum(parts.layer_macs) if parts.layers else table.seconds(UNKNOWN) / 256**3
        table.save()
        products = [rate * macs for macs, _ in parts.products]
        spent = sum(grid[2][-1][-1] for grid in grids) + sum(products)
        scale = min(1.0, (1 - REST) * whole / spent) if spent else 1.0
        rest = whole - scale * spent
        fixed = min(rest / 2, len(parts.operation_nodes) * CALL.get(self.runtime.name, LEAN_CALL))
        moved = sum(size for size, _ in parts.moved)
        others = [scale * seconds for seconds in products] + [(rest - fixed) * size / max(moved, 1) for size, _ in parts.moved]
        if not moved:
            fixed = rest
        rows = [row for _, row in (*parts.products, *parts.moved)]
        return _Terms(
            outs=np.array([_padded(grid[0]) for grid in grids]).reshape(-1, 3),
            ins=np.array([_padded(grid[1]) for grid in grids]).reshape(-1, 3),
            seconds=scale * np.array([_padded([_padded(row) for row in grid[2]]) for grid in grids]).reshape(-1, 3, 3),
            places=np.array([[out, into] for _, out, into in parts.layers], dtype=np.int64).reshape(-1, 2),
            others=np.array(others, dtype=np.float64),
            axes=parts.padded(rows),
            slopes=parts.slopes,
            fixed=fixed,
            whole=whole,
            dead_layers=parts.dead(self.blocks, parts.layer_nodes),
            dead_others=parts.dead(self.blocks, parts.product_nodes + parts.moved_nodes),
            dead_operations=parts.dead(self.blocks, parts.operation_nodes).mean(1) if self.blocks else np.zeros(0),
        )


def _padded(values: list[Any]) -> list[Any]:
    """Three entries, the last one repeated where there are fewer."""
    return [*values, *values[-1:] * (3 - len(values))]


def _between(terms: _Terms, kept: FloatArray) -> FloatArray:
    """Seconds of every layer at the kept shares of its axes, (allocations, layers): bilinear between the table's entries, and on below."""
    along_out = _Along(terms.outs, kept[:, terms.places[:, 0]])
    along_in = _Along(terms.ins, kept[:, terms.places[:, 1]])
    found: FloatArray = np.maximum(along_in(*(along_out(*terms.seconds[:, :, i].T) for i in range(3))), 0.1 * terms.seconds[:, 0, 0])
    return found


class _Along:
    """Values on the lines through three entries of each layer's grid, at shares (allocations, layers). Of equal entries the first."""

    def __init__(self, grid: FloatArray, share: FloatArray) -> None:
        width = np.diff(grid, axis=1)
        low, high = np.divide(1.0, width, out=np.zeros_like(width), where=width > 0).T
        self.upper = (share > grid[:, 1]) & (width[:, 1] > 0)
        self.low, self.high = (share - grid[:, 0]) * low, (share - grid[:, 1]) * high

    def __call__(self, first: FloatArray, second: FloatArray, third: FloatArray) -> FloatArray:
        found: FloatArray = np.where(self.upper, second + (third - second) * self.high, first + (second - first) * self.low)
        return found


class _Parts:
    """What an analysed network does when it runs, as far as it takes time: by axes, whose kept shares it falls with.

    ``layers``: those of the table, with the axes of their outputs and inputs. ``products``: other multiply-accumulates; ``moved``: bytes
    that other operations write; each with its axes. ``*_nodes``: where each of them is in the graphs, and every operation.
    """

    def __init__(self, graph: CouplingGraph, groups: Sequence[Group], runtime: Runtime) -> None:
        self.graph = graph
        self._number = {group.number: i for i, group in enumerate(groups)}
        self._sizes = [group.size for group in groups]
        self._slots: dict[int, int] = {}
        self._vectors: list[IntArray] = []
        self._slopes: list[FloatArray] = []
        self.layers: list[tuple[Layer, int, int]] = []
        self.layer_macs: list[int] = []
        self.products: list[tuple[float, list[int]]] = []
        self.moved: list[tuple[float, list[int]]] = []
        self.layer_nodes: list[Node] = []
        self.product_nodes: list[Node] = []
        self.moved_nodes: list[Node] = []
        self.operation_nodes: list[Node] = []
        for mode in graph.traced.eval_modes:
            nodes = graph.traced.graphs[mode].nodes
            batch = next((t.shape[0] for n in nodes if n.op == "placeholder" and (t := _tensor(n)) is not None and t.ndim), 1)
            times = 1.0 if runtime.batch is None else runtime.batch / max(batch, 1)
            tabled = {node.name for node in nodes if node.op == "call_module" and self._layer(node, graph.values[mode], times)}
            self.layer_nodes += [(mode, node.name) for node in nodes if node.name in tabled]
            self.product_nodes += [(mode, cost.node) for cost in graph.layer_costs[mode] if cost.node not in tabled]
            macs = {cost.node: cost.macs for cost in graph.layer_costs[mode]}
            self.layer_macs += [max(1, round(macs.get(name, 0) * times)) for name in (n.name for n in nodes) if name in tabled]
            self.products += [
                (cost.macs * times, [self._slot(v) for v in cost.along]) for cost in graph.layer_costs[mode] if cost.node not in tabled
            ]
            self._others(mode, nodes, graph.values[mode], tabled, times)

    @property
    def slopes(self) -> FloatArray:
        """What a unit of each group takes off each axis, (axes, groups)."""
        return np.array(self._slopes).reshape(len(self._slopes), len(self._sizes))

    def padded(self, rows: Sequence[Sequence[int]]) -> IntArray:
        """Axes by term, (terms, most axes); the axis that never loses anything fills up."""
        width = max((len(row) for row in rows), default=0)
        return np.array([[*row, *[len(self._slopes)] * (width - len(row))] for row in rows], dtype=np.int64).reshape(len(rows), width)

    def _layer(self, node: fx.Node, env: Mapping[fx.Node, Any], times: float) -> bool:
        source, out = (node.args[0] if node.args else None), env.get(node)
        given = env.get(source) if isinstance(source, fx.Node) else None
        if not isinstance(given, Value) or not isinstance(out, Value):
            return False
        module = self.graph.traced.skeleton.original_module(str(node.target))
        found = layer_of(module, (max(1, round(given.shape[0] * times)), *given.shape[1:]))
        if found is None:
            return False
        axis = len(given.shape) - 1 if found.kind == "linear" else 1
        places = [-1 if axis not in value.axes else self._slot(value.axes[axis]) for value in (out, given)]
        self.layers.append((found, *places))  # type: ignore[arg-type]
        return True

    def dead(self, blocks: Sequence[Block], nodes: Sequence[Node]) -> FloatArray:
        """1 for each of ``nodes`` that is of no use without a block, (blocks, nodes)."""
        found = [dead_nodes(self.graph.traced, block) for block in blocks]
        return np.array([[name in dead[mode] for mode, name in nodes] for dead in found], dtype=np.float64).reshape(len(blocks), len(nodes))

    def _others(self, mode: str, nodes: Any, env: Mapping[fx.Node, Any], tabled: set[str], times: float) -> None:
        held: set[int] = set()
        for node in nodes:
            tensor, value = _tensor(node), env.get(node)
            if tensor is None:
                continue
            key = tensor.untyped_storage()._cdata
            fresh = key not in held
            held.add(key)
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            self.operation_nodes.append((mode, node.name))
            if fresh and node.name not in tabled and isinstance(value, Value):
                self.moved_nodes.append((mode, node.name))
                self.moved.append((tensor.numel() * tensor.element_size() * times, [self._slot(v) for v in value.axes.values()]))

    def _slot(self, vector: IntArray) -> int:
        if id(vector) not in self._slots:
            self._slots[id(vector)] = len(self._slopes)
            self._vectors.append(vector)  # so that no other takes its place in memory
            units = self.graph.units_of_labels(vector)
            slope = np.zeros(len(self._sizes))
            numbers, counts = np.unique(self.graph.group_of_unit[units[units >= 0]], return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                if number in self._number:
                    i = self._number[number]
                    slope[i] = count / self._sizes[i] / max(len(units), 1)
            self._slopes.append(slope)
        return self._slots[id(vector)]


def _tensor(node: fx.Node) -> torch.Tensor | None:
    found = node.meta.get("val")
    return found if isinstance(found, torch.Tensor) else None
