"""An analysed network as the driver's problem: numbers and functions, no network."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fxprune.allocation.allocating import Allocator, tried_out
from fxprune.allocation.grain import GRAIN, convolves, multiple_for_bounds
from fxprune.allocation.leaving_out import block_effects
from fxprune.allocation.prices import METRICS, IntArray, output_channels
from fxprune.allocation.tables import ErrorTable, error_table
from fxprune.api import analyze
from fxprune.driver import Problem, SearchConfig
from fxprune.errors import FAULTS, EvaluationError, FileError, FxPruneError, PruningWarning, SearchError, in_a_line, shown
from fxprune.evaluation.batches import checked
from fxprune.evaluation.running import evaluating, one_thread
from fxprune.evaluation.synthetic import listed_batches
from fxprune.importance.criteria import resolved, scores
from fxprune.imports import by_path
from fxprune.passes.coupling.blocks import finest
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.planning.naming import limits
from fxprune.repair.registry import FITTING, named, of_candidates
from fxprune.repair.repairer import Repairer
from fxprune.searching.candidates import CandidateCosts, Candidates, Evaluate, Score
from fxprune.searching.kept_tables import kept_table
from fxprune.timing.predicting import LatencyModel
from fxprune.timing.runtimes import Runtime

LATENCY_TOLERANCE = 0.05  # of its target, by which a measured latency may be off


class _Clock:
    """The latency of candidates in a runtime: predicted, and measured where it is asked for (``fxprune.driver.problem.Clock``)."""

    tolerance = LATENCY_TOLERANCE

    def __init__(self, candidates: Candidates, model: LatencyModel) -> None:
        self.candidates, self.model = candidates, model

    def seconds(self) -> float:
        return self.model.timer.seconds

    def share(self, removed: Any) -> float:
        return self.model.timer.share(self.candidates.slim(removed).eval())

    def predicted(self, removed: Any) -> float:
        return float(self.model.shares(np.asarray(self.candidates.rounded(removed))[None])[0])

    def correct(self, points: Sequence[tuple[Any, float]]) -> None:
        self.model.correct([(self.candidates.rounded(removed), share) for removed, share in points])


class _Tried:
    """Tries out allocations of the ``table`` (``fxprune.driver.problem.Trying``), as ``compress`` does with a target."""

    def __init__(self, table: Allocator, batches: Sequence[Any], repair: Any, seed: int) -> None:
        self.table, self.batches, self.repair, self.seed = table, batches, repair, seed

    def __call__(self, bounds: Mapping[str, float]) -> IntArray | None:
        table = self.table
        if table.blocks or any(metric not in METRICS for metric in bounds):
            return None
        judged = tried_out(table, bounds, table.met(bounds)[0], self.batches, self.repair, seed=self.seed)
        return np.array([judged[0].counts[group.name] for group in table.groups], dtype=np.int64) if judged else None


def graph_for(model: nn.Module, example_inputs: Any, config: SearchConfig, *, blocks: bool) -> CouplingGraph:
    """The network analysed as the configuration asks for it."""
    return analyze(
        model,
        example_inputs,
        ignore=config.ignore,
        attention=config.attention,
        norms=config.norms,
        blocks=blocks,
        experts=config.experts,
    )


def multiple_for(graph: CouplingGraph, config: SearchConfig) -> int:
    """What channels are kept in multiples of: as the configuration says, else what runtimes like where a latency of a network with
    convolutions is the target, or any target of a wide one."""
    if config.round_to is not None:
        return config.round_to
    if config.timed:
        return GRAIN if convolves(graph) else 1
    return multiple_for_bounds(graph, [{t.metric: t.remaining for t in point} for point in config.points], config.most)


class _OwnCost:
    """A cost of the user's own as a share of the original's, which is computed once."""

    def __init__(self, name: str, cost: Any, original: nn.Module, wholes: dict[str, float]) -> None:
        self.name, self.original, self.wholes = name, original, wholes
        self.cost = by_path(cost, f"cost {name!r}", SearchError) if isinstance(cost, str) else cost

    def __call__(self, slim: nn.Module) -> float:
        if self.name not in self.wholes:
            with evaluating(self.original):
                whole = self._number(self.original)
            if whole <= 0:
                raise EvaluationError(f"cost {self.name!r} is {whole} for the original; a share of it needs a number above 0")
            self.wholes[self.name] = whole
        with evaluating(slim):
            return self._number(slim) / self.wholes[self.name]

    def _number(self, module: nn.Module) -> float:
        try:
            found = float(self.cost(module))
        except FAULTS as error:
            raise EvaluationError(f"cost {self.name!r} raised {in_a_line(error)}") from error
        if not np.isfinite(found):
            raise EvaluationError(f"cost {self.name!r} is {found}; it must be a finite number")
        return found


def make_problem(
    graph: CouplingGraph,
    evaluate: Evaluate,
    *,
    calibration: Iterable[Any] | None = None,
    importance: Any = "auto",
    round_to: int = 1,
    repair: Any = "bn",
    seed: int = 0,
    reference: CouplingGraph | None = None,
    rough: Evaluate | None = None,
    runtime: Runtime | None = None,
    tabled: str = "no",
    rungs: Sequence[Evaluate] = (),
    most: Mapping[str, float] | float | None = None,
    loss: Any = None,
    own_costs: Mapping[str, Any] | None = None,
    blocks: bool = False,
    folder: Path | None = None,
) -> tuple[Problem, Candidates]:
    """An analysed network as a search problem: costs from the analysis, scores from ``evaluate`` on slim networks.

    ``calibration``: batches, ``(inputs, targets)`` or inputs alone, for the importance and for the repair; read once.
    ``rough``: a cheaper ``evaluate``, on fewer images say, for all but the finalists.
    ``runtime``: where latency is measured; if left out, eager PyTorch on one thread and the example inputs.
    ``reference``: the same network analysed with the weights whose responses a repair aims at, where those of ``graph`` will change.
    ``tabled``: whether the problem has an error table, made once from ``calibration``, where there is any: "no", "must" or "may", which
    goes on without one, with a ``PruningWarning``, where it cannot be made. With ``importance`` "auto" and a repair by least squares it
    also ranks the units.
    ``rungs``: cheaper ``evaluate``s, each on half the data of the next one and the last on half of what ``evaluate`` takes; candidates are
    repaired for them on as small a share of ``calibration``.
    ``most``, ``loss``: as in ``compress``; ``loss`` may be named as module:function. ``own_costs``: costs of the user's own by name:
    ``f(module) -> number``, or module:function.
    ``blocks``: whether whole blocks may be left out too, one entry of a removal vector each, behind those of the groups.
    ``folder``: where the error table is kept, and read from where it is there already.
    """
    for argument, function_given in (("evaluate", evaluate), ("rough", rough), *(("rungs", rung) for rung in rungs)):
        if not callable(function_given) and not (argument == "rough" and function_given is None):
            raise SearchError(f"{argument} is {shown(function_given)}; pass a function of the slim module that returns a number")
    batches = checked(listed_batches(calibration), graph.inputs)
    named(repair)
    repair = of_candidates(repair)
    function = by_path(loss, "loss", SearchError) if isinstance(loss, str) else loss
    tied = importance == "auto" and repair == "lstsq" and bool(batches)  # the choice of units and the repair then aim at the same error
    table: Allocator | None = None
    measured: dict[str, float] = {}
    groups = [group for group in graph.groups if group.prunable]
    parts = [block for block in finest(graph.all_blocks) if block.name not in graph.by_name] if blocks else []
    timing = LatencyModel(graph, groups, runtime or Runtime(), measured, parts)
    with one_thread():
        ranking = None
        if not (tied and tabled != "no"):
            ranking = scores(graph, "reconstruction" if tied else resolved(importance), batches, seed, function)
        if tabled != "no" and batches:
            try:
                found = _tabled(graph, batches, ranking, repair, seed, folder)
                effects = block_effects(graph, parts, batches, seed=seed, refit=repair in FITTING) if parts else []
                left = list(zip(parts, effects, strict=True))
                table = Allocator(graph, found, round_to=round_to, most=most, costs={"latency": timing.shares}, blocks=left)
                ranking = found.ranking
            except FxPruneError as error:
                if tabled != "may" or isinstance(error, FileError):  # what lies in the folder is to be looked at, not passed over
                    raise
                warnings.warn(f"the search begins without an error table: {error}", PruningWarning, stacklevel=2)
        if ranking is None:
            ranking = scores(graph, "reconstruction", batches, seed, function)
        candidates = Candidates(graph, ranking, round_to, parts)
    own = {name: _OwnCost(name, cost, graph.model, measured) for name, cost in (own_costs or {}).items()}
    allowed = limits(graph, most)

    clock = _Clock(candidates, timing)
    channels, fixed = output_channels(graph)
    per_unit = np.array([channels[group.name] for group in groups] + [0 for _ in parts], dtype=np.int64)
    repairer = Repairer(graph, batches or (), repair if batches else "none", reference)

    def fewer(halvings: int) -> Repairer:
        held = (batches or [])[: -(-len(batches or []) // 2**halvings)]
        return Repairer(graph, held, repair if held else "none", reference)

    problem = Problem(
        names=candidates.names,
        units=candidates.units,
        channels=per_unit,
        cost=lambda removed: CandidateCosts(candidates, removed, clock.predicted, own),
        score=Score(candidates, evaluate, repairer),
        rough=None if rough is None else Score(candidates, rough, repairer),
        rungs=[Score(candidates, one, fewer(len(rungs) - i)) for i, one in enumerate(rungs)],
        fixed_channels=fixed,
        unit_scores=[np.sort(candidates.ranking[group.name]) for group in groups] + [np.zeros(2) for _ in parts],
        blocks=len(parts),
        rounding=candidates.rounded if round_to > 1 else None,
        grain=round_to,
        table=table,
        tried=None if table is None else _Tried(table, batches or [], repair, seed),
        measured=measured,
        clock=clock,
        most=np.array([allowed.get(g.name, g.size - g.least) for g in groups] + [1 for _ in parts], dtype=np.int64) if allowed else None,
    )
    return problem, candidates


def _tabled(
    graph: CouplingGraph, batches: Sequence[Any], ranking: Mapping[str, Any] | None, repair: Any, seed: int, folder: Path | None
) -> ErrorTable:
    """The error table, from ``folder`` where it is there."""

    def made() -> ErrorTable:
        return error_table(graph, batches, ranking=ranking, repair=repair, seed=seed)

    made_by = {"repair": named(repair)[0], "seed": seed}
    return made() if folder is None else kept_table(folder, graph, batches, ranking, made_by, made)
