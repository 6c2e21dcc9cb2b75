"""Gradients of a loss on calibration data, for importances that need them; and which loss that is where the user gives none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import EvaluationError, InputError
from fxprune.evaluation.batches import split
from fxprune.evaluation.copying import copied
from fxprune.evaluation.repeatable import cloned, same_random_numbers
from fxprune.evaluation.running import call, device_of, set_training, to_device

Loss = Callable[[Any, Any], Tensor]
WAYS = (
    "pass loss=f, where f(output, batch) gives a scalar tensor; or make batches pairs (inputs, class indices) and the output class scores; "
    'or use an importance that needs no loss, such as importance="l2"'
)


def gradients(model: nn.Module, calibration: Iterable[Any], loss: Loss | None = None, form: Any = None) -> dict[str, tuple[Tensor, Tensor]]:
    """(weight, gradient) of every parameter, the gradient of the loss averaged over ``calibration``.

    Args:
        model: it, the batches and the random generators are not touched: a copy runs, in evaluation mode, on copies of the inputs.
        calibration: batches, each ``(inputs, targets)`` or inputs alone, as a tensor, a tuple of positional or a dict of keyword inputs.
        loss: ``f(output, batch) -> scalar``. None: the loss that a network itself returns (``output.loss``), else cross-entropy with
            integer targets that fit the output's class scores, with the network's own decisions where there are no targets, or mean
            squared error with floating targets of the output's shape.
        form: the recorded form of the example inputs (``fxprune.example_inputs.describe``), which tells inputs from targets.

    Raises:
        InputError: there are no batches, or output and batch leave in doubt which loss is meant.
        EvaluationError: the loss is not a finite scalar.
    """
    twin = copied(model)
    set_training(twin, False)
    for p in twin.parameters():
        p.requires_grad_(True)
    device, batches = device_of(twin), 0
    with same_random_numbers(), torch.enable_grad():
        for batch in calibration:
            inputs, targets = split(batch, form)
            output = call(twin, cloned(to_device(inputs, device)))
            value = loss(output, to_device(batch, device)) if loss is not None else _loss(output, to_device(targets, device), batch)
            _checked(value, batches, loss is not None).backward()
            batches += 1
    if not batches:
        raise InputError("the calibration set is empty; pass at least one batch")
    return {n: (p.detach(), torch.zeros_like(p) if p.grad is None else p.grad / batches) for n, p in twin.named_parameters()}


def _checked(value: Any, number: int, own: bool) -> Tensor:
    whose = "your loss" if own else "the calibration loss"
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise EvaluationError(f"{whose} gave {what} on batch {number}; it must be a scalar tensor computed from the output")
    if not torch.isfinite(value):
        raise EvaluationError(f"{whose} is {value.item()} on batch {number}; check the calibration data and the model's weights")
    return value.reshape(())


def _loss(output: Any, targets: Any, batch: Any) -> Tensor:
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1 and own.requires_grad:
        return own
    scores = _scores(output)
    if targets is None:
        if scores.ndim < 2 or not scores.is_floating_point():
            raise _doubt(output, "no targets")
        return F.cross_entropy(scores, scores.argmax(1))
    if not isinstance(targets, Tensor):
        raise _doubt(output, f"targets that are a {type(targets).__name__}")
    if not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool:
        fits = scores.ndim > 1 and targets.shape == (scores.shape[0], *scores.shape[2:])
        inside = fits and bool(((targets < scores.shape[1]) & (targets >= 0) | (targets == -100)).all())
        if fits and inside:
            return F.cross_entropy(scores, targets.long())
    elif targets.is_floating_point() and targets.shape == scores.shape and not bool(((targets == 0) | (targets == 1)).all()):
        return F.mse_loss(scores, targets)
    raise _doubt(output, f"targets of shape {tuple(targets.shape)} and {targets.dtype}")


def _scores(output: Any) -> Tensor:
    """The class scores where there is no doubt which tensor they are: the only one, or the one named "logits" or "out"."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    values = list(output.values()) if isinstance(output, Mapping) else list(output) if isinstance(output, (tuple, list)) else []
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) == 1 and len(values) == 1:
        return tensors[0]
    raise _doubt(output, "a batch")


def _doubt(output: Any, what: str) -> InputError:
    if isinstance(output, Tensor):
        given = f"a tensor of shape {tuple(output.shape)}"
    elif isinstance(output, Mapping):
        given = f"a {type(output).__name__} of {', '.join(map(repr, output))}"
    else:
        given = f"a {type(output).__name__}" + (f" of {len(output)}" if isinstance(output, (tuple, list)) else "")
    return InputError(f"it is not clear which loss ranks the channels: the network gives {given} for {what}; {WAYS}")
