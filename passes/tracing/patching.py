"""What is replaced while a model is traced, and put back afterwards: ``PATCHES``.

One trace runs at a time in a process. Every replacement asks whether it runs on the tracing thread, outside of operations that run for
their shapes; anywhere else it is the original.
"""

from __future__ import annotations

import abc
import builtins
import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxprune.errors import TraceError
from fxprune.passes import compat
from fxprune.passes.ir.factories import FACTORIES, LIKE, RANDOM_FACTORIES, takes_no_device
from fxprune.passes.ir.notes import NoteKind
from fxprune.passes.ir.skeleton import Skeleton
from fxprune.passes.tracing import checks, legacy
from fxprune.passes.tracing import decompositions as openers
from fxprune.passes.tracing.autograd import traced_call
from fxprune.passes.tracing.proxies import ShapeAttribute, ShapeProxy, ShapeTuple
from fxprune.passes.tracing.recorder import Recorder
from fxprune.passes.tracing.side_effects.isolation import ALONE
from fxprune.passes.tracing.sizes.arithmetic import OF_MATH, recorded

_isinstance, _len = builtins.isinstance, builtins.len
_tracing = False  # guarded by ALONE: whether the thread that holds it is within a trace
_ABSENT = object()


_BEFORE = "_fxprune_gradients"


@dataclass(frozen=True)
class Patch:
    """``owner.name`` becomes ``wrap(tracer, original)`` for the time of a trace; ``original`` is what the owner itself holds, or None."""

    owner: Any
    name: str
    wrap: Callable[[Recorder, Any], Any]


@contextlib.contextmanager
def patched(tracer: Recorder) -> Iterator[None]:
    """While tracing: factories record, ``isinstance`` sees through proxies, attention takes its written-out path.

    Raises:
        TraceError: A trace is running on this thread already, so the call comes from the ``forward`` that is being traced.
    """
    # Torch imports parts of itself on their first use. One that is imported within the block would keep the patched functions for
    # good, and torch.compile and exporters would later not know them.
    importlib.import_module("torch._dynamo")
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    global _tracing
    with ALONE, contextlib.ExitStack() as stack:
        if _tracing:
            raise TraceError(f"{tracer.here()}: forward analyses a model itself while it is traced; do that outside of forward")
        _tracing = True
        stack.callback(_not_tracing)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(setattr, dynamo, "error_on_nested_fx_trace", dynamo.error_on_nested_fx_trace)
        dynamo.error_on_nested_fx_trace = False  # a function of torch.compile is then traced through
        for patch in PATCHES:
            held = vars(patch.owner).get(patch.name, _ABSENT)
            stack.callback(_put_back, patch.owner, patch.name, held)
            setattr(patch.owner, patch.name, patch.wrap(tracer, None if held is _ABSENT else held))
        yield


def _not_tracing() -> None:
    global _tracing
    _tracing = False


def _put_back(owner: Any, name: str, held: Any) -> None:
    if held is not _ABSENT:
        setattr(owner, name, held)
    elif name in vars(owner):
        delattr(owner, name)


def _factory(tracer: Recorder, original: Any) -> Any:
    def record(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_function", original, args, kwargs) if tracer.recording else original(*args, **kwargs)

    return record


def _maker(tracer: Recorder, original: Any) -> Any:
    """A factory; in a block of a device it makes its tensors there, unless it is told where."""
    usual, record = tracer.default_device(), _factory(tracer, original)

    def make(*args: Any, **kwargs: Any) -> Any:
        if not tracer.recording:
            return original(*args, **kwargs)
        given = (a.value if type(a) is ShapeProxy else a for a in (*args, *kwargs.values()))
        if kwargs.get("device") is None and not takes_no_device(original.__name__, given):
            device, outside = tracer.devices[-1] if tracer.devices else (None, usual)
            now = tracer.default_device()
            if device is not None or now != outside:
                kwargs["device"] = device if now == outside else now
        return record(*args, **kwargs)

    return make


def _is_instance(tracer: Recorder, original: Any) -> Any:
    """Only the tracing thread has proxies, so it is asked by looking for one: this is called all the time."""

    def isinstance_(obj: Any, cls: Any) -> bool:
        kind = type(obj)
        if kind is ShapeTuple:
            return _isinstance(obj, cls) or _isinstance(torch.Size(), cls)
        if kind is ShapeProxy and _isinstance(cls, abc.ABCMeta):  # a proxy has every method, and so is Iterable and all
            return _isinstance(obj.value, cls)
        if (kind is ShapeProxy or kind is ShapeAttribute) and not _isinstance(obj, cls):
            return _isinstance(obj.value, cls)
        return _isinstance(obj, cls)

    return isinstance_


def _length(tracer: Recorder, original: Any) -> Any:
    """The length of a tensor stays in the graph, as its size does."""

    def len_(obj: Any) -> Any:
        known = type(obj) in (ShapeProxy, ShapeAttribute) and _isinstance(obj.value, torch.Tensor) and obj.value.ndim
        return tracer.shape_of(obj)[0] if known else _len(obj)

    return len_


def _can_be_called(tracer: Recorder, original: Any) -> Any:
    def callable_(obj: Any) -> bool:
        if type(obj) is ShapeProxy or (type(obj) is ShapeAttribute and _isinstance(obj.value, torch.Tensor)):
            return bool(original(obj.value))
        return bool(original(obj))

    return callable_


def _hidden(tracer: Recorder, original: Any) -> Any:
    """How fx wraps functions that hide from it. Its own wrapper expects one proxy back; one that is traced into may return anything."""

    def wrapped(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = tracer.recording and compat.find_proxy(args, kwargs) is not None
            return tracer.create_proxy("call_function", function, args, kwargs) if found else function(*args, **kwargs)

        return call

    return wrapped


def _limits(tracer: Recorder, original: Any) -> Any:
    def of(*args: Any, **kwargs: Any) -> Any:
        found = tracer.recording and compat.find_proxy(args, kwargs) is not None
        return tracer.create_proxy("call_function", original, args, kwargs) if found else original(*args, **kwargs)

    return of


def _scripted(tracer: Recorder, original: Any) -> Any:
    """TorchScript takes tensors alone; the Python function that was scripted or traced takes proxies as well."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        body = getattr(self, "_torchdynamo_inline", None)
        if body is None or not tracer.recording or compat.find_proxy(args, kwargs) is None:
            return original.__get__(self, type(self))(*args, **kwargs)
        return body(*args, **kwargs)

    return call


def _mapped(tracer: Recorder, original: Any) -> Any:
    def vmap_impl(func: Any, in_dims: Any, out_dims: Any, randomness: str, chunk_size: Any, *args: Any, **kwargs: Any) -> Any:
        if not tracer.recording or compat.find_proxy(args, {}) is None:
            return original(func, in_dims, out_dims, randomness, chunk_size, *args, **kwargs)
        return openers.unrolled_vmap(tracer.mapped, func, in_dims, out_dims, *args, **kwargs)

    return vmap_impl


def _checked(tracer: Recorder, original: Any) -> Any:
    """A check of tensors or sizes is left out of the graph. One of anything but tensors is made at once: a class that is kept makes it."""

    def check(*args: Any, **kwargs: Any) -> Any:
        if not tracer.recording or compat.find_proxy(args, kwargs) is None:
            return original(*args, **kwargs)
        known = [a.value if _isinstance(a, ShapeProxy) else a for a in args]
        if not any(_isinstance(a, torch.Tensor) for a in known):
            original(*known, **kwargs)
        return tracer.note(NoteKind.LOST, checks.NOT_KEPT, tracer.here())

    return check


def _close(tracer: Recorder, original: Any) -> Any:
    """``torch.testing.assert_close``, by whatever name code holds it, finds nothing to raise."""

    def errors(*args: Any, **kwargs: Any) -> Any:
        if not tracer.recording or compat.find_proxy(args, kwargs) is None:
            return original(*args, **kwargs)
        tracer.note(NoteKind.LOST, checks.NOT_KEPT, tracer.here())
        return []

    return errors


def _asserted(tracer: Recorder, original: Any) -> Any:
    """``torch._assert`` stays in the graph where it asks for sizes."""

    def check(condition: Any, message: Any = "") -> Any:
        if not tracer.recording or not _isinstance(condition, ShapeProxy):
            return original(condition, message)
        if _isinstance(condition.value, torch.Tensor):
            return tracer.note(NoteKind.LOST, checks.NOT_KEPT, tracer.here())
        return tracer.create_proxy("call_function", original, (condition, message), {})

    return check


def _block(what: str) -> Callable[[Recorder, Any], Any]:
    def wrap(tracer: Recorder, original: Any) -> Any:
        def enter(context: Any, *args: Any, **kwargs: Any) -> Any:
            if tracer.recording:
                tracer.refuse_block(what)
                text = f"a {what} block cannot be kept in a graph; the slim module computes without it"
                tracer.note(NoteKind.LOST, text, tracer.here())
            return original(context, *args, **kwargs)

        return enter

    return wrap


def _gradients(what: str) -> Callable[[Recorder, Any], Any]:
    """A block with or without gradients begins: what is recorded in it is marked."""

    def wrap(tracer: Recorder, original: Any) -> Any:
        def enter(context: Any, *args: Any, **kwargs: Any) -> Any:
            if tracer.recording and not tracer.own_backward and not _within_no_grad(sys._getframe(1)):
                context.__dict__[_BEFORE] = tracer.gradients
                given = args[0] if args else kwargs.get("mode", True)
                on = {"no_grad": False, "enable_grad": True}.get(
                    what, given if what == "set_grad_enabled" else not context.__dict__.get("mode")
                )
                if on and tracer.gradients and what == "enable_grad":  # it matters where the slim module is called without gradients
                    text = f"a {what} block cannot be kept in a graph; the slim module computes without it"
                    tracer.note(NoteKind.LOST, text, tracer.here())
                tracer.gradients = tracer.gradients and on if what == "inference_mode" else bool(on)
            return original(context, *args, **kwargs)

        return enter

    return wrap


def _gradients_again(tracer: Recorder, original: Any) -> Any:
    """A block with or without gradients ends."""

    def leave(context: Any, *args: Any, **kwargs: Any) -> Any:
        before = context.__dict__.pop(_BEFORE, None)
        if before is not None and tracer.recording:
            tracer.gradients = before
        return original(context, *args, **kwargs)

    return leave


def _within_no_grad(frame: Any) -> bool:
    """Whether ``no_grad`` itself is at work: it is made of ``set_grad_enabled``."""
    return frame.f_globals.get("__name__") == torch.no_grad.__module__ and frame.f_code.co_name in ("__enter__", "__exit__")


def _moved(tracer: Recorder, original: Any) -> Any:
    """``module.to(device)`` within forward: what is traced has no device of its own, and where the slim network lies is the user's say."""

    def apply(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not tracer.recording or module not in tracer.skeleton.module_names:
            return original(module, *args, **kwargs)
        text = f"forward moves or casts a {type(module).__name__}, which the slim network does not"
        tracer.note(NoteKind.LOST, text, tracer.here())
        return module

    return apply


def _by_the_users() -> bool:
    """Whether the function that is patched was called by code that is neither torch's nor ours."""
    return not str(sys._getframe(2).f_globals.get("__name__", "")).startswith(("torch.", "fxprune."))


def _asks_for_gradients(tracer: Recorder, original: Any) -> Any:
    def is_grad_enabled() -> bool:
        if not tracer.recording or not _by_the_users():
            return bool(original())
        tracer.note(NoteKind.LOST, f"torch.is_grad_enabled() was taken to be {tracer.gradients}, as in training", tracer.here())
        return tracer.gradients

    return is_grad_enabled


def _seeds(tracer: Recorder, original: Any) -> Any:
    def manual_seed(*args: Any, **kwargs: Any) -> Any:
        if tracer.recording and _by_the_users():
            tracer.note(NoteKind.LOST, "forward seeds torch's random numbers, which the slim module does not", tracer.here())
        return original(*args, **kwargs)

    return manual_seed


def _derives(tracer: Recorder, original: Any) -> Any:
    def derivative(*args: Any, **kwargs: Any) -> Any:
        if tracer.recording:
            what = f"torch.autograd.functional.{original.__name__}"
            raise TraceError(f"{tracer.here()}: forward computes a derivative ({what}), which a graph cannot keep")
        return original(*args, **kwargs)

    return derivative


def _of_functions(tracer: Recorder, original: Any) -> Any:
    """``Fn.apply``, by whatever name code holds it, looks for the class's ``forward``: that is where a call is met."""

    def attribute(function: Any, name: str) -> Any:
        found = type.__getattribute__(function, name)
        if name not in ("forward", "setup_context") or not tracer.recording:
            return found
        setup = type.__getattribute__(function, "setup_context")
        own_setup = setup is not type.__getattribute__(torch.autograd.Function, "setup_context")
        if name == "setup_context":
            return found if not own_setup else lambda *_, **__: None

        def forward(*args: Any) -> Any:
            by_torch = own_setup or (bool(args) and _isinstance(args[0], compat.FunctionBase))
            if not by_torch or compat.find_proxy(args, {}) is None:
                return found(*args)
            return traced_call(tracer, function, args if own_setup else args[1:])

        return forward

    return attribute


def _members(tracer: Recorder, original: Any) -> Any:
    """Parameters and buffers that code loops over are those of the graph, as by their names."""

    def named(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        for name, tensor in original(module, *args, **kwargs):
            yield name, tracer.getattr(name, tensor, {})

    return named


def _training(tracer: Recorder, original: Any) -> Any:
    """``module.training`` says that it was read. The user's modules keep their classes, so ``type(m) is Block`` holds."""

    def read(module: nn.Module) -> Any:
        state = module.__dict__
        if "training" not in state:  # a scripted module answers for itself
            raise AttributeError("training")
        skeleton: Skeleton | None = state.get("_fxprune_skeleton")
        if skeleton is not None:
            skeleton.training_was_read = True
        elif tracer.recording and module in tracer.skeleton.module_names:  # of a layer, by code around it or past its call
            tracer.skeleton.training_was_read = True
        return state["training"]

    def write(module: nn.Module, value: bool) -> None:
        if tracer.recording and module in tracer.skeleton.module_names:  # forward sets modes: what training runs may be another thing
            tracer.skeleton.training_was_read = True
        module.__dict__["training"] = value

    return property(read, write)


PATCHES: tuple[Patch, ...] = (
    *(Patch(torch, name, _maker) for name in FACTORIES + RANDOM_FACTORIES),
    *(Patch(torch, name, _factory) for name in LIKE),
    *(Patch(torch, name, _limits) for name in ("finfo", "iinfo")),
    *(Patch(math, name, recorded) for name in OF_MATH),
    *(Patch(torch, name, _checked) for name in compat.CHECKS),
    Patch(torch, "_assert", _asserted),
    Patch(compat.close_errors_home, compat.CLOSE_ERRORS, _close),
    Patch(type(torch.autograd.Function), "__getattribute__", _of_functions),
    *(Patch(torch.autograd.functional, name, _derives) for name in ("vjp", "jvp", "vhp", "hvp", "jacobian", "hessian")),
    Patch(torch, "is_grad_enabled", _asks_for_gradients),
    Patch(torch, "manual_seed", _seeds),
    Patch(nn.Module, "_apply", _moved),
    Patch(type(torch.autograd.Variable), "__call__", legacy.variable),
    Patch(torch.Tensor, "__new__", legacy.constructor),
    *(Patch(torch, name, legacy.kind_of_tensor) for name in legacy.KINDS),
    Patch(torch.no_grad, "__enter__", _gradients("no_grad")),
    Patch(torch.enable_grad, "__enter__", _gradients("enable_grad")),
    Patch(torch.set_grad_enabled, "__init__", _gradients("set_grad_enabled")),
    Patch(torch.inference_mode, "__enter__", _gradients("inference_mode")),
    *(Patch(b, "__exit__", _gradients_again) for b in (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)),
    Patch(torch.autocast, "__enter__", _block("autocast")),
    Patch(compat.fx_tracing, "_create_wrapped_func", _hidden),
    Patch(compat.vmap_home, "vmap_impl", _mapped),
    Patch(compat.ScriptFunction, "__call__", _scripted),
    Patch(nn.Module, "named_parameters", _members),
    Patch(nn.Module, "named_buffers", _members),
    Patch(nn.Module, "training", _training),
    Patch(builtins, "callable", _can_be_called),
    Patch(builtins, "isinstance", _is_instance),
    Patch(builtins, "len", _length),
)
