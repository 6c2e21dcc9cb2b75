"""What is patched while a model is traced, and put back afterwards."""

from __future__ import annotations

import abc
import builtins
import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._functorch import apis
from torch.fx import _symbolic_trace as symbolic
from torch.fx._symbolic_trace import _find_proxy

from fxprune.passes.ir.factories import FACTORIES, LIKE, RANDOM_FACTORIES
from fxprune.passes.tracing import decompositions as openers
from fxprune.passes.tracing.autograd import traced_call
from fxprune.passes.tracing.proxies import ShapeAttribute, ShapeProxy
from fxprune.passes.tracing.recorder import Recorder

_isinstance, _len = builtins.isinstance, builtins.len


@contextlib.contextmanager
def patched(tracer: Recorder) -> Iterator[None]:
    """While tracing: factories record, ``isinstance`` sees through proxies, attention takes its written-out path."""
    # Torch imports parts of itself on their first use. One that is imported within the block would keep the patched functions for
    # good, and torch.compile and exporters would later not know them.
    importlib.import_module("torch._dynamo")
    saved = {name: getattr(torch, name) for name in FACTORIES + RANDOM_FACTORIES + LIKE}

    def recorder(original: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if tracer.busy else tracer.create_proxy("call_function", original, args, kwargs)

        return record

    def isinstance_(obj: Any, cls: Any) -> bool:
        kind = type(obj)
        if kind is ShapeProxy and _isinstance(cls, abc.ABCMeta):  # a proxy has every method, and so is Iterable and all
            return _isinstance(obj.value, cls)
        if (kind is ShapeProxy or kind is ShapeAttribute) and not _isinstance(obj, cls):
            return _isinstance(obj.value, cls)
        return _isinstance(obj, cls)

    def len_(obj: Any) -> Any:
        """The length of a tensor stays in the graph, as its size does."""
        known = type(obj) in (ShapeProxy, ShapeAttribute) and _isinstance(obj.value, torch.Tensor) and obj.value.ndim
        return tracer.shape_of(obj)[0] if known else _len(obj)

    def wrapped(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = not tracer.busy and _find_proxy(args, kwargs) is not None
            return tracer.create_proxy("call_function", original, args, kwargs) if found else original(*args, **kwargs)

        return call

    def limits(original: Any) -> Any:
        def of(*args: Any) -> Any:
            return tracer.create_proxy("call_function", original, args, {}) if _find_proxy(args, {}) is not None else original(*args)

        return of

    def scripted(self: Any, *args: Any, **kwargs: Any) -> Any:
        """TorchScript takes tensors alone; the Python function that was scripted or traced takes proxies as well."""
        body = getattr(self, "_torchdynamo_inline", None)
        if body is None or tracer.busy or _find_proxy(args, kwargs) is None:
            return run_script(self, *args, **kwargs)
        return body(*args, **kwargs)

    def mapped(func: Any, in_dims: Any, out_dims: Any, randomness: str, chunk_size: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.busy or _find_proxy(args, {}) is None:
            return map_(func, in_dims, out_dims, randomness, chunk_size, *args, **kwargs)
        return openers.unrolled_vmap(func, in_dims, out_dims, *args, **kwargs)

    def noted(original: Any, what: str) -> Any:
        def enter(context: Any) -> Any:
            if not tracer.busy:
                tracer.refuse_block(what)
                tracer.notes[f"{tracer.here()}: a {what} block cannot be kept in a graph; the slim module computes without it"] = None
            return original(context)

        return enter

    def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.busy or _find_proxy(args, kwargs) is None:
            return own_apply.__get__(None, function)(*args, **kwargs)
        return traced_call(tracer, function, args)

    def members(original: Any) -> Any:
        """Parameters and buffers that code loops over are those of the graph, as by their names."""

        def named(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
            for name, tensor in original(module, *args, **kwargs):
                yield name, tracer.getattr(name, tensor, {})

        return named

    autograd: Any = torch.autograd.Function
    own_apply = autograd.__dict__["apply"]
    autograd.apply = classmethod(apply)
    blocks: list[tuple[Any, str]] = [(torch.no_grad, "no_grad"), (torch.enable_grad, "enable_grad"), (torch.autocast, "autocast")]
    entered = [(cls, cls.__enter__) for cls, _ in blocks]
    for cls, what in blocks:
        cls.__enter__ = noted(cls.__enter__, what)
    # fx's own wrapper expects one proxy back; a function that is traced into may return anything.
    fx_tracing: Any = symbolic
    wrapper, fx_tracing._create_wrapped_func = fx_tracing._create_wrapped_func, wrapped
    mapping: Any = apis
    map_, mapping.vmap_impl = mapping.vmap_impl, mapped
    script: Any = torch._C.ScriptFunction
    run_script, script.__call__ = script.__call__, scripted
    ranges = {name: getattr(torch, name) for name in ("finfo", "iinfo")}
    for name, original in ranges.items():
        setattr(torch, name, limits(original))
    module_type: Any = nn.Module
    loops = {name: getattr(nn.Module, name) for name in ("named_parameters", "named_buffers")}
    for name, original in loops.items():
        setattr(module_type, name, members(original))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for name, original in saved.items():
        setattr(torch, name, recorder(original))
    builtins.isinstance, builtins.len = isinstance_, len_
    try:
        yield
    finally:
        builtins.isinstance, builtins.len = _isinstance, _len
        autograd.apply = own_apply
        for cls, enter in entered:
            cls.__enter__ = enter
        fx_tracing._create_wrapped_func = wrapper
        for name, original in loops.items():
            setattr(module_type, name, original)
        mapping.vmap_impl, script.__call__ = map_, run_script
        for name, original in (*saved.items(), *ranges.items()):
            setattr(torch, name, original)
        torch.backends.mha.set_fastpath_enabled(fast)
