"""Prune a little, recover a little: the same pruning in several steps, each followed by a recovery (Han 2015, Wang 2024 sec. 3.5)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fxprune.api import analyze, compress
from fxprune.errors import InputError
from fxprune.evaluation.callers_modes import in_plain_modes
from fxprune.evaluation.copying import copied
from fxprune.evaluation.synthetic import calibration_batches, without_labels
from fxprune.importance.criteria import Importance, importance_name, resolved, scores
from fxprune.passes.planning.naming import sparsities
from fxprune.policies import Policy, units_removed
from fxprune.searching.candidates import Candidates
from fxprune.searching.recovery import put_back


@dataclass(frozen=True)
class Shrunk:
    """``model``: the slim module after its last recovery. ``history``: one record a step: ``step``, ``share`` of the policy, ``macs`` and
    ``params`` left as shares of the original, ``prune_seconds``, ``recover_seconds``, and ``recovery``, what recover returned."""

    model: nn.Module
    history: tuple[Mapping[str, Any], ...]

    @property
    def seconds(self) -> float:
        """What all of it took."""
        return float(sum(step["prune_seconds"] + step["recover_seconds"] for step in self.history))


@in_plain_modes
def shrink(
    model: nn.Module,
    policy: Policy | float | Mapping[str, float],
    recover: Callable[[nn.Module], Any],
    example_inputs: Any,
    *,
    steps: int = 4,
    importance: Importance = "auto",
    calibration: Iterable[Any] | str | None = None,
    round_to: int = 1,
    ignore: Iterable[Any] = (),
    attention: str = "auto",
    repair: Any = "none",
) -> Shrunk:
    """Prune ``model`` in ``steps`` equal shares of the units, and call ``recover`` on the slim module after each.

    Each step ranks and slices the weights as the last ``recover`` left them; removed units never come back. One step is one-shot pruning.

    Args:
        model: a trained model, as for ``compress``. It is not changed, so that it can be the teacher.
        policy: a ``Policy``, one sparsity for every group, or a mapping from group name to sparsity.
        recover: trains the slim module that it is given in place, for example by ``fxprune.distill(slim, model, loader)``. What it returns
            is kept in the history.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        steps: how many steps, at least one.
        importance: as for ``compress``; the units are ranked again before each step.
        calibration: as for ``compress``.
        round_to: as for ``compress``.
        ignore: as for ``compress``.
        attention: as for ``compress``.
        repair: as for ``compress``; made before each call of ``recover``.

    Returns:
        The slim module after its last recovery, whose record is in terms of ``model``, and the history of the steps.

    Raises:
        InputError: fewer than one step, and for arguments that do not fit, as in ``compress``.
        PolicyError: the policy names what is not there.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; it must be at least 1")
    importance = without_labels(importance, calibration, repair)
    batches = calibration_batches(calibration, model, example_inputs)
    working = copied(model)
    graph = analyze(working, example_inputs, ignore=_names(model, ignore), attention=attention)
    wanted = sparsities(graph, policy.sparsity if isinstance(policy, Policy) else policy)
    costs = Candidates(graph, {}, round_to)
    gone = {group.name: np.zeros(group.size, dtype=bool) for group in costs.groups}
    slim: nn.Module = working
    history: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        begun = time.perf_counter()
        found = scores(graph, resolved(importance), batches)
        ranking = {name: np.where(gone[name], -np.inf, np.asarray(one, dtype=float)) for name, one in found.items()}
        candidates = Candidates(graph, ranking, round_to)
        removed = [units_removed(wanted.get(group.name, 0.0) * step / steps, group.size) for group in candidates.groups]
        keep = candidates.keep(removed)
        for group in candidates.groups:
            gone[group.name] = ~keep[graph.starts[group.number] : graph.starts[group.number + 1]]
        chosen = candidates.policy(removed, {"steps": steps}, importance_name(importance))
        slim = compress(graph, chosen, calibration=batches, repair=repair)
        pruned = time.perf_counter()
        recovery = recover(slim)
        history.append(
            {
                "step": step,
                "share": step / steps,
                "macs": candidates.share("macs", removed),
                "params": candidates.share("params", removed),
                "prune_seconds": pruned - begun,
                "recover_seconds": time.perf_counter() - pruned,
                "recovery": recovery,
            }
        )
        if step < steps:
            put_back(working, slim)
    return Shrunk(slim, tuple(history))


def _names(model: nn.Module, ignore: Iterable[Any]) -> list[Any]:
    """``ignore`` with modules by their names, which the copy has too."""
    names = {module: name for name, module in model.named_modules()}
    return [names.get(item, item) if isinstance(item, nn.Module) else item for item in ignore]
