"""How good a network is on labelled batches, and BatchNorm re-estimated on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import EvaluationError, InputError
from fxprune.evaluation.batches import inputs_of
from fxprune.evaluation.running import call, device_of, evaluating, to_device
from fxprune.passes.compat import BatchNormBase


def logits_of(output: Any) -> Tensor:
    """The class scores in a network's output, of shape (batch, classes, ...).

    A tensor itself; of a named tuple, mapping or dataclass its ``logits`` or ``out``; otherwise the first tensor. What auxiliary
    heads add, as GoogLeNet's in training mode, is left out.
    """
    found = output
    for name in ("logits", "out"):
        if isinstance(output, Mapping) and name in output:
            found = output[name]
            break
        if not isinstance(output, (Tensor, Mapping)) and hasattr(output, name):
            found = getattr(output, name)
            break
    if isinstance(found, Mapping):
        found = tuple(found.values())
    if isinstance(found, (tuple, list)):
        found = next((value for value in found if isinstance(value, Tensor)), None)
    if not isinstance(found, Tensor):
        raise EvaluationError(f"the network's output is a {type(output).__name__} without a tensor of class scores")
    return found


def labelled(batch: Any) -> tuple[Any, Tensor]:
    """The two parts of a batch, inputs and labels; raises ``InputError`` saying what came instead."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) else type(batch).__name__
    raise InputError(f"a batch is a {what}; it must be a pair (inputs, labels)")


def evaluate_accuracy(model: nn.Module, batches: Iterable[Any], device: torch.device | str | None = None) -> float:
    """Top-1 accuracy, 0 to 1, over ``batches`` of (inputs, labels), in evaluation mode; the model is left in the mode it was in.

    ``device``: where the model lies, unless said otherwise; inputs are moved there.
    """
    device = device_of(model) if device is None else device
    right = torch.zeros((), dtype=torch.int64, device=device)
    total = 0
    with evaluating(model):
        for batch in batches:
            inputs, labels = labelled(to_device(batch, device))
            right += (logits_of(call(model, inputs)).argmax(1) == labels).sum()
            total += labels.numel()
    if total == 0:
        raise InputError("there is no batch to evaluate on")
    return int(right) / total


SINGLE = "more than 1 value per channel"  # what BatchNorm asks for in training


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any], form: Any = None) -> bool:
    """Replace the running statistics of every BatchNorm by their plain average over ``batches``, in place.

    ``batches`` give (inputs, labels) or inputs alone; ``form`` as in ``fxprune.evaluation.batches``. Everything else runs as in evaluation;
    modes and momenta come back as they were, and so do the statistics if a batch fails. A pruned network needs it: the old statistics
    describe activations that summed over more channels (Li 2020, EagleEye, https://arxiv.org/abs/2007.02491, sec. 3.3; there with
    momentum, here the exact mean). Returns False where nothing was done, since no batch has the two values a channel that it takes.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNormBase) and m.running_mean is not None]
    if not norms:
        return True
    before = [{name: buffer.clone() for name, buffer in m.named_buffers()} for m in norms]
    momenta = [m.momentum for m in norms]
    device = device_of(model)
    seen, single = 0, False
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
            for batch in batches:
                try:
                    call(model, to_device(inputs_of(batch, form), device))
                except ValueError as error:
                    if SINGLE not in str(error):
                        raise
                    single = True  # the last batch of a loader may be one sample
                    continue
                seen += 1
    except BaseException:
        _restore(norms, before)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not seen:
        _restore(norms, before)
        if single:
            return False
        raise InputError("there is no calibration batch to re-estimate BatchNorm from")
    return True


def _restore(norms: list[BatchNormBase], buffers: list[dict[str, Tensor]]) -> None:
    for norm, values in zip(norms, buffers, strict=True):
        norm.load_state_dict(values, strict=False)
