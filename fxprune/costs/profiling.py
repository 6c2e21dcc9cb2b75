"""What a network costs: multiply-accumulates, parameters, activation memory, and its measured latency.

The counts come from one run of a copy without storage (the meta device), operation by operation, so they take little time and next to
no memory, and the user's module is never touched.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxprune.costs.counting import Counts, count
from fxprune.errors import FxPruneError, InputError, first_line
from fxprune.evaluation.copying import copied
from fxprune.evaluation.running import call, device_of, evaluating, to_device
from fxprune.example_inputs import build, describe
from fxprune.passes.compat import tree_leaves
from fxprune.records import Profile

_WARM_UP_CALLS = 3
# What a forward pass raises that asks a meta tensor for its values, or meets an operation that has no meta kernel.
_NEEDS_VALUES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


def profile(model: nn.Module, example_inputs: Any) -> Profile:
    """Count what one call of ``model`` costs in evaluation mode.

    Multiply-accumulates are those of convolutions, linears and matrix products, attention's and recurrent layers' included, however they
    are written; biases, norms and activations are not counted. They stand under the module that owns the weight or, where two activations
    are multiplied, the innermost module that runs then. Activation memory is that of the tensors which operations make, views counted once,
    the inputs left out, each freed as soon as nothing refers to it.

    Args:
        model: any module, on any device. On the meta device it has no latency. One whose forward pass depends on values is run on a real
            copy instead.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs, with any batch size.

    Returns:
        The costs of one call with these inputs: numbers of multiply-accumulates and parameters, bytes, and ``latency()`` in seconds.

    Raises:
        InputError: the model does not run on the example inputs.
    """
    counts = _counted(model, example_inputs)
    params: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        params[name] = sum(p.numel() for p in own)
    return Profile(
        macs=sum(counts.macs.values()),
        params=sum(params.values()),
        param_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        peak_activation_bytes=counts.peak_bytes,
        per_layer=_per_layer(counts, params),
        timer=_timer(model, example_inputs),
    )


def _per_layer(counts: Counts, params: dict[str, int]) -> dict[str, dict[str, int]]:
    """In the order of the modules, those that cost something; what else owns products, as a graph without its modules, comes last."""
    names = [*params, *(name for name in counts.macs if name not in params)]
    layers = {name: {"macs": counts.macs[name], "params": params.get(name, 0)} for name in names}
    return {name: layer for name, layer in layers.items() if any(layer.values())}


def _counted(model: nn.Module, example_inputs: Any) -> Counts:
    device = device_of(model)
    try:
        with torch.device("meta"):  # also for the tensors that forward makes itself
            return count(_meta_copy(model), to_device(example_inputs, "meta"))
    except InputError:
        raise
    except _NEEDS_VALUES as error:
        if device.type == "meta":
            raise InputError(f"the model does not run on the example inputs without its weights: {first_line(error)}") from error
    try:
        return count(copied(model), to_device(_with_values(example_inputs), device))
    except _NEEDS_VALUES as error:
        raise InputError(f"the model does not run on the example inputs: {first_line(error)}; check their shapes and types") from error


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy in which every tensor that a module holds is on the meta device, shared ones still shared."""
    twins: dict[int, Any] = {}
    for module in model.modules():
        for holder in (module._parameters, module._buffers, module.__dict__):
            for tensor in holder.values():
                if isinstance(tensor, torch.Tensor):
                    twins.setdefault(id(tensor), _meta_twin(tensor))
    return copied(model, twins)


def _meta_twin(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_like(tensor.detach(), device="meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _with_values(example_inputs: Any) -> Any:
    """``example_inputs``, or random ones of their form if they lie on the meta device."""
    on_meta = any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves(example_inputs))
    return build(describe(example_inputs)) if on_meta else example_inputs


def _timer(model: nn.Module, example_inputs: Any) -> Callable[[int], float]:
    def median_seconds(runs: int) -> float:
        device = device_of(model)
        if device.type == "meta":
            raise FxPruneError("the model lies on the meta device and cannot be timed; load its weights first")
        if runs < 1:
            raise InputError(f"latency over {runs} runs; at least one is needed")
        inputs = to_device(_with_values(example_inputs), device)
        with evaluating(model):
            for _ in range(_WARM_UP_CALLS):
                call(model, inputs)
            return statistics.median(_seconds(model, inputs, device) for _ in range(runs))

    return median_seconds


def _seconds(model: nn.Module, inputs: Any, device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    call(model, inputs)
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
