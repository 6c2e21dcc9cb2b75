"""The search over a network: the network as a ``Problem`` of numbers and functions, and what the driver finds as a policy and a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.api import analyze, compress, record
from fxprune.attached import attach
from fxprune.costs.profiling import profile
from fxprune.driver import Problem, SearchConfig, SearchOutcome, run
from fxprune.errors import FAULTS, EvaluationError, SearchError, in_a_line
from fxprune.evaluation.accuracy import device_of, one_thread
from fxprune.example_inputs import build
from fxprune.importance.criteria import Scores, importance_name, scores
from fxprune.index_lists import ranges
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.planning.cost import cost_model
from fxprune.passes.planning.plan import Keep, Rounding, keep_counts
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.policies import Policy
from fxprune.repair.repairer import Repairer, checked

Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    ``policy``: the sparsity of every group, with the inputs, options and units that give the same pruning again.
    ``model``: the slim module, repaired as the candidates were. ``history``: one record a step. ``reward``: of the result.
    ``evaluations``: candidates scored.
    ``outcome``: everything the driver found, the uniform baseline on the same budget and the points of a Pareto run included.
    """

    policy: Policy
    model: fx.GraphModule
    history: tuple[Mapping[str, Any], ...]
    reward: float
    evaluations: int
    outcome: SearchOutcome = field(repr=False)


class Candidates:
    """The slim networks of an analysed model by how many units each prunable group loses; made by slicing, from one analysis."""

    def __init__(self, graph: CouplingGraph, ranking: Scores, round_to: int = 1) -> None:
        self.graph, self.ranking, self.round_to = graph, ranking, round_to
        self.groups = [g for g in graph.groups if g.prunable]
        self.names = tuple(g.name for g in self.groups)
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
            self._rounded[key] = np.array([counts[name] for name in self.names], dtype=np.int64)
        return self._rounded[key].copy()

    def _counts(self, removed: Any) -> dict[str, int]:
        counts = dict(zip(self.names, map(int, removed), strict=True))
        return counts if self._rounding is None else self._rounding(counts)

    def slim(self, removed: Any) -> fx.GraphModule:
        return self.made(removed)[0]

    def made(self, removed: Any) -> tuple[fx.GraphModule, Slimmer]:
        """The slim network, and the rewrite that made it."""
        slimmer = Slimmer(self.graph, self.keep(removed))
        slim: fx.GraphModule = slimmer.run()
        return slim, slimmer

    def share(self, name: str, removed: Any) -> float:
        """What is left of "macs", "params" or "memory", as a share of the original."""
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
            gone = int(np.sum(removed))
            raise EvaluationError(f"evaluate raised {in_a_line(error)} on the network without {gone} of its units") from error

    def __getstate__(self) -> dict[str, Any]:
        graph = self.candidates.graph
        return {
            "model": graph.model,
            "inputs": graph.inputs,
            "options": graph.options,
            "ranking": dict(self.candidates.ranking),
            "round_to": self.candidates.round_to,
            "evaluate": self.evaluate,
            "batches": self.repairer.batches,
            "repair": self.repairer.kind,
            "reference": None if self.repairer.reference is graph else self.repairer.reference.model,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = self._analysed(state["model"], state)
        reference = None if state["reference"] is None else self._analysed(state["reference"], state)
        self.candidates = Candidates(graph, state["ranking"], state["round_to"])
        self.evaluate = state["evaluate"]
        self.repairer = Repairer(graph, state["batches"], state["repair"], reference)

    @staticmethod
    def _analysed(model: nn.Module, state: dict[str, Any]) -> CouplingGraph:
        options = state["options"]
        return analyze(model, build(state["inputs"], device="meta"), ignore=options["ignore"], attention=options["attention"])


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
        raise EvaluationError(
            f"evaluate returned a {type(found).__name__}; return a number or a mapping of metrics, larger is better"
        ) from error


class _Costs(Mapping[str, float]):
    """The remaining shares of one candidate; latency is measured when it is looked up."""

    def __init__(self, candidates: Candidates, removed: Any, latency: Callable[[nn.Module], float]) -> None:
        self.candidates, self.removed, self.latency = candidates, removed, latency

    def __getitem__(self, name: str) -> float:
        if name == "latency":
            return self.latency(self.candidates.slim(self.removed).eval())
        return self.candidates.share(name, self.removed)

    def __iter__(self) -> Iterator[str]:
        return iter(("macs", "params", "memory", "latency"))

    def __len__(self) -> int:
        return 4


def _latency(module: nn.Module, graph: CouplingGraph) -> float:
    return profile(module, build(graph.inputs, device=device_of(module))).latency(runs=20)


def make_problem(
    graph: CouplingGraph,
    evaluate: Evaluate,
    *,
    calibration: Iterable[Any] | None = None,
    importance: Any = "auto",
    round_to: int = 1,
    repair: str = "bn",
    seed: int = 0,
    reference: CouplingGraph | None = None,
    rough: Evaluate | None = None,
    latency: Callable[[nn.Module], float] | None = None,
) -> tuple[Problem, Candidates]:
    """An analysed network as a search problem: costs from the analysis, scores from ``evaluate`` on slim networks.

    ``calibration``: batches, ``(inputs, targets)`` or inputs alone, for the importance and for the repair; read once.
    ``rough``: a cheaper ``evaluate``, on fewer images say, for all but the finalists.
    ``latency``: seconds that a network takes; if left out, those for the example inputs.
    ``reference``: the same network analysed with the weights whose responses a repair aims at, where those of ``graph`` will change.
    """
    batches = None if calibration is None else list(calibration)
    checked(repair)
    if importance == "auto" and repair == "lstsq" and batches:
        importance = "reconstruction"  # the choice of units and the repair then aim at the same error
    with one_thread():
        candidates = Candidates(graph, scores(graph, importance, batches, seed), round_to)
    measured: dict[str, float] = {}

    seconds = latency or (lambda module: _latency(module, graph))

    def share(slim: nn.Module) -> float:
        if "latency" not in measured:
            measured["latency"] = seconds(graph.model)
        return seconds(slim) / measured["latency"]

    channels, fixed = output_channels(graph)
    repairer = Repairer(graph, batches or (), repair if batches else "none", reference)
    problem = Problem(
        names=candidates.names,
        units=np.array([g.size for g in candidates.groups]),
        channels=channels,
        cost=lambda removed: _Costs(candidates, removed, share),
        score=Score(candidates, evaluate, repairer),
        rough=None if rough is None else Score(candidates, rough, repairer),
        fixed_channels=fixed,
        unit_scores=[np.sort(candidates.ranking[n]) for n in candidates.names],
        rounding=candidates.rounded if round_to > 1 else None,
        grain=round_to,
        measured=measured,
    )
    return problem, candidates


def output_channels(graph: CouplingGraph) -> tuple[Any, int]:
    """Output channels of convolutions and linears per unit of each prunable group, and those in no prunable group.

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
    prunable = [g for g in graph.groups if g.prunable]
    return np.array([round(per_unit[graph.starts[g.number]]) for g in prunable], dtype=np.int64), fixed


def search(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Evaluate,
    *,
    config: SearchConfig | None = None,
    calibration: Iterable[Any] | None = None,
    rough: Evaluate | None = None,
    checkpoint_dir: Path | str | None = None,
    resume: bool = False,
    on_event: Callable[[Any], None] | None = None,
) -> SearchResult:
    """Find how much to take from which group of ``model`` so that the target of ``config`` is met at the highest reward.

    ``evaluate``: slim module -> a number or a mapping of metrics, larger is better; on data held out of training, never the test set.
    ``calibration``: a few batches, ``(inputs, targets)`` or inputs, for the importance and for the repair of candidates and result;
    without it nothing is repaired, as the record of the result says, and weights alone rank the units.
    ``rough``: a cheaper ``evaluate`` that gives the same metrics; with ``config.finalists`` the search goes by it, and only so many of the
    best are judged by ``evaluate`` itself.
    ``checkpoint_dir``, ``resume``: where the state is kept after every round, and whether to go on from it.
    Raises ``TargetError`` where no candidate is on target, ``SearchError`` for options that do not fit.
    """
    config = SearchConfig() if config is None else config
    if not isinstance(config, SearchConfig):
        raise SearchError(f"config is a {type(config).__name__}; pass fxprune.SearchConfig(...), whose fields are the options")
    graph = analyze(model, example_inputs, ignore=config.ignore, attention=config.attention)
    importance = config.importance
    problem, candidates = make_problem(
        graph,
        evaluate,
        calibration=calibration,
        importance=importance,
        round_to=config.round_to,
        repair=config.repair,
        seed=config.seed,
        rough=rough,
    )
    outcome = run(problem, config, checkpoint_dir=checkpoint_dir, resume=resume, on_event=on_event)
    assert isinstance(problem.score, Score)
    return result_of(outcome, candidates, config, problem.score.repairer)


def mended(slim: fx.GraphModule, removed: Any, candidates: Candidates, repairer: Repairer) -> fx.GraphModule:
    """``slim``, what is left without the units ``removed``, repaired in place as its record then says."""
    notes = repairer(slim, Slimmer(candidates.graph, candidates.keep(removed)))
    attach(slim, record(slim).with_repair(repairer.kind, notes, repairer.layers))
    return slim


def result_of(outcome: SearchOutcome, candidates: Candidates, config: SearchConfig, repairer: Repairer) -> SearchResult:
    """The policy and the slim module, repaired, of what the driver found."""
    meta = {
        "targets": list(outcome.targets),
        "reward": outcome.reward,
        "metrics": dict(outcome.metrics),
        "seed": config.seed,
        "strategy": config.described()["strategy"],
        "evaluations": outcome.evaluations,
    }
    policy = candidates.policy(outcome.removed, meta, importance_name(config.importance))
    slim = mended(compress(candidates.graph, policy), outcome.removed, candidates, repairer)
    return SearchResult(policy, slim, outcome.history, outcome.reward, outcome.evaluations, outcome)
