"""``search``: the driver run on a network's problem, and what it found as a policy and a slim module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import fx, nn

from fxprune.api import compress, record
from fxprune.attached import attach
from fxprune.driver import SearchConfig, SearchOutcome, run
from fxprune.errors import SearchError, kind_of
from fxprune.evaluation.batches import alone, inputs_of
from fxprune.evaluation.callers_modes import in_plain_modes
from fxprune.evaluation.synthetic import calibration_batches, without_labels
from fxprune.importance.criteria import importance_name
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.policies import Policy
from fxprune.records import LayerRepair
from fxprune.repair.registry import of_candidates
from fxprune.repair.repairer import Repairer
from fxprune.searching.candidates import Candidates, Evaluate, Score
from fxprune.searching.norms import LR, halves, nearness, recover_norms
from fxprune.searching.problem import graph_for, make_problem, multiple_for
from fxprune.timing.runtimes import Runtime
from fxprune.training.distillation import DistillConfig


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    ``policy``: the sparsity of every group, with the inputs, options and units that give the same pruning again.
    ``model``: the slim module, repaired as the candidates were, and recovered as ``config.recover`` says. ``history``: one record a
    step. ``reward``: of the result. ``evaluations``: candidates scored.
    ``outcome``: everything the driver found, the uniform baseline on the same budget and the points of a Pareto run included.
    """

    policy: Policy
    model: fx.GraphModule
    history: tuple[Mapping[str, Any], ...]
    reward: float
    evaluations: int
    outcome: SearchOutcome = field(repr=False)


@in_plain_modes
def search(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Evaluate,
    *,
    config: SearchConfig | None = None,
    calibration: Iterable[Any] | str | None = None,
    rough: Evaluate | None = None,
    rungs: Sequence[Evaluate] = (),
    checkpoint_dir: Path | str | None = None,
    resume: bool = False,
    on_event: Callable[[Any], None] | None = None,
) -> SearchResult:
    """Find how much to take from which group of ``model`` so that the target of ``config`` is met at the highest reward.

    Args:
        model: a trained model, as for ``compress``. It is not changed.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        evaluate: slim module -> a number, or a mapping of metrics, larger is better; on data held out of training, never the test set.
        config: the options; targets, strategy, reward, repair, budget and seed among them.
        calibration: a few batches, ``(inputs, targets)`` or inputs alone, for the importance and for the repair of candidates and result.
            Without it nothing is repaired, as the record of the result says, and weights alone rank the units. "none": as for ``compress``.
        rough: a cheaper ``evaluate`` that gives the same metrics. With ``config.finalists`` the search goes by it, and only so many of the
            best are judged by ``evaluate`` itself.
        rungs: cheaper ``evaluate``s, the cheapest first, each on half the data of the next, the last on half of what ``evaluate`` takes.
            ``rl-pruner`` then draws more candidates, and one in ``config.halving`` of them passes each rung. Rungs save time within a
            round; ``rough`` replaces the score during the whole search. Both may be given: the last rung is then followed by ``rough``.
        checkpoint_dir: a folder in which the error table and, after every round, the state are kept.
        resume: go on from the state in ``checkpoint_dir``.
        on_event: called with a ``fxprune.driver.Progress`` after every round.

    Returns:
        The policy, the slim module (repaired as the candidates were), the history, the reward and the number of evaluations.

    Raises:
        TargetError: no candidate is on target; ``nearest`` holds the closest.
        SearchError: an option does not fit, or the checkpoint is another search's.
        EvaluationError: ``evaluate`` raised, or gave no finite number.
        TraceError: ``model`` cannot be traced.
    """
    config = SearchConfig() if config is None else config
    if not isinstance(config, SearchConfig):
        raise SearchError(f"config is {kind_of(config)}; pass fxprune.SearchConfig(...), whose fields are the options")
    graph = graph_for(model, example_inputs, config, blocks=config.blocks)
    importance = without_labels(config.importance, calibration, config.repair)
    batches = calibration_batches(calibration, graph.model, example_inputs, seed=config.seed)
    problem, candidates = make_problem(
        graph,
        evaluate,
        calibration=batches,
        importance=importance,
        round_to=multiple_for(graph, config),
        repair=config.repair,
        seed=config.seed,
        rough=rough,
        tabled=config.table,
        rungs=rungs,
        most=config.most,
        loss=config.loss,
        own_costs=config.costs,
        blocks=config.blocks,
        runtime=Runtime(config.runtime, config.threads, config.latency_batch),
        folder=None if checkpoint_dir is None else Path(checkpoint_dir),
    )
    outcome = run(problem, config, checkpoint_dir=checkpoint_dir, resume=resume, on_event=on_event)
    assert isinstance(problem.score, Score)
    repairer = problem.score.repairer
    if repairer.batches and of_candidates(config.repair) != config.repair:
        repairer = Repairer(graph, repairer.batches, config.repair)
    found = result_of(outcome, candidates, config, repairer)
    if config.recover == "norms" and repairer.batches:
        fit, held = halves(alone([inputs_of(batch, graph.inputs) for batch in repairer.batches]))
        near = nearness(graph.model, held)
        training = DistillConfig(epochs=config.recover_epochs, lr=LR, device=str(repairer.device), seed=config.seed, validate=near)
        recover_norms(found.model, graph.model, fit, training)
        made = record(found.model)
        said = f"norms and biases were trained for {config.recover_epochs} epochs of the calibration data after the repair"
        attach(found.model, replace(made, notes=(*made.notes, said)))
    return found


class Repairing(Protocol):
    """What repairs slim networks: a ``Repairer``, or one whose repairs are kept. ``layers``: what it did to each layer of the last one."""

    kind: str
    layers: dict[str, LayerRepair]

    def __call__(self, slim: nn.Module, slimmer: Slimmer) -> tuple[str, ...]:
        """Repair ``slim`` in place; returns notes for the record."""


def repair_result(slim: fx.GraphModule, removed: Any, candidates: Candidates, repairer: Repairing) -> fx.GraphModule:
    """``slim``, what is left without the units ``removed``, repaired in place as its record then says."""
    notes = repairer(slim, candidates.slimmer(removed))
    attach(slim, record(slim).with_repair(repairer.kind, notes, repairer.layers))
    return slim


def result_of(outcome: SearchOutcome, candidates: Candidates, config: SearchConfig, repairer: Repairing) -> SearchResult:
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
    slim = repair_result(compress(candidates.graph, policy), outcome.removed, candidates, repairer)
    return SearchResult(policy, slim, outcome.history, outcome.reward, outcome.evaluations, outcome)
