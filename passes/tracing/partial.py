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
from fxprune.evaluation.running import set_training
from fxprune.example_inputs import call_form
from fxprune.passes.ir.nested import tensors
from fxprune.passes.ir.notes import Note, NoteKind
from fxprune.passes.ir.skeleton import Skeleton
from fxprune.passes.ir.traced import TracedModel
from fxprune.passes.rules.layer_specs import has_sizes
from fxprune.passes.tracing.guard.untouched import Unwritten
from fxprune.passes.tracing.meta_execution import to_meta
from fxprune.passes.tracing.modes import add_traced

Call = tuple[tuple[Any, ...], dict[str, Any]]
Calls = dict[str, tuple[Call, torch.device | None]]
Callers = dict[str, list[frozenset[str]]]


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
    seen: set[nn.Module] = set()
    while todo:
        path, module = todo.pop()
        if module in seen or not any(True for _ in module.parameters()):
            continue
        seen.add(module)
        own = path in calls and all(path in stack for inner in _changing(module, path) for stack in callers.get(inner, ()))
        if own and not is_known(module):
            try:
                add_traced(traced, path, calls[path][0], is_known, has_rule, calls[path][1])
                traced.parts.append(path)
                continue
            except TraceError:
                pass  # its children may still be traced
        todo += [(f"{path}.{name}", child) for name, child in reversed(list(module.named_children()))]
    road = _road(model, example_inputs)
    if not traced.parts:
        raise TraceError(f"{cause}{road}") from cause
    parts = ", ".join(traced.parts)
    text = f"the root could not be traced ({cause}); pruned are its parts {parts}, with their inputs and outputs kept{road}"
    traced.notes = (Note(NoteKind.PARTS, text), *traced.notes)
    return traced


def _road(model: nn.Module, example: Any) -> str:
    """What else to try: torch.export follows code that a symbolic trace cannot."""
    if isinstance(model, fx.GraphModule):
        return ""
    inputs = "(), example" if isinstance(example, Mapping) else "example" if isinstance(example, (tuple, list)) else "(example,)"
    return f"; torch.export may take it whole: fxprune.compress(torch.export.export(model, {inputs}).module(), ...)"


def _changing(module: nn.Module, path: str) -> list[str]:
    """What may come out of a pruning changed: the submodules of ``module`` that hold tensors or sizes, themselves or within."""
    inner = [(p, m) for p, m in module.named_modules(prefix=path, remove_duplicate=False) if m is not module]
    return [p for p, m in inner if any(True for _ in (*m.parameters(), *m.buffers())) or any(map(has_sizes, m.modules()))]


def _watched(model: nn.Module, example_inputs: Any) -> tuple[Calls, Callers]:
    """For every submodule: what its first call was given (on the meta device, and where it was), and for every call which modules ran.

    The copy that runs shares the weights, unless its code writes into them.
    """
    guard = Unwritten(model)
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter}
    try:
        with guard:
            found = _run(copy.deepcopy(model, shared), example_inputs)
        if not guard.written:
            return found
    except Exception:  # noqa: BLE001 - the guard's, wrapped maybe; or the user's, and then it comes again
        pass
    return _run(copy.deepcopy(model), example_inputs)


def _run(twin: nn.Module, example_inputs: Any) -> tuple[Calls, Callers]:
    set_training(twin, False)
    calls: Calls = {}
    callers: Callers = {}
    stack: list[nn.Module] = []
    names: dict[nn.Module, list[str]] = {}
    for name, module in twin.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        running = frozenset(name for outer in stack for name in names[outer])
        for name in names[module]:
            if name not in calls:
                calls[name] = to_meta((args, kwargs)), next((t.device for t in tensors((args, kwargs))), None)
            callers.setdefault(name, []).append(running)
        stack.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    for module in names:
        if module is not twin:
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave)
    args, kwargs = call_form(example_inputs)
    with torch.no_grad():
        twin(*args, **kwargs)
    return calls, callers
