"""Run a network without changing it: modes, threads, devices, and the form of its inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.example_inputs import call_form
from fxprune.passes.compat import tree_map_only


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
    """``values``, any nest of tuples, lists and dicts, on ``device``; what a loader pinned goes to a GPU without a wait.

    Tensors that were made in inference mode are copied, since autograd refuses them.
    """
    no_wait = torch.device(device).type == "cuda"  # the other way a tensor could be read before it is there

    def moved(tensor: Tensor) -> Tensor:
        found = tensor.to(device, non_blocking=no_wait)
        return found.clone() if found.is_inference() and not torch.is_inference_mode_enabled() else found

    return tree_map_only(Tensor, moved, values)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with a tensor, a tuple of positional inputs or a dict of keyword inputs."""
    args, kwargs = call_form(inputs)
    return model(*args, **kwargs)
