"""Tensors made and cast as code from before torch 0.4 does it: ``Variable(x)``, ``torch.Tensor(2, 3)``, ``x.new(2, 3)``, ``x.type("...")``.

None of these forms lets a proxy through. Each is recorded as the form that took its place.
"""

from __future__ import annotations

import builtins
from typing import Any

import torch
from torch import fx

from fxprune.passes.compat import find_proxy
from fxprune.passes.tracing.recorder import Recorder

# ``isinstance`` is patched while tracing (see ``patching``); here the real one is meant.
_isinstance = builtins.isinstance
KINDS = tuple(f"{kind}Tensor" for kind in ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool"))


def variable(tracer: Recorder, original: Any) -> Any:
    """``Variable(x)``: a tensor of the same memory without the past of ``x``."""

    def make(kind: Any, data: Any = None, requires_grad: bool = False, *args: Any, **kwargs: Any) -> Any:
        if not tracer.recording or not _isinstance(data, fx.Proxy):
            return type.__call__(kind, *(() if data is None else (data, requires_grad)), *args, **kwargs)
        return data.detach().requires_grad_() if requires_grad else data.detach()

    return make


def constructor(tracer: Recorder, original: Any) -> Any:
    """``torch.Tensor(2, 3)``, of the sizes, and ``torch.Tensor([2.0, 3.0])``, of the numbers."""
    plain = torch.Tensor.__new__

    def make(kind: Any, *args: Any, **kwargs: Any) -> Any:
        if kind is not torch.Tensor or not tracer.recording or find_proxy(args, kwargs) is None:
            return plain(kind, *args, **kwargs)
        return _made(tracer, args, {})

    return staticmethod(make)


class _Kind:
    """``torch.FloatTensor`` and its kind, which code calls, casts to, and asks ``isinstance`` for."""

    def __init__(self, tracer: Recorder, original: Any) -> None:
        self._tracer, self._original = tracer, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._tracer.recording or find_proxy(args, kwargs) is None:
            return self._original(*args, **kwargs)
        device = {"device": "cuda"} if self._original.is_cuda else {}
        return _made(self._tracer, args, {"dtype": self._original.dtype, **device})

    def __instancecheck__(self, one: Any) -> bool:
        if not _isinstance(one, torch.Tensor):
            return False
        device = self._tracer.device if one.is_meta else one.device
        return bool(one.dtype == self._original.dtype and (device.type == "cuda") == self._original.is_cuda)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def kind_of_tensor(tracer: Recorder, original: Any) -> Any:
    return original if original is None else _Kind(tracer, original)


def _made(tracer: Recorder, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    sizes = sizes_in(args)
    if sizes is not None:
        return tracer.create_proxy("call_function", torch.empty, (sizes,), options)
    (given,) = args
    if _is_tensor(given):
        return given[...]  # the same memory, and its gradient
    return tracer.create_proxy("call_function", torch.tensor, (given,), {"dtype": torch.get_default_dtype(), **options})


def new(proxy: Any, *args: Any, **kwargs: Any) -> Any:
    """``x.new(2, 3)``: a tensor of these sizes, of these numbers, or another name of this one."""
    sizes = sizes_in(args)
    if sizes is not None:
        return proxy.tracer.create_proxy("call_method", "new_empty", (proxy, sizes or (0,)), kwargs)
    (given,) = args
    return given[...] if _is_tensor(given) else proxy.tracer.create_proxy("call_method", "new_tensor", (proxy, given), kwargs)


def sizes_in(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The sizes that a constructor is given, one by one or as those of another tensor; None where it is given numbers, or a tensor."""
    if len(args) == 1 and _isinstance(args[0], tuple) and hasattr(args[0], "numel"):  # torch.Size, or what stands for it
        return tuple(args[0])
    return args if all(_isinstance(one.value if _isinstance(one, fx.Proxy) else one, int) for one in args) else None


def _is_tensor(given: Any) -> bool:
    return _isinstance(given, torch.Tensor) or (_isinstance(given, fx.Proxy) and _isinstance(given.value, torch.Tensor))


class TypeName(str):
    """What ``x.type()`` gives: a name, which knows its tensor, so that a cast to it follows the tensor."""

    tensor: Any


def cast(proxy: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """``x.type()``, the name of the tensor's type on the model's device, and ``x.type(dtype)``, which may be a dtype, such a name,
    or ``torch.FloatTensor`` and the like."""
    tracer = proxy.tracer
    if dtype is None:
        return _name(tracer, proxy)
    if _isinstance(dtype, TypeName):
        return tracer.create_proxy("call_method", "type_as", (proxy, dtype.tensor), {})
    if _isinstance(dtype, str) and dtype.startswith("torch."):
        home, _, name = dtype.removeprefix("torch.").rpartition(".")
        dtype = getattr(getattr(torch, home) if home else torch, name)
    if hasattr(dtype, "is_cuda"):
        device = {"device": "cuda"} if dtype.is_cuda else {}
        return tracer.create_proxy("call_method", "to", (proxy,), {"dtype": dtype.dtype, **device})
    return tracer.create_proxy("call_method", "type", (proxy, dtype, *args), kwargs)


def _name(tracer: Recorder, proxy: Any) -> TypeName:
    before, tracer.busy = tracer.busy, True
    try:
        name = torch.empty(0, dtype=proxy.value.dtype).type()
    finally:
        tracer.busy = before
    kind = tracer.device.type
    found = TypeName(name if kind in ("cpu", "meta") else name.replace("torch.", f"torch.{kind}.", 1))
    found.tensor = proxy
    return found
