"""Module and example inputs to one or two ``torch.fx`` graphs whose nodes know their concrete values.

The tracer is ``torch.fx``'s own, with one addition: each proxy carries the value it had on the example inputs, computed on the
meta device while tracing. Control flow over shapes is answered from that value (and reported, since it was specialised);
arithmetic over sizes stays in the graph, so that batch and resolution stay as dynamic as they were. ``Tensor.shape`` is
unpacked into one ``size(i)`` node per dimension, so that every later pass meets integers, never a ``torch.Size``.

What is traced is a structural copy of the user's model on the meta device (``passes.skeleton``): the model itself is not touched.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import math
import operator
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace as symbolic
from torch.fx._symbolic_trace import _find_proxy
from torch.fx.node import map_arg

from fxprune.errors import InputError, TraceError
from fxprune.inputs import call_form
from fxprune.passes import openers, shapes
from fxprune.passes.skeleton import Skeleton

_isinstance = builtins.isinstance
# Factories take no tensor, so a proxy for a size among their arguments would be turned into a number: they are patched while
# tracing. The random ones are always recorded; a constant drawn while tracing would be the same at every call.
_FACTORIES = ("zeros", "ones", "full", "empty", "arange", "linspace", "eye", "tensor", "as_tensor", "tril_indices", "triu_indices")
_RANDOM_FACTORIES = ("rand", "randn", "randint", "randperm", "normal")
_STATIC_ATTRIBUTES = frozenset({"ndim", "requires_grad", "layout", "is_sparse", "is_quantized", "is_nested", "grad_fn", "is_leaf", "names"})
_STATIC_METHODS = frozenset({"dim", "ndimension", "is_floating_point", "is_complex"})
_SKIPPED_FILES = (f"{torch.__path__[0]}/", __file__, openers.__file__)


@dataclass
class TracedModel:
    """What tracing a module gave.

    ``graphs``: "eval" and, where it differs, "train"; node.meta holds ``val`` (concrete value on the example, tensors on meta) and
    ``where`` (file:line in the user's source).
    ``constants``: attribute name -> tensor, for tensors the forward pass made or held outside parameters and buffers.
    ``notes``: what had to be specialised or could not be kept. ``opaque``: submodules and functions kept whole -> why.
    ``parts``: where the root could not be traced, the paths of the submodules that were; graphs are then named ``path:mode``.
    """

    skeleton: Skeleton
    graphs: dict[str, fx.Graph]
    constants: dict[str, torch.Tensor]
    notes: tuple[str, ...] = ()
    opaque: dict[str, str] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)

    @property
    def eval_modes(self) -> list[str]:
        """The names of the graphs that evaluation runs."""
        return [mode for mode in self.graphs if mode.rpartition(":")[2] == "eval"]


class ShapeTuple(tuple):  # type: ignore[type-arg]
    """A shape as a tuple of numbers or size proxies, with the methods of ``torch.Size`` that networks use."""

    def numel(self) -> Any:
        return math.prod(self)

    def __getitem__(self, index: Any) -> Any:
        got = tuple.__getitem__(self, index)
        return ShapeTuple(got) if _isinstance(index, slice) else got


class ShapeProxy(fx.Proxy):
    """A proxy that knows its value on the example inputs."""

    tracer: ShapeTracer

    @property
    def value(self) -> Any:
        return self.node.meta["val"]

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        args, kwargs = args or (), kwargs or {}
        tracer = _find_proxy(args, kwargs).tracer  # type: ignore[union-attr]
        if _isinstance(orig_method, torch._C.ScriptMethod):
            return super().__torch_function__(orig_method, types, args, kwargs)
        if torch.overrides.is_tensor_method_or_property(orig_method):
            return tracer.create_proxy("call_method", orig_method.__name__, args, kwargs)
        return tracer.create_proxy("call_function", orig_method, args, kwargs, name=tracer.graph._target_to_str(orig_method.__name__))

    def __getattr__(self, name: str) -> Any:
        value = self.value
        if _isinstance(value, torch.Tensor):
            if name == "shape":
                return self.tracer.shape_of(self)
            if name == "size":
                return lambda dim=None: self.tracer.shape_of(self) if dim is None else self.tracer.shape_of(self)[operator.index(dim)]
            if name in _STATIC_ATTRIBUTES:
                return getattr(value, name)
            if name in _STATIC_METHODS:
                return getattr(value, name)
            if name == "nelement" or name == "numel":
                return lambda: self.tracer.shape_of(self).numel()
        elif _isinstance(value, dict) and name in ("keys", "items", "values", "get"):
            known = {k: self[k] for k in value}
            return getattr(known, name)
        elif _isinstance(value, (torch.device, torch.dtype)):
            return getattr(value, name)
        elif not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        return ShapeAttribute(self, name)

    def __iter__(self) -> Iterator[Any]:
        value = self.value
        if _isinstance(value, torch.Tensor):
            if value.ndim == 0:
                raise TypeError("iteration over a 0-d tensor")
            self.tracer.specialised(self, f"loop over a dimension of {value.shape[0]}")
            return iter([self[i] for i in range(value.shape[0])])
        if _isinstance(value, dict):
            return iter(list(value))
        if not _isinstance(value, (tuple, list)):
            raise TypeError(f"{type(value).__name__!r} object is not iterable")
        return iter([self[i] for i in range(len(value))])

    def __len__(self) -> int:
        value = self.value
        if _isinstance(value, torch.Tensor):
            self.tracer.specialised(self, f"len() is {value.shape[0]}")
            return int(value.shape[0])
        return len(value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __contains__(self, item: Any) -> bool:
        return item in self.value

    def __bool__(self) -> bool:
        return bool(self._concrete("a condition"))

    def __int__(self) -> int:
        return int(self._concrete("int()"))

    def __float__(self) -> float:
        return float(self._concrete("float()"))

    def __index__(self) -> int:
        return operator.index(self._concrete("an index"))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._concrete("round()"), digits)

    def __ceil__(self) -> int:
        return math.ceil(self._concrete("ceil()"))

    def __floor__(self) -> int:
        return math.floor(self._concrete("floor()"))

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if not _isinstance(self.value, torch.Tensor) else repr(self)

    def __hash__(self) -> int:
        value = self.value
        return hash(value) if _isinstance(value, (int, float, str, bool)) else id(self)

    def _concrete(self, use: str) -> Any:
        value = self.value
        if _isinstance(value, torch.Tensor):
            raise TraceError(f"{self.tracer.here()}: {use} depends on the values of a tensor, not only on its shape")
        self.tracer.specialised(self, f"{use} on the value {value}")
        return value


class ShapeAttribute(ShapeProxy):
    """``x.name``: a method to be called, or a value; the node is made only when the value is used."""

    def __init__(self, root: ShapeProxy, name: str) -> None:
        self.root, self.attr, self.tracer = root, name, root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            self._node = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class ShapeTracer(fx.Tracer):
    """``fx.Tracer`` whose proxies know their values; see the module's docstring."""

    proxy_buffer_attributes = True

    def __init__(self, skeleton: Skeleton, is_known: Callable[[nn.Module], bool], opaque: set[str], device: torch.device, has_rule: Callable[[Any], bool], path: str = "") -> None:
        super().__init__(autowrap_modules=())
        self.skeleton, self.is_known, self.opaque, self.device, self.has_rule, self.path = skeleton, is_known, opaque, device, has_rule, path
        self.notes: dict[str, None] = {}
        self.busy = False  # running an operation for its shape: nothing is recorded meanwhile
        self.stack: list[str] = []
        self._shapes: dict[fx.Node, ShapeTuple] = {}
        self._attributes: dict[str, ShapeProxy] = {}
        self.constants: dict[str, torch.Tensor] = {}

    # -- what fx asks of a tracer -------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> ShapeProxy:
        return ShapeProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or self.is_known(m)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return self.skeleton.module_names[mod]
        except KeyError:
            raise TraceError(f"{self.here()}: a {type(mod).__name__} is called that is not registered as a submodule of the model") from None

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.busy:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return self.create_proxy("call_module", name, args, kwargs)
        self.stack.append(name)
        result = forward(*args, **kwargs)
        self.stack.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.busy or not _isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self.skeleton.tensor_names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if kind == "call_function" and not self.busy:
            body = openers.OPENERS.get(target) if _isinstance(target, types.FunctionType) else None
            body = body or (target if self._is_wrapped(target) else None)
            if body is not None:
                self.stack.append(_qualified(target))
                result = body(*args, **kwargs)
                self.stack.pop()
                return result
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def _is_wrapped(self, target: Any) -> bool:
        """A library's Python function that it hid from fx: it is traced into, unless it has a rule or that failed before."""
        if not _isinstance(target, types.FunctionType) or self.has_rule(target) or _qualified(target) in self.opaque:
            return False
        return not (target.__module__ or "torch").startswith("torch.")

    def create_arg(self, a: Any) -> Any:
        if _isinstance(a, fx.Proxy):
            return a.node
        if _isinstance(a, ShapeTuple):
            return tuple(self.create_arg(i) for i in a)
        if _isinstance(a, torch.Tensor):
            name = self.skeleton.tensor_names.get(id(a)) or self._constant(a)
            return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None) -> fx.Node:
        node = self.graph.create_node(kind, target, args, kwargs, name, None)
        node.meta["where"] = self.here()
        if kind not in ("placeholder", "output"):
            node.meta["val"] = self._value(node)
        return node

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        args, kwargs = self.example
        flat: list[Any] = []

        def placeholder(name: str, value: Any) -> Any:
            proxy = self.create_proxy("placeholder", name, (), {})
            proxy.node.meta["val"] = _to_meta(value)
            proxy.node.meta["example"] = value if not _isinstance(value, (torch.Tensor, dict, list, tuple)) else None
            flat.append(proxy)
            return proxy

        try:
            bound = inspect.signature(self.root.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"example_inputs do not fit {type(self.root).__name__}.forward: {error}") from error
        pos: list[Any] = []
        named: dict[str, Any] = {}
        for param in bound.signature.parameters.values():
            if param.name not in bound.arguments:
                continue
            value = bound.arguments[param.name]
            if param.kind is param.VAR_POSITIONAL:
                pos.extend(placeholder(f"{param.name}_{i}", v) for i, v in enumerate(value))
            elif param.kind is param.VAR_KEYWORD:
                named.update({k: placeholder(k, v) for k, v in value.items()})
            else:
                made = placeholder(param.name, value) if value is not None else None
                if param.kind is param.KEYWORD_ONLY or len(pos) < len(bound.args) and param.name in kwargs:
                    named[param.name] = made
                else:
                    pos.append(made)
        root = self.root

        def call(*_: Any) -> Any:
            return root.forward(*pos, **named)

        return call, flat

    def run(self, example: tuple[tuple[Any, ...], dict[str, Any]]) -> fx.Graph:
        self.example = example
        with torch.no_grad(), _patched(self):
            return self.trace(self.skeleton.module(self.path))

    # -- values -------------------------------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.skeleton.tensor(node.target) if node.target not in self.constants else _to_meta(self.constants[node.target])
        args = map_arg(node.args, lambda n: n.meta["val"])
        kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
        if node.target is getattr and args[1] == "device":
            return self.device
        self.busy = True
        try:
            return _run(node, args, kwargs, self.skeleton)
        except TraceError:
            raise
        except Exception as error:  # whatever the operation raises on the example is the user's to see
            what = node.target if _isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
            raise TraceError(f"{node.meta['where']}: {what} failed on the example inputs: {str(error).splitlines()[0] if str(error) else error!r}") from error
        finally:
            self.busy = False

    def shape_of(self, proxy: ShapeProxy) -> ShapeTuple:
        node = proxy.node
        if node not in self._shapes:
            self._shapes[node] = ShapeTuple(self.create_proxy("call_method", "size", (proxy, i), {}) for i in range(proxy.value.ndim))
        return self._shapes[node]

    def _constant(self, tensor: torch.Tensor) -> str:
        name = self.skeleton.attribute_names.get(id(tensor))
        if name is None:
            base = f"{self.path}._tensor_constant" if self.path else "_tensor_constant"
            name = next(n for n in (f"{base}{i}" for i in range(len(self.constants), 1 << 30)) if n not in self.constants)
            self.skeleton.attribute_names[id(tensor)] = name
            self.skeleton.keep_alive.append(tensor)
        self.constants[name] = tensor
        return name

    def specialised(self, proxy: ShapeProxy, what: str) -> None:
        node = proxy.node
        seen: set[fx.Node] = set()
        todo = [node]
        while todo:  # a fact about channels or literals alone is no loss: only a size of an input's own dimension is
            n = todo.pop()
            if n in seen:
                continue
            seen.add(n)
            if n.op == "call_method" and n.target == "size":
                self.notes[f"{self.here()}: {what} was specialised to the example inputs"] = None
                return
            todo.extend(n.all_input_nodes)

    def here(self) -> str:
        frame = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if not file.startswith(_SKIPPED_FILES[0]) and file not in _SKIPPED_FILES and not file.startswith("<"):
                return f"{file}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return "<unknown>"


def _qualified(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _run(node: fx.Node, args: Any, kwargs: Any, skeleton: Skeleton) -> Any:
    if node.op == "call_module":
        module = skeleton.module(node.target)
        found = None if kwargs else shapes.quick(module, args)
        return module.forward(*args, **kwargs) if found is None else found
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs = {**kwargs, "device": "meta"}
    if node.op == "call_method":
        if node.target in ("cpu", "cuda"):
            return args[0]
        if node.target == "to":
            args = tuple("meta" if _is_device(a) else a for a in args)
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    if getattr(node.target, "__name__", "") in _FACTORIES + _RANDOM_FACTORIES and getattr(torch, node.target.__name__, None) is not None:
        kwargs = {**kwargs, "device": "meta"}
    return node.target(*args, **kwargs)


def _is_device(a: Any) -> bool:
    return _isinstance(a, torch.device) or _isinstance(a, str)


def _to_meta(value: Any) -> Any:
    if _isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if _isinstance(value, dict):
        return {k: _to_meta(v) for k, v in value.items()}
    if _isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_meta(v) for v in value))
    if _isinstance(value, (tuple, list)):
        return type(value)(_to_meta(v) for v in value)
    return value


@contextlib.contextmanager
def _patched(tracer: ShapeTracer) -> Iterator[None]:
    """While tracing: factories record, ``isinstance`` sees through proxies, attention takes its written-out path."""
    saved = {name: getattr(torch, name) for name in _FACTORIES + _RANDOM_FACTORIES}

    def recorder(original: Any, always: bool) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            found = always
            if not found:
                flat = [*args, *kwargs.values(), *(i for a in args if _isinstance(a, (tuple, list)) for i in a)]
                flat += [i for a in kwargs.values() if _isinstance(a, (tuple, list)) for i in a]
                found = any(_isinstance(a, fx.Proxy) for a in flat)
            if tracer.busy or not found:
                return original(*args, **kwargs)
            return tracer.create_proxy("call_function", original, args, kwargs)

        return record

    def isinstance_(obj: Any, cls: Any) -> bool:
        if type(obj) in (ShapeProxy, ShapeAttribute) and not _isinstance(obj, cls):
            return _isinstance(obj.value, cls)
        return _isinstance(obj, cls)

    def wrapped(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = not tracer.busy and _find_proxy(args, kwargs) is not None
            return tracer.create_proxy("call_function", original, args, kwargs) if found else original(*args, **kwargs)

        return call

    def noted(original: Any, what: str) -> Any:
        def enter(context: Any) -> Any:
            if not tracer.busy:
                tracer.notes[f"{tracer.here()}: a {what} block cannot be kept in a graph; the slim module computes without it"] = None
            return original(context)

        return enter

    blocks = [(torch.no_grad, "no_grad"), (torch.enable_grad, "enable_grad"), (torch.autocast, "autocast")]
    entered = [(cls, cls.__enter__) for cls, _ in blocks]
    for cls, what in blocks:
        cls.__enter__ = noted(cls.__enter__, what)  # type: ignore[attr-defined]
    # fx's own wrapper expects one proxy back; a function that is traced into may return anything.
    wrapper, symbolic._create_wrapped_func = symbolic._create_wrapped_func, wrapped
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for name, original in saved.items():
        setattr(torch, name, recorder(original, name in _RANDOM_FACTORIES))
    builtins.isinstance = isinstance_  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = _isinstance
        for cls, enter in entered:
            cls.__enter__ = enter  # type: ignore[attr-defined]
        symbolic._create_wrapped_func = wrapper
        for name, original in saved.items():
            setattr(torch, name, original)
        torch.backends.mha.set_fastpath_enabled(fast)


def trace(
    model: nn.Module, example_inputs: Any, is_known: Callable[[nn.Module], bool], has_rule: Callable[[Any], bool] = lambda _: False
) -> TracedModel:
    """Trace ``model`` in evaluation mode and, where the traced code reads ``self.training``, in training mode as well.

    ``is_known(module)`` says whether a module is kept whole as one node; ``has_rule(function)`` whether a wrapped function is. A submodule
    that cannot be traced is kept whole. Raises ``TraceError`` with the line of the user's source where tracing of the root stopped.
    """
    skeleton = Skeleton(model, is_known)
    found = TracedModel(skeleton, {}, {})
    add_traced(found, "", call_form(example_inputs), is_known, has_rule)
    return found


def add_traced(
    traced: TracedModel, path: str, example: tuple[tuple[Any, ...], dict[str, Any]], is_known: Callable[[nn.Module], bool], has_rule: Callable[[Any], bool]
) -> None:
    """Trace the module at ``path`` and add its graphs, "eval" and where it differs "train", under ``path:`` for a part of the model."""
    skeleton = traced.skeleton
    device = next((t.device for t in _tensors(example)), torch.device("cpu"))
    blocked: dict[str, str] = {}
    prefix = f"{path}:" if path else ""

    def attempt(training: bool) -> tuple[ShapeTracer, fx.Graph]:
        while True:
            tracer = ShapeTracer(skeleton, is_known, {*traced.opaque, *blocked}, device, has_rule, path)
            try:
                return tracer, _one(tracer, example, training)
            except TraceError as error:
                culprit = tracer.stack[-1] if tracer.stack else ""
                if not culprit or culprit in blocked:
                    raise
                blocked[culprit] = str(error)

    skeleton.training_was_read = False
    tracer, graph = attempt(training=False)
    graphs, notes, constants = {"eval": graph}, dict(tracer.notes), dict(tracer.constants)
    if skeleton.training_was_read:
        try:
            second, graph = attempt(training=True)
            if not _same(graphs["eval"], graph):
                graphs["train"] = graph
                notes.update(second.notes)
                constants.update(second.constants)
        except TraceError as error:
            notes[f"training mode could not be traced, the slim module computes as in evaluation mode there: {error}"] = None
    traced.graphs.update({prefix + mode: g for mode, g in graphs.items()})
    traced.constants.update(constants)
    traced.opaque.update(blocked)
    traced.notes = tuple(dict.fromkeys((*traced.notes, *notes)))


def _one(tracer: ShapeTracer, example: Any, training: bool) -> fx.Graph:
    tracer.skeleton.set_training(training)
    try:
        graph = tracer.run(example)
    except (TraceError, InputError):
        raise
    except Exception as error:  # the user's forward may raise anything when it meets a proxy
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(f"{_where(error)}: {type(tracer.skeleton.original).__name__} could not be traced: {first}") from error
    eliminate(graph)
    return graph


def _where(error: BaseException) -> str:
    frame, found = error.__traceback__, "<unknown>"
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not file.startswith(_SKIPPED_FILES[0]) and file not in _SKIPPED_FILES and not file.startswith("<"):
            found = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found


def impure(node: fx.Node) -> bool:
    """Whether a node must stay though nothing uses its result: it writes into a tensor, checks something, or is an edge."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_module":
        return True
    name = getattr(node.target, "__name__", "")
    if node.target is operator.setitem or name in ("_assert", "_assert_async") or node.kwargs.get("out") is not None:
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    return node.kwargs.get("inplace") is True or (node.target in _INPLACE and bool(node.args) and _isinstance(node.args[0], fx.Node))


_INPLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior}


def eliminate(graph: fx.Graph) -> bool:
    """Remove nodes nothing uses. In-place writes stay; those on plain numbers (``n += 1``) do not count as writes."""
    changed = False
    for node in reversed(list(graph.nodes)):
        if node.users:
            continue
        if impure(node) and not (node.target in _INPLACE and not _isinstance(node.args[0].meta.get("val"), torch.Tensor)):
            continue
        graph.erase_node(node)
        changed = True
    return changed


def _same(a: fx.Graph, b: fx.Graph) -> bool:
    first, second = list(a.nodes), list(b.nodes)
    if len(first) != len(second):
        return False
    number = {n: i for i, n in enumerate(first)} | {n: i for i, n in enumerate(second)}

    def shape(node: fx.Node) -> Any:
        return node.op, node.target, repr(map_arg((node.args, node.kwargs), lambda n: number[n]))

    return all(shape(x) == shape(y) for x, y in zip(first, second, strict=True))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if _isinstance(value, torch.Tensor):
        yield value
    elif _isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif _isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)
