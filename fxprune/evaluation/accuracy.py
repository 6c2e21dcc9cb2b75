"""Running a network without changing it: modes, devices, accuracy, and the one exception, BatchNorm re-estimated."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from fxprune.errors import EvaluationError, InputError
from fxprune.example_inputs import call_form


def set_training(model: nn.Module, training: bool) -> None:
    """``model.train(training)``, except for a module of ``torch.export``: it has the one mode it was exported in, and says so."""
    try:
        model.train(training)
    except NotImplementedError:
        if "train" not in model.__dict__:  # what torch.export puts there; a refusal of the user's own is the user's to see
            raise


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """On leaving, every module is again in the mode, training or evaluation, that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:  # parents come before their children, whose own mode has the last word
            set_training(module, training)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients, for the length of the block."""
    with modes_kept(model), torch.no_grad():
        set_training(model, False)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for linear algebra in the block: its results differ in bits between one thread and two, and small ones are faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a module that has none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def to_device(values: Any, device: torch.device | str) -> Any:
    """``values``, any nest of tuples, lists and dicts, on ``device``; what a loader pinned goes to a GPU without a wait."""
    no_wait = torch.device(device).type == "cuda"  # the other way a tensor could be read before it is there
    return tree_map_only(Tensor, lambda t: t.to(device, non_blocking=no_wait), values)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with a tensor, a tuple of positional inputs or a dict of keyword inputs."""
    args, kwargs = call_form(inputs)
    return model(*args, **kwargs)


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


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of every BatchNorm by their plain average over ``batches``, in place.

    ``batches`` give (inputs, labels) or inputs alone. Everything else runs as in evaluation; modes and momenta come back as they
    were, and so do the statistics if a batch fails. A pruned network needs it: the old statistics describe activations that
    summed over more channels (Li 2020, EagleEye, https://arxiv.org/abs/2007.02491, sec. 3.3; there with momentum, here the exact mean).
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    before = [{name: buffer.clone() for name, buffer in m.named_buffers()} for m in norms]
    momenta = [m.momentum for m in norms]
    device = device_of(model)
    seen = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
            for batch in batches:
                inputs = labelled(batch)[0] if isinstance(batch, (tuple, list)) else batch
                call(model, to_device(inputs, device))
                seen += 1
    except BaseException:
        _restore(norms, before)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not seen:
        _restore(norms, before)
        raise InputError("there is no calibration batch to re-estimate BatchNorm from")


def _restore(norms: list[_BatchNorm], buffers: list[dict[str, Tensor]]) -> None:
    for norm, values in zip(norms, buffers, strict=True):
        norm.load_state_dict(values, strict=False)
