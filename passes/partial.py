"""Networks whose root cannot be traced: the largest submodules that can are, each with its interface pinned.

What a submodule is called with is seen by running a copy of the model once on the example inputs. A submodule is taken only if nothing
outside it calls into it, since what is inside will change shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import InputError, TraceError
from fxprune.evaluation import set_training
from fxprune.inputs import call_form
from fxprune.passes.skeleton import Skeleton
from fxprune.passes.trace import TracedModel, add_traced

Call = tuple[tuple[Any, ...], dict[str, Any]]


def trace_parts(
    model: nn.Module, example_inputs: Any, is_known: Callable[[nn.Module], bool], has_rule: Callable[[Any], bool], cause: TraceError
) -> TracedModel:
    """Trace the largest traceable submodules of ``model``. ``example_inputs`` must hold values: the model is run on them.

    Raises the root's error, ``cause``, with another road to try, where no submodule can be traced.
    """
    try:
        calls, callers = _watched(model, example_inputs)
    except Exception as error:  # the user's model, on the user's inputs
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the model itself fails on the example inputs: {first} ({cause})") from error
    traced = TracedModel(Skeleton(model, is_known), {}, {}, parts=[])
    todo = [(name, module) for name, module in reversed(list(model.named_children()))]
    while todo:
        path, module = todo.pop()
        if not any(True for _ in module.parameters()):
            continue
        own = path in calls and all(path in stack for inner in _inside(callers, path) for stack in callers[inner])
        if own and not is_known(module):
            try:
                add_traced(traced, path, calls[path], is_known, has_rule)
                traced.parts.append(path)
                continue
            except TraceError:
                pass  # its children may still be traced
        todo += [(f"{path}.{name}", child) for name, child in reversed(list(module.named_children()))]
    road = _road(model, example_inputs)
    if not traced.parts:
        raise TraceError(f"{cause}{road}") from cause
    parts = ", ".join(traced.parts)
    traced.notes = (
        f"the root could not be traced ({cause}); pruned are its parts {parts}, with their inputs and outputs kept{road}",
        *traced.notes,
    )
    return traced


def _road(model: nn.Module, example: Any) -> str:
    """What else to try: torch.export follows code that a symbolic trace cannot."""
    if isinstance(model, fx.GraphModule):
        return ""
    inputs = "(), example" if isinstance(example, Mapping) else "example" if isinstance(example, (tuple, list)) else "(example,)"
    return f"; torch.export may take it whole: fxprune.compress(torch.export.export(model, {inputs}).module(), ...)"


def _inside(callers: dict[str, list[frozenset[str]]], path: str) -> list[str]:
    return [p for p in callers if p.startswith(f"{path}.")]


def _watched(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Call], dict[str, list[frozenset[str]]]]:
    """For every submodule: what its first call was given, and for every call which modules were running."""
    twin = copy.deepcopy(model)
    set_training(twin, False)
    calls: dict[str, Call] = {}
    callers: dict[str, list[frozenset[str]]] = {}
    stack: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(name, (args, kwargs))
            callers.setdefault(name, []).append(frozenset(stack))
            stack.append(name)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    for name, module in twin.named_modules():
        if name:
            module.register_forward_pre_hook(enter(name), with_kwargs=True)
            module.register_forward_hook(leave)
    args, kwargs = call_form(example_inputs)
    with torch.no_grad():
        twin(*args, **kwargs)
    return calls, callers
