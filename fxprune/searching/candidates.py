"""The slim networks that a search chooses from, made by slicing, and what each costs and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.allocation.prices import Prices
from fxprune.compression import cut_from
from fxprune.errors import FAULTS, EvaluationError, in_a_line, kind_of, network_without
from fxprune.evaluation.running import one_thread
from fxprune.example_inputs import build
from fxprune.importance.registry import Scores
from fxprune.index_lists import ranges
from fxprune.passes.coupling.blocks import Block
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.pipeline import analysed, as_recorded
from fxprune.passes.planning.cost_model import cost_model
from fxprune.passes.planning.naming import twin_units
from fxprune.passes.planning.plan import Keep, Rounding, keep_counts
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.policies import Policy
from fxprune.repair.repairer import Repairer

CUTS = 64  # choices of blocks whose networks are kept analysed
Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]


class Candidates:
    """The slim networks of an analysed model by how many units each prunable group loses; made by slicing, from one analysis.

    ``blocks``: what may be left out beside the units; a removal vector then has an entry for each behind those of the groups, 1 where the
    block goes. The network without blocks is analysed once for each choice of them.
    """

    def __init__(self, graph: CouplingGraph, ranking: Scores, round_to: int = 1, blocks: Sequence[Block] = ()) -> None:
        self.graph, self.ranking, self.round_to = graph, ranking, round_to
        self.groups = [g for g in graph.groups if g.prunable]
        self.blocks = [block for block in blocks if block.name not in graph.by_name]
        self.names = tuple(g.name for g in self.groups) + tuple(block.name for block in self.blocks)
        self.units = np.array([g.size for g in self.groups] + [2 for _ in self.blocks], dtype=np.int64)
        self._cuts: dict[tuple[str, ...], CouplingGraph] = {}
        self._rounded: dict[bytes, Any] = {}
        self._rounding = Rounding(graph, round_to) if round_to > 1 else None
        self.costs = cost_model(graph)
        self._whole = {"macs": self.costs.macs(), "params": self.costs.params(), "memory": self.costs.memory()}

    def keep(self, removed: Any) -> Keep:
        return keep_counts(self.graph, self._counts(removed), self.ranking)

    def rounded(self, removed: Any) -> Any:
        """The removal vector that is left of ``removed`` once channels are kept in multiples of ``round_to``."""
        key = removed.tobytes()
        if key not in self._rounded:
            counts = self._counts(removed)
            widths = [counts[group.name] for group in self.groups]
            self._rounded[key] = np.array([*widths, *removed[len(widths) :]], dtype=np.int64)
        return self._rounded[key].copy()

    def _counts(self, removed: Any) -> dict[str, int]:
        counts = dict(zip((group.name for group in self.groups), map(int, removed), strict=False))
        return counts if self._rounding is None else self._rounding(counts)

    def slim(self, removed: Any) -> fx.GraphModule:
        return self.made(removed)[0]

    def made(self, removed: Any) -> tuple[fx.GraphModule, Slimmer]:
        """The slim network, and the rewrite that made it."""
        slimmer = self.slimmer(removed)
        slim: fx.GraphModule = slimmer.run()
        return slim, slimmer

    def slimmer(self, removed: Any) -> Slimmer:
        """The rewrite: of the network without the blocks that go, where any do."""
        keep, cut = self.keep(removed), self.cut(removed)
        if cut is self.graph:
            return Slimmer(self.graph, keep)
        return Slimmer(cut, np.append(keep, True)[twin_units(self.graph, cut)] | ~cut.prunable_unit)

    def gone(self, removed: Any) -> list[Block]:
        """The blocks that are left out."""
        return [block for block, out in zip(self.blocks, removed[len(self.groups) :], strict=True) if out]

    def cut(self, removed: Any) -> CouplingGraph:
        """The analysed network without the blocks that are left out."""
        gone = self.gone(removed)
        if not gone:
            return self.graph
        key = tuple(block.name for block in gone)
        if key not in self._cuts:
            while len(self._cuts) >= CUTS:
                del self._cuts[next(iter(self._cuts))]
            self._cuts[key] = cut_from(self.graph, gone)
        return self._cuts[key]

    @cached_property
    def prices(self) -> Prices:
        """What allocations cost, blocks included."""
        return Prices(self.graph, self.groups, self.blocks)

    def share(self, name: str, removed: Any) -> float:
        """What is left of "macs", "params" or "memory", as a share of the original."""
        if self.gone(removed):
            return float(self.prices.shares(name, self.rounded(removed)[None])[0])
        count = {"macs": self.costs.macs, "params": self.costs.params, "memory": self.costs.memory}[name]
        return count(self.keep(removed)) / max(self._whole[name], 1)

    def policy(self, removed: Any, meta: Mapping[str, Any], importance: str) -> Policy:
        """The policy that ``compress`` turns into the same units, without the calibration data."""
        keep = self.keep(removed)
        sparsity, units = {}, {}
        for group in self.groups:
            gone = np.flatnonzero(~keep[self.graph.starts[group.number] : self.graph.starts[group.number + 1]])
            sparsity[group.name] = len(gone) / group.size
            if len(gone):
                units[group.name] = ranges(torch.from_numpy(gone))
        options = {**self.graph.options, "round_to": self.round_to, "importance": importance, "units": units}
        if blocks := self.gone(removed):
            sparsity |= {block.name: 1.0 for block in blocks}
            options["blocks"] = True
        return Policy(sparsity, self.graph.inputs, options, meta)


class Score:
    """Removal vector -> metrics of the slim network, repaired first: a candidate is scored as it will be used (for BatchNorm: EagleEye,
    Li 2020).

    One thread per evaluation, since linear algebra differs in bits between one and two. Pickled, it carries the model and is analysed
    again where it arrives.
    """

    def __init__(self, candidates: Candidates, evaluate: Evaluate, repairer: Repairer) -> None:
        self.candidates, self.evaluate, self.repairer = candidates, evaluate, repairer

    def __call__(self, removed: Any) -> Mapping[str, float]:
        with one_thread():
            slim, slimmer = self.candidates.made(removed)
            self.repairer(slim.eval(), slimmer)
            with torch.no_grad():
                return metrics_of(self._evaluated(slim, removed))

    def _evaluated(self, slim: nn.Module, removed: Any) -> Any:
        try:
            return self.evaluate(slim)
        except FAULTS as error:
            raise EvaluationError(f"evaluate raised {in_a_line(error)} on {network_without(int(np.sum(removed)))}") from error

    def __getstate__(self) -> dict[str, Any]:
        graph = self.candidates.graph
        return {
            "model": graph.model,
            "inputs": graph.inputs,
            "options": graph.options,
            "ranking": dict(self.candidates.ranking),
            "round_to": self.candidates.round_to,
            "blocks": [block.name for block in self.candidates.blocks],
            "evaluate": self.evaluate,
            "batches": self.repairer.batches,
            "repair": self.repairer.given,
            "reference": None if self.repairer.reference is graph else self.repairer.reference.model,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = self._analysed(state["model"], state)
        reference = None if state["reference"] is None else self._analysed(state["reference"], state)
        blocks = {block.name: block for block in graph.all_blocks} if state["blocks"] else {}
        self.candidates = Candidates(graph, state["ranking"], state["round_to"], [blocks[name] for name in state["blocks"]])
        self.evaluate = state["evaluate"]
        self.repairer = Repairer(graph, state["batches"], state["repair"], reference)

    @staticmethod
    def _analysed(model: nn.Module, state: dict[str, Any]) -> CouplingGraph:
        options = state["options"]
        return analysed(model, build(state["inputs"], device="meta"), options["ignore"], options["attention"], **as_recorded(options))


def metrics_of(found: Any) -> Mapping[str, float]:
    """What ``evaluate`` returned as a mapping with an "accuracy": a number is the accuracy, a mapping's first entry stands in for it."""
    if isinstance(found, Mapping):
        try:
            metrics = {str(k): float(v) for k, v in found.items()}
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"evaluate returned a mapping with a value that is no number ({error}); metrics are numbers") from error
        if not metrics:
            raise EvaluationError("evaluate returned an empty mapping; return a number or a mapping of metrics, larger is better")
        metrics.setdefault("accuracy", next(iter(metrics.values())))
        return metrics
    try:
        return {"accuracy": float(found)}
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"evaluate returned {kind_of(found)}; return a number or a mapping of metrics, larger is better") from error


class CandidateCosts(Mapping[str, float]):
    """The remaining shares of one candidate; ``latency``, and what is left of the user's ``own`` costs, are
    found when they are looked up."""

    def __init__(
        self,
        candidates: Candidates,
        removed: Any,
        latency: Callable[[Any], float],
        own: Mapping[str, Callable[[nn.Module], float]] | None = None,
    ) -> None:
        self.candidates, self.removed, self.latency, self.own = candidates, removed, latency, own or {}

    def __getitem__(self, name: str) -> float:
        if name == "latency":
            return self.latency(self.removed)
        if name in self.own:
            return self.own[name](self.candidates.slim(self.removed))
        return self.candidates.share(name, self.removed)

    def __iter__(self) -> Iterator[str]:
        return iter(("macs", "params", "memory", "latency", *self.own))

    def __len__(self) -> int:
        return 4 + len(self.own)
