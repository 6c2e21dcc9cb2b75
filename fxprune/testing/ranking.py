"""What every importance must do, in one call."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.api import analyze
from fxprune.errors import FxPruneError
from fxprune.importance.criteria import Importance, scores
from fxprune.importance.registry import Criterion


def assert_ranks(
    importance: Importance, model: nn.Module, example_inputs: Any, calibration: Any = None, *, seed: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """Rank the units of ``model`` twice and check what fxprune relies on.

    Args:
        importance: a name, a ``fxprune.Criterion``, or a callable ``(group, module) -> scores``.
        model: a network with at least one prunable group.
        example_inputs: a tensor, a tuple or a dict.
        calibration: batches, where the importance needs them.
        seed: for importances that draw at random.

    Returns:
        The scores: group name -> array (units).

    Raises:
        AssertionError: a prunable group has no scores or not one for each unit, a score is not finite, two calls with one seed differ,
            the model was changed, its gradients or modes included, or a criterion that says it needs data does not miss them.
    """
    graph = analyze(model, example_inputs)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    first, second = (dict(scores(graph, importance, calibration, seed)) for _ in range(2))
    wanted = {group.name: group.size for group in graph.groups if group.prunable}
    _require(bool(wanted), "the model has no prunable group; give another")
    _require({name: len(found) for name, found in first.items()} == wanted, f"scores are needed for {wanted}")
    _require(all(np.isfinite(found).all() for found in first.values()), "a score is not finite")
    same = all(np.array_equal(first[name], second[name]) for name in first)
    _require(same, "two calls with the same seed give other scores; draw from data.seed alone")
    after = model.state_dict()
    _require(all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "the model's values were changed")
    _require(modes == [module.training for module in model.modules()], "the model's modes were changed")
    now = [p.grad for p in model.parameters()]
    kept = all((a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)) for a, b in zip(gradients, now, strict=True))
    _require(kept, "the model's gradients were changed; work on a copy")
    _require(torch.equal(generator, torch.get_rng_state()), "torch's random numbers were drawn; use a generator made from data.seed")
    if isinstance(importance, Criterion) and importance.needs_data:
        try:
            scores(graph, importance, None, seed)
        except FxPruneError:
            return first
        raise AssertionError("needs_data is set, and without data it ranked all the same")
    return first


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
