"""What a pruning would cost, from the analysis alone: no module is built, no operation run."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.labels.values import Value, Vector
from fxprune.passes.planning.plan import Keep
from fxprune.records import Profile


class CostModel:
    """MACs, parameters and activation memory of any pruning of an analysed model, by products of kept shares.

    A node's MACs shrink by the kept share of every channel axis it sums or writes; a parameter by that of its dimensions.
    """

    def __init__(self, graph: CouplingGraph) -> None:
        self.graph = graph
        self._vectors: list[Vector] = []
        self._slots: dict[int, int] = {}
        self._hold: list[Any] = []
        self._labels: dict[int, Vector] = {}
        self._macs = [
            (c.layer, c.macs, [self._slot(graph.units_of_labels(v), v) for v in (*c.along, *self._expert_of(mode, c.node))])
            for mode in graph.traced.eval_modes
            for c in graph.layer_costs[mode]
        ]
        self._params = list(self._parameters())
        self._memory = self._lifetimes()
        self._lengths = np.array([len(v) for v in self._vectors])
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)[:-1]]).astype(np.int64)
        self._flat = np.concatenate(self._vectors) if self._vectors else np.zeros(0, dtype=np.int64)

    def _slot(self, units: Vector, owner: Any) -> int:
        key = id(owner)
        if key not in self._slots:
            self._slots[key] = len(self._vectors)
            self._vectors.append(units)
            self._hold.append(owner)
        return self._slots[key]

    def _parameters(self) -> Iterator[tuple[str, int, int, list[int]]]:
        skeleton = self.graph.traced.skeleton
        for name in skeleton.names:
            if name not in skeleton.parameter_names:
                continue
            tensor = skeleton.tensor(name)
            keys = [(name, d) for d in range(tensor.ndim) if (name, d) in self.graph.unit_of]
            along = [self.graph.unit_of[k] for k in keys]
            along += [expert] if (expert := self.graph.expert_of(name)) is not None else []
            yield name, tensor.numel(), tensor.element_size(), [self._slot(units, units) for units in along]

    def _expert_of(self, mode: str, node: str) -> tuple[Vector, ...]:
        """The label of the expert that a node goes with."""
        gated = self.graph.gated
        found = [label for one, label in gated.nodes[mode].items() if one.name == node] if gated is not None else []
        return tuple(map(self._alone, found[:1]))

    def _alone(self, label: int) -> Vector:
        if label not in self._labels:
            self._labels[label] = np.array([label], dtype=np.int64)
        return self._labels[label]

    def _lifetimes(self) -> list[tuple[int, int, int, list[int]]]:
        """For every storage the graphs make: first node, last node that reads it, bytes, and the axes it shrinks along."""
        found: list[Any] = []
        clock = 0
        for mode in self.graph.traced.eval_modes:
            nodes = list(self.graph.traced.graphs[mode].nodes)
            found += self._storages(mode, {n: clock + i for i, n in enumerate(nodes)})
            clock += len(nodes)
        return found

    def _storages(self, mode: str, order: dict[Any, int]) -> list[Any]:
        storages: dict[int, list[Any]] = {}
        fixed: set[int] = set()
        for node in order:
            for meta, value in zip(
                _flat(node.meta.get("val"), torch.Tensor), _flat(self.graph.values[mode].get(node), Value), strict=False
            ):
                key = meta.untyped_storage()._cdata
                if node.op in ("placeholder", "get_attr"):
                    fixed.add(key)
                if key in fixed:
                    continue
                last = max((order[u] for u in node.users), default=order[node])
                if key not in storages:
                    axes = [self._slot(self.graph.units_along(value, a), value.axes[a]) for a in value.axes]
                    storages[key] = [order[node], last, meta.numel() * meta.element_size(), axes]
                storages[key][1] = max(storages[key][1], last)
        return list(storages.values())

    def _shares(self, keep: Keep | None) -> list[float]:
        if keep is None or not self._vectors:
            return [1.0] * len(self._vectors)
        padded = np.append(keep, True)
        kept = np.add.reduceat(padded[self._flat], self._starts, dtype=np.int64)
        shares: list[float] = (kept / self._lengths).tolist()
        return shares

    def macs(self, keep: Keep | None = None) -> int:
        return sum(self._layer_macs(self._shares(keep)).values())

    def _layer_macs(self, shares: list[float]) -> dict[str, int]:
        found: dict[str, int] = {}
        for layer, macs, along in self._macs:
            found[layer] = found.get(layer, 0) + round(macs * math.prod(shares[s] for s in along))
        return found

    def params(self, keep: Keep | None = None) -> int:
        shares = self._shares(keep)
        return sum(round(n * math.prod(shares[s] for s in along)) for _, n, _, along in self._params)

    def memory(self, keep: Keep | None = None) -> int:
        """Most bytes of activations alive at once."""
        shares = self._shares(keep)
        change = np.zeros(max((end for _, end, _, _ in self._memory), default=0) + 2)
        for start, end, size, along in self._memory:
            held = size * math.prod(shares[s] for s in along)
            change[start] += held
            change[end + 1] -= held
        return round(float(np.cumsum(change).max()))

    def products(self, metric: str) -> list[tuple[int, list[Vector]]]:
        """What "macs" or "params" is the sum of: counts, each with the units along every axis by whose kept share it shrinks (-1: none)."""
        found = [(n, along) for _, n, along in self._macs] if metric == "macs" else [(n, along) for _, n, _, along in self._params]
        return [(n, [self._vectors[slot] for slot in along]) for n, along in found]

    def without(self, dead: Mapping[str, Collection[str]], tensors: Collection[str]) -> dict[str, npt.NDArray[np.bool_]]:
        """Which of the terms of "macs", "params" and "memory" are gone with nodes, ``dead`` by graph, and with ``tensors``."""
        modes = self.graph.traced.eval_modes
        macs = [cost.node in dead[mode] for mode in modes for cost in self.graph.layer_costs[mode]]
        order = [node.name in dead[mode] for mode in modes for node in self.graph.traced.graphs[mode].nodes]
        return {
            "macs": np.array(macs, dtype=bool),
            "params": np.array([name in tensors for name, _, _, _ in self._params], dtype=bool),
            "memory": np.array([order[start] for start, _, _, _ in self._memory], dtype=bool),
        }

    def lifetimes(self) -> list[tuple[int, int, int, list[Vector]]]:
        """For every storage: the first and the last moment it is held, its bytes, and the units along its axes (-1: none)."""
        return [(start, end, size, [self._vectors[slot] for slot in along]) for start, end, size, along in self._memory]

    def profile(self, keep: Keep | None = None) -> Profile:
        shares = self._shares(keep)
        layers: dict[str, dict[str, int]] = {}
        for layer, macs in self._layer_macs(shares).items():
            layers.setdefault(layer, {"macs": 0, "params": 0})["macs"] = macs
        total = size = 0
        for name, numel, width, along in self._params:
            left = round(numel * math.prod(shares[s] for s in along))
            total, size = total + left, size + left * width
            layers.setdefault(name.rpartition(".")[0], {"macs": 0, "params": 0})["params"] += left
        return Profile(sum(v["macs"] for v in layers.values()), total, size, self.memory(keep), layers)


def cost_model(graph: CouplingGraph) -> CostModel:
    """The cost model of an analysed model, made once."""
    if graph.costs is None:
        graph.costs = CostModel(graph)
    found: CostModel = graph.costs
    return found


def _flat(nested: Any, kind: type) -> list[Any]:
    if isinstance(nested, kind):
        return [nested]
    if isinstance(nested, dict):
        return [x for v in nested.values() for x in _flat(v, kind)]
    if isinstance(nested, (tuple, list)):
        return [x for v in nested for x in _flat(v, kind)]
    return []
