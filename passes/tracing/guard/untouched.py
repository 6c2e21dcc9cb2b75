"""The user's own model run once, and afterwards as it was: attributes, containers, buffers, modes, random numbers, globals.

It is the model itself that runs, not a copy, since code may know its modules by what they are: as keys of a table, by ``id()``. Nothing
that another thread reads is emptied meanwhile: what did not change is left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fxprune.evaluation.repeatable import same_random_numbers
from fxprune.passes.compat import TorchDispatchMode
from fxprune.passes.ir.contents import OF_EVERY_MODULE, Contents, hooks_back, hooks_of
from fxprune.passes.ir.nested import tensors
from fxprune.passes.tracing.side_effects.isolation import ALONE, contents_kept
from fxprune.passes.tracing.side_effects.reachable import Reach

_REGISTERED = ("_parameters", "_buffers", "_modules")
_LONG = 1000  # containers that are longer hold no state of a forward pass


class WritesWeights(RuntimeError):
    """The model's code would have written into its parameters."""


class Unwritten(TorchDispatchMode):
    """Stops every operation that would write into the parameters of ``model``. ``written``: whether there was one, caught or not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written = False
        self._kept = {p.untyped_storage().data_ptr() for p in model.parameters() if type(p) is nn.Parameter}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = [*zip(func._schema.arguments, args, strict=False)]
            given += [(one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs]
            targets = [value for one, value in given if one.alias_info is not None and one.alias_info.is_write]
            if any(t.untyped_storage().data_ptr() in self._kept for t in tensors(targets)):
                self.written = True
                raise WritesWeights("code writes into weights that are not its own")
        return func(*args, **kwargs)


@contextlib.contextmanager
def untouched(model: nn.Module, reach: Reach, training: bool) -> Iterator[Unwritten]:
    """For a run of ``model`` in the given mode, without gradients and with the same random numbers each time.

    What is yielded says whether the code tried to write into its parameters, which ends the run.
    """
    with ALONE, _untouched(model, reach, training) as guard:
        yield guard


@contextlib.contextmanager
def _untouched(model: nn.Module, reach: Reach, training: bool) -> Iterator[Unwritten]:
    modules = [m for m in dict.fromkeys(model.modules()) if not isinstance(m, torch.jit.ScriptModule)]
    states = [(m, dict(m.__dict__), {k: dict(m.__dict__[k]) for k in _REGISTERED}) for m in modules]
    contents, held, hooks = Contents(), list(model.buffers()), [pair for m in modules for pair in hooks_of(m)]
    for module in modules:
        contents.add(module._non_persistent_buffers_set)  # code may register a buffer on its first call
        for key in module.__dict__.keys() - OF_EVERY_MODULE:
            value = module.__dict__[key]
            contents.add(value)
            held += [] if isinstance(value, (list, tuple, dict)) and len(value) > _LONG else tensors(value)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            contents.add(getattr(hook, "__self__", hook))
    values = [(t, t.detach().clone()) for t in {id(t): t for t in held}.values() if not isinstance(t, nn.Parameter)]
    data = [(p, p.data) for p in model.parameters()]
    guard = Unwritten(model)
    try:
        for module in modules:
            module.__dict__["training"] = training
        with contents_kept(reach, modules), same_random_numbers(), torch.no_grad(), guard:
            yield guard
    finally:
        for module, state, registered in states:
            for kind, before in registered.items():
                _put_back(state[kind], before)
            _put_back(module.__dict__, state)
        hooks_back(hooks)
        contents.restore()
        _values_back(values, data)


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [k for k in now if k not in before]:
        del now[key]
    for key, value in before.items():
        if key not in now or now[key] is not value:
            now[key] = value


@torch.no_grad()
def _values_back(values: Iterable[tuple[torch.Tensor, torch.Tensor]], data: Iterable[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for tensor, before in values:
        if tensor.shape != before.shape:
            tensor.data = before
        elif tensor.layout is torch.strided and not torch.equal(tensor, before) and not bool(torch.isnan(before).any()):
            tensor.copy_(before)
    for parameter, before in data:
        if parameter.data.data_ptr() != before.data_ptr():
            parameter.data = before
