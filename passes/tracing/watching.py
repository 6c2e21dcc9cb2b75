"""A model run once on the example: what its submodules are called with, and which code reads what they hold.

A submodule can be traced by itself, and change inside, where nothing outside of it calls into it or reads what changes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxprune.evaluation.copying import copied
from fxprune.evaluation.repeatable import cloned, same_random_numbers
from fxprune.evaluation.running import set_training
from fxprune.example_inputs import call_form
from fxprune.passes.ir.nested import tensors
from fxprune.passes.ir.skeleton import at_or_below, below
from fxprune.passes.ir.traced import PartCall
from fxprune.passes.rules.layer_specs import has_sizes
from fxprune.passes.tracing.guard.untouched import Unwritten
from fxprune.passes.tracing.meta_execution import to_meta
from fxprune.passes.tracing.side_effects.isolation import ALONE

Stack = frozenset[str]

# What code may ask of a weight that loses channels without meeting them.
_SAFE: frozenset[Any] = frozenset(
    {
        *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "layout", "requires_grad", "ndim", "is_cuda", "is_meta")),
        *(getattr(torch.Tensor, name).__get__ for name in ("is_leaf", "grad", "itemsize")),
        *(torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.dim, torch.is_floating_point, torch.is_complex),
    }
)


Form = dict[str, Any]
_GIVEN, _OMITTED = object(), object()


@dataclass
class Watched:
    """``calls``: submodule -> the largest of its calls, if it was called. ``callers``: submodule -> for every call which modules ran.
    ``readers``: parameter, buffer, or layer with sizes -> for every read of it which modules ran. ``aliases``: each of these -> all of its
    names. ``swapped``: modules that were called with other parameters than their own (``torch.func.functional_call``). ``forms``: which
    arguments a submodule was called with, and those of them that a graph has one form for; ``unlike``: where two calls differ in one."""

    calls: dict[str, PartCall] = field(default_factory=dict)
    callers: dict[str, list[Stack]] = field(default_factory=dict)
    readers: dict[str, set[Stack]] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    swapped: set[str] = field(default_factory=set)
    forms: dict[str, Form] = field(default_factory=dict)
    unlike: dict[str, str] = field(default_factory=dict)

    def unfit(self, path: str, module: nn.Module) -> str:
        """Why the submodule at ``path`` cannot be a part; empty where it can."""
        if path not in self.calls:
            return "it was not called on the example"
        for inner in _changing(module, path):
            if any(path not in stack for stack in self.callers.get(inner, ())):
                return "code outside of it calls what is in it"
        held = [name for name, _ in (*_named(module, path), *_sized(module, path))]
        if any(self._foreign(path, name) for name in held):
            return "code outside of it reads its weights or sizes"
        if path in self.unlike:
            return f"it is called with and without its argument {self.unlike[path]!r}, or with different ones that its code may ask about"
        if any(at_or_below(name, path) for name in self.swapped):
            return "code calls it with other parameters in place of its own"
        return ""

    def _foreign(self, path: str, name: str) -> bool:
        """Whether code reads ``name``, which ``path`` holds, that is neither in ``path`` nor in another module which holds it too."""
        homes = {one.rpartition(".")[0] for one in self.aliases.get(name, ()) if not below(one, path)}
        return any(path not in stack and not homes & stack and not ("" in homes and not stack) for stack in self.readers.get(name, ()))


def _form(module: nn.Module, args: Any, kwargs: Any) -> Form:
    """The arguments of a call: None, flags and texts as they are, which code asks about; of others that they are there."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # no signature, or hooks see to it
        bound = {**{str(i): one for i, one in enumerate(args)}, **kwargs}
    return {name: one if one is None or type(one) in (bool, str) else _GIVEN for name, one in bound.items()}


def watched(model: nn.Module, example_inputs: Any) -> Watched:
    """Run a copy of ``model`` in evaluation mode and then, for what else reads what submodules hold, in training mode. The copy shares the
    weights, unless the model's code writes into them."""
    guard = Unwritten(model)
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter}
    try:
        with guard:
            found = _run(copied(model, shared), example_inputs)
        if not guard.written:
            return found
    except Exception:  # noqa: BLE001 - the guard's, wrapped maybe; or the user's, and then it comes again
        pass
    return _run(copied(model), example_inputs)


def _run(twin: nn.Module, example_inputs: Any) -> Watched:
    set_training(twin, False)
    training = False
    seen, stack = Watched(), list[nn.Module]()
    sizes: dict[str, int] = {}
    totals: dict[str, int] = {}
    names: dict[nn.Module, list[str]] = {}
    for name, module in twin.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    def running() -> Stack:
        return frozenset(name for outer in stack for name in names.get(outer, ()))  # code may copy modules, and call the copies

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = tensors((args, kwargs))
        size = sum(t.numel() for t in given)
        of = names.get(module, [])
        for name in of if not training else ():
            totals[name] = totals.get(name, 0) + size
            if name not in sizes or size > sizes[name]:
                sizes[name] = size
                made = to_meta((args, kwargs))
                seen.calls[name] = PartCall(made[0], made[1], next((t.device for t in given), None))
        form = _form(module, args, kwargs)
        for name in of:
            before = seen.forms.setdefault(name, form)
            differs = next((key for key in {**before, **form} if before.get(key, _OMITTED) != form.get(key, _OMITTED)), None)
            if differs is not None:
                seen.unlike.setdefault(name, differs)
            seen.callers.setdefault(name, []).append(running())
            seen.swapped.update(name for one in module._parameters.values() if one is not None and id(one) not in held)
        stack.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    def read(of: list[str]) -> None:
        now = running()
        for name in of:
            seen.readers.setdefault(name, set()).add(now)

    for module in names:
        if module is not twin:
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, always_call=True)
    held: dict[int, list[str]] = {}
    for name, tensor in _named(twin, ""):
        held.setdefault(id(tensor), []).append(name)
    sized: dict[int, list[str]] = {}
    for name, module in _sized(twin, ""):
        sized.setdefault(id(module), []).append(name)
    seen.aliases = {name: of for of in (*held.values(), *sized.values()) for name in of}
    with ALONE, _sizes_watched(sized, read), _Weights(held, read), same_random_numbers(), torch.no_grad():
        args, kwargs = call_form(cloned(example_inputs))
        twin(*args, **kwargs)
        training = True
        set_training(twin, True)
        with contextlib.suppress(Exception):  # many models take other inputs in training
            args, kwargs = call_form(cloned(example_inputs))
            twin(*args, **kwargs)
    for name, call in seen.calls.items():
        seen.calls[name] = PartCall(call.args, call.kwargs, call.device, totals[name] / max(1, sizes[name]))
    return seen


class _Weights(TorchFunctionMode):
    """Sees which operations are given a tensor of ``held`` (by identity), or asked for its size."""

    def __init__(self, held: dict[int, list[str]], read: Callable[[list[str]], None]) -> None:
        super().__init__()
        self.held, self.read = held, read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _SAFE:
            for tensor in tensors((args, kwargs or {})):
                if id(tensor) in self.held:
                    self.read(self.held[id(tensor)])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _sizes_watched(sized: dict[int, list[str]], read: Callable[[list[str]], None]) -> Iterator[None]:
    """See which code reads a number of a layer of ``sized`` (by identity): one that repeats a size may change."""

    def watching(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if id(module) in sized and not name.startswith("_") and _is_size(value):
            read(sized[id(module)])
        return value

    nn.Module.__getattribute__ = watching  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


def _is_size(value: Any) -> bool:
    return type(value) is int or (type(value) in (tuple, list) and bool(value) and all(type(v) is int for v in value))


def _named(module: nn.Module, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(prefix=path, remove_duplicate=False)
    yield from module.named_buffers(prefix=path, remove_duplicate=False)


def _sized(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    return ((name, one) for name, one in module.named_modules(prefix=path, remove_duplicate=False) if has_sizes(one))


def _changing(module: nn.Module, path: str) -> list[str]:
    """What may come out of a pruning changed: the submodules of ``module`` that hold tensors or sizes, themselves or within."""
    inner = [(p, m) for p, m in module.named_modules(prefix=path, remove_duplicate=False) if m is not module]
    return [p for p, m in inner if any(True for _ in (*m.parameters(), *m.buffers())) or any(map(has_sizes, m.modules()))]
