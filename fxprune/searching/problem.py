"""An analysed network as the driver's problem: numbers and functions, no network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import nn

from fxprune.costs.profiling import profile
from fxprune.driver import Problem
from fxprune.evaluation.running import device_of, one_thread
from fxprune.example_inputs import build
from fxprune.importance.criteria import scores
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.reasons import ReasonKind
from fxprune.repair.repairer import Repairer, checked
from fxprune.searching.candidates import CandidateCosts, Candidates, Evaluate, Score


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
        cost=lambda removed: CandidateCosts(candidates, removed, share),
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
