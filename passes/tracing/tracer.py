"""The tracer: ``torch.fx``'s own, with proxies that know the value they had on the example inputs.

Each value is computed on the meta device while tracing. Control flow over shapes is answered from it (and reported, since it was
specialised); arithmetic over sizes stays in the graph, so that batch and resolution stay as dynamic as they were. ``Tensor.shape`` is
unpacked into one ``size(i)`` node per dimension, so that every later pass meets integers, never a ``torch.Size``.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import inspect
import operator
import os
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import is_dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.utils.rnn import PackedSequence

from fxprune import errors
from fxprune.errors import InputError, TraceError
from fxprune.passes.compat import OpOverload, assert_true, tree_map
from fxprune.passes.ir import objects
from fxprune.passes.ir.constants import evaluate
from fxprune.passes.ir.nodes import CHANGING, changes, is_no_tensor, is_read, reads, sources
from fxprune.passes.ir.notes import Note, NoteKind
from fxprune.passes.ir.skeleton import Skeleton
from fxprune.passes.ir.writes import is_rewritten
from fxprune.passes.tracing import aten, checks
from fxprune.passes.tracing import decompositions as openers
from fxprune.passes.tracing.graph_inputs import graph_of, interpret, origin
from fxprune.passes.tracing.meta_execution import execute, hides_structure, run_for_real, to_meta, with_numbers
from fxprune.passes.tracing.patching import patched
from fxprune.passes.tracing.proxies import ShapeProxy, ShapeTuple
from fxprune.passes.tracing.recorder import Recorder
from fxprune.passes.tracing.side_effects import gradients
from fxprune.passes.tracing.sizes import counted, read_values
from fxprune.passes.tracing.sizes import fixed_sizes as extents
from fxprune.passes.tracing.sizes.specialisation import Asked

_isinstance = builtins.isinstance
# Frames of these are not the user's: torch, the passes, and all of fxprune but its networks.
_FOLDERS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)), os.path.dirname(errors.__file__))
_SKIPPED = (*(f"{folder}{os.sep}" for folder in _FOLDERS), contextlib.__file__, "<")
_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}  # which torch takes for a dtype
_OF_DTYPES = (torch.finfo, torch.iinfo, "element_size")  # the functions themselves: they are patched while tracing
_LISTED = 1024  # numbers that ``tolist()`` gives, at most: each is a node
_NETWORKS = os.path.join("fxprune", "models.py")


class ShapeTracer(fx.Tracer):
    """``fx.Tracer`` whose proxies know their values; see the module's docstring."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        skeleton: Skeleton,
        is_known: Callable[[nn.Module], bool],
        opaque: set[str],
        device: torch.device,
        has_rule: Callable[[Any], bool],
        path: str = "",
    ) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.skeleton, self.is_known, self.opaque, self.device, self.has_rule, self.path = (
            skeleton,
            is_known,
            opaque,
            device,
            has_rule,
            path,
        )
        self.notes: dict[Note, None] = {}
        self.asked = Asked(self.notes)
        self.given: dict[fx.Node, Any] = {}  # what the example has for each input
        self.flags: set[fx.Node] = set()  # those that the graph holds to what they are on the example
        self.read: set[str] = set()
        self.writes: set[str] = set()  # buffers and parameters that the graph writes
        self.changing: set[str] = set()  # buffers that forward writes, of which code reads values
        self.graph_is_training = False
        self.busy = False  # running an operation for its shape: nothing is recorded meanwhile
        self.gradients = True  # the code at work is in no block without them
        self.own_backward = False  # the code at work is that of a function with one
        self.devices: list[tuple[Any, torch.device]] = []  # of the blocks at work, and torch's own around each
        self.returning = False  # forward is through: what is recorded now is its result
        self.thread = threading.get_ident()
        self.stack: list[str] = []  # names of the modules and functions at work, outermost first
        self.failed = ""  # what was kept whole and could not be run either
        self.source: fx.Node | None = None  # the node being traced, where the module is a graph already
        self._shapes: dict[fx.Node, ShapeTuple] = {}
        self._attributes: dict[str, ShapeProxy] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.made: list[weakref.ref[ShapeProxy]] = []
        self.in_mode: set[str] = set()  # modules that were called

    @property
    def recording(self) -> bool:
        return not self.busy and threading.get_ident() == self.thread

    @contextlib.contextmanager
    def entered(self, name: str) -> Iterator[None]:
        """``name``, a module or a function that is traced into, is at work. An error remembers what was where it came from."""
        self.stack.append(name)
        try:
            yield
        except BaseException as error:
            if not hasattr(error, "traced_within"):
                with contextlib.suppress(AttributeError):  # an exception with slots
                    error.traced_within = tuple(self.stack)  # type: ignore[attr-defined]
            raise
        finally:
            self.stack.pop()

    # -- what fx asks of a tracer -------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> ShapeProxy:
        made = ShapeProxy(node, self)
        self.made.append(weakref.ref(made))
        return made

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or _isinstance(m, torch.jit.ScriptModule) or self.is_known(m)

    def path_of_module(self, mod: nn.Module) -> str:
        return self.skeleton.module_names[mod]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (
            not self.recording or m not in self.skeleton.module_names
        ):  # made in forward, or held where torch does not look: its code is seen
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name) and not any(_isinstance(t, fx.Proxy) for t in (*m._parameters.values(), *m._buffers.values())):
            if not _isinstance(m, torch.jit.ScriptModule):
                _fitting(getattr(m.forward, "__func__", m.forward), _isinstance(m.forward, types.MethodType), len(args), tuple(kwargs))
            self._called(m, name)
            return self.create_proxy("call_module", name, args, kwargs)
        graph = graph_of(m)
        with self.entered(name):
            return forward(*args, **kwargs) if graph is None else interpret(self, m, graph, args, kwargs)

    def _called(self, m: nn.Module, name: str) -> None:
        """Remember in which mode a module is called where forward itself has set that."""
        mode, flag = self.graph_is_training, _mode(m)
        held = self.skeleton.held["train" if mode else "eval"]
        if flag == held.get(name, mode):
            self.in_mode.add(name)
        elif name in self.in_mode:
            self.note(
                NoteKind.MODE, f"forward calls {name!r} in training and in evaluation mode; the slim module has it in one", self.here()
            )
        else:
            for path, module in m.named_modules(remove_duplicate=False):
                held[f"{name}.{path}" if path else name] = _mode(module)
            self.in_mode.add(name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self.recording or not _isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self.skeleton.tensor_names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if kind == "call_function" and not self.busy:
            if _isinstance(target, OpOverload) and (function := aten.opened(target, super().create_proxy)) is not None:
                return function(*args, **kwargs)
            body = openers.OPENERS.get(target) if _isinstance(target, types.FunctionType) else None
            body = body or (target if self._is_wrapped(target) else None)
            if body is not None:
                with self.entered(_qualified(target)):
                    return body(*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def aside(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Graph:
        """``function(*args)`` traced into a graph of its own, with an input for every proxy in the order in which fx meets them."""
        outer = self.graph, self._shapes, self._attributes
        self.graph, self._shapes, self._attributes = fx.Graph(), {}, {}

        def given(value: Any) -> Any:
            if _isinstance(value, ShapeTuple):
                return ShapeTuple(map(given, value))
            if not _isinstance(value, ShapeProxy):
                return value
            made = self.create_proxy("placeholder", f"input_{len(self.graph.nodes)}", (), {})
            made.node.meta.update({key: value.node.meta[key] for key in ("val", read_values.OTHER) if key in value.node.meta})
            return made

        try:
            self.graph.output(self.create_arg(function(*tree_map(given, args))))
            return self.graph
        finally:
            self.graph, self._shapes, self._attributes = outer

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
        if _isinstance(a, np.ndarray) and a.dtype.kind in "biufc":
            a = torch.from_numpy(a.copy())
        if _isinstance(a, torch.Tensor):
            name = self.skeleton.tensor_names.get(id(a)) or self._constant(a)
            return self.create_node("get_attr", name, (), {})
        if _isinstance(a, PackedSequence):  # its constructor looks at its parts, so no node may hold one in its arguments
            return self.create_node("call_function", PackedSequence, tuple(self.create_arg(part) for part in a), {})
        if _isinstance(a, np.generic):
            return a.item()
        if _isinstance(a, type) and a in _DTYPES:
            return _DTYPES[a]
        if _isinstance(a, torch.Generator):
            raise TraceError(f"{self.here()}: numbers are drawn from a torch.Generator, which a graph cannot hold; leave out generator=")
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, ([(k, self.create_arg(v)) for k, v in a.items()],), {})
        # An object in an argument would be another than the one that the call is given, and what the call does to it would be lost.
        if self.returning and not self.path:
            return self._result(a)
        if _isinstance(a, dict) and type(a) not in (dict, fx.immutable_collections.immutable_dict):
            return self.create_node("call_function", type(a), (), {k: self.create_arg(v) for k, v in a.items()})
        return super().create_arg(a)

    def _result(self, a: Any, state: bool = False) -> Any:
        """A part of what forward returns. Objects that are no containers are made of what they hold; one with the name of an argument of
        forward (a cache of keys and values) is ``state``."""
        if objects.is_plain(a) and not is_dataclass(a):
            make = objects.made_state if state else objects.made_object
            try:
                return objects.parts(a, self.create_arg, make, lambda target, args: self.create_node("call_function", target, args, {}))
            except (ValueError, NotImplementedError) as error:
                raise TraceError(
                    f"{_place(self.module) or self.here()}: forward returns a {type(a).__name__}, which a graph cannot make: {error}"
                ) from error
        if _isinstance(a, dict):
            known = inspect.signature(self.module.forward).parameters
            held = {
                key: self._result(value, key in known) if objects.is_plain(value) else self.create_arg(value) for key, value in a.items()
            }
            plain = type(a) in (dict, fx.immutable_collections.immutable_dict)
            return held if plain else self.create_node("call_function", type(a), (), held)
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None) -> fx.Node:
        if target == "self" and name is None:  # a node of this name would hide the module in the code that fx writes
            name = "self_"
        node = self.graph.create_node(kind, target, args, kwargs, name, None)
        node.meta["where"] = self.here()
        node.meta["owner"] = self._owner()
        if kind == "get_attr" and target in self.changing:
            node.meta[CHANGING] = True
        if not self.gradients and kind != "get_attr" and target is not getattr:  # these are recorded when they are first read
            node.meta[gradients.MARK] = True
        if kind not in ("placeholder", "output"):
            try:
                node.meta["val"] = self._value(node)
            except TraceError:  # the code may catch it and go on without the call
                self.graph.erase_node(node)
                raise
        return node

    def _owner(self) -> str:
        own = origin(self.source, is_skipped)[1] if self.source is not None else ""
        return next((n for n in (own, *reversed(self.stack)) if self.skeleton.module_or_none(n) is not None), self.path)

    def _absent(self, name: str, last: bool) -> Any:
        """None, for an input that is. Callers go on passing it, so the graph takes it, and no other value."""
        given = self.graph.create_node("placeholder", name, (None,) if last else (), {})
        given.meta.update(val=None, where=self.here(), owner=self.path)
        self._promise(operator.is_, given, None, f"{name} was None when the module was traced")
        return None

    def _promise(self, holds: Any, node: fx.Node, value: Any, otherwise: str) -> None:
        """The graph raises ``otherwise`` where what ``node`` gives is another than ``value``, that of the example."""
        same = self.graph.call_function(holds, (node, value))
        check = self.graph.call_function(assert_true, (same, otherwise))
        for made, found in ((same, True), (check, None)):
            made.meta.update(val=found, where=self.here(), owner=self._owner())

    def _say_left_out(self, bound: inspect.BoundArguments) -> None:
        names = [p.name for p in bound.signature.parameters.values() if p.default is not p.empty and p.name not in bound.arguments]
        if names:
            several = "arguments" if len(names) > 1 else "argument"
            text = f"the slim module does not take forward's optional {several} {', '.join(names)}, which the example leaves out"
            self.note(NoteKind.LOST, text, _place(self.module))

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        args, kwargs = self.example
        flat: list[Any] = []

        def placeholder(name: str, value: Any, default: tuple[Any, ...] = ()) -> Any:
            proxy = self.create_proxy("placeholder", name, default, {})
            proxy.node.meta["val"] = to_meta(value)
            self.given[proxy.node] = value
            proxy.node.meta["given"] = tree_map(lambda v: v, proxy.node.meta["val"])  # code may change a list
            proxy.node.meta["example"] = value if not _isinstance(value, (torch.Tensor, dict, list, tuple)) else None
            flat.append(proxy)
            return proxy

        try:
            bound = inspect.signature(self.module.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"example_inputs do not fit {type(self.module).__name__}.forward: {error}") from error
        pos: list[Any] = []
        named: dict[str, Any] = {}
        last = max((i for i, v in enumerate(bound.arguments.values()) if v is not None), default=-1)
        defaults = _defaults(bound)
        if not self.path:
            self._say_left_out(bound)
        for param in bound.signature.parameters.values():
            if param.name not in bound.arguments:
                continue
            value = bound.arguments[param.name]
            if param.kind is param.VAR_POSITIONAL:
                pos.extend(placeholder(f"{param.name}_{i}", v) for i, v in enumerate(value))
            elif param.kind is param.VAR_KEYWORD:
                given = list(value.values())
                for i, (key, v) in enumerate(value.items()):
                    named[key] = placeholder(key, v) if v is not None else self._absent(key, not any(w is not None for w in given[i:]))
            else:
                later = list(bound.arguments).index(param.name) > last
                default = defaults.get(param.name, ())
                made = placeholder(param.name, value, default) if value is not None else self._absent(param.name, later)
                if param.kind is param.KEYWORD_ONLY or param.name in kwargs:
                    named[param.name] = made
                else:
                    pos.append(made)
        module = self.module
        graph = graph_of(module)

        around = bool(module._forward_hooks or module._forward_pre_hooks) or type(module).__call__ is not nn.Module.__call__

        def call(*_: Any) -> Any:
            self.returning = False
            if graph is not None:
                found = interpret(self, module, graph, tuple(pos), named)
            else:
                found = module(*pos, **named) if around else module.forward(*pos, **named)
            self.returning = True
            return found

        return call, flat

    def run(
        self, example: tuple[tuple[Any, ...], dict[str, Any]], isolation: Callable[[Recorder], AbstractContextManager[None]]
    ) -> fx.Graph:
        """Trace the module at ``path``. ``isolation(tracer)``: what is to hold meanwhile for what forward keeps outside of its modules."""
        self.example, self.module = example, self.skeleton.module(self.path)
        try:
            with torch.no_grad(), patched(self), isolation(self):
                # As a function: fx would search a root module for tensors held as attributes, which the skeleton knows already.
                return self.trace(lambda: None)
        finally:
            self._shapes.clear()
            self._attributes.clear()

    # -- values -------------------------------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            name = str(node.target)
            return to_meta(self.constants[name]) if name in self.constants else self.skeleton.tensor(name)
        args = map_arg(node.args, lambda n: n.meta["val"])
        kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
        if node.target is getattr and args[1] == "device":
            return self.device
        self.busy = True
        try:
            if is_read(node):
                source = node.all_input_nodes[0]
                known = self.actual(source)
                return read_values.number(node, self._of_inputs(source) if known is None else known)
            if read_values.among(node):
                return read_values.computed(node, lambda args, kwargs: execute(node, args, kwargs, self.skeleton))
            some = counted.picked(node, args, kwargs)
            return execute(node, args, kwargs, self.skeleton) if some is None else self._picked(node, *some)
        except TraceError:
            raise
        except Exception as error:  # whatever the operation raises on the example is the user's to see
            if hides_structure(node, self.opaque, self.skeleton):
                return self._value_by_running(node, args, kwargs)
            if (numbers := with_numbers(node, self._number, self.skeleton)) is not None:
                return numbers
            what = node.target if _isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
            kind: Any = type(error)
            raise _failure(kind)(
                f"{node.meta['where']}: {what} failed on the example inputs: {str(error).splitlines()[0] if str(error) else error!r}"
            ) from error
        finally:
            self.busy = False

    def _picked(self, node: fx.Node, found: Any, rows: int) -> Any:
        """What values pick: as many as there can be, or those that there are where no input is among the values."""
        node.meta["val"] = found
        known = self.actual(node)
        if known is not None:
            return to_meta(known)
        counted.mark(node, rows)
        return found

    def refuse_block(self, what: str) -> None:
        """A module without children that needs the block in training (autocast) is better kept whole."""
        name = self.stack[-1] if self.stack else ""
        module = self.skeleton.module_or_none(name)
        if module is not None and not module._modules and module.__dict__["training"] and self.graph_is_training:
            error = TraceError(f"{self.here()}: it computes in a {what} block, which a graph cannot keep")
            error.needs_training = True
            raise error

    def _value_by_running(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            return run_for_real(node, args, kwargs, self.skeleton)
        except Exception as error:  # the user's code again
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.failed = str(node.target)
            raise TraceError(f"{node.meta['where']}: {node.target} failed on tensors of ones of the example's shapes: {first}") from error

    def actual(self, node: fx.Node, given: Mapping[fx.Node, torch.Tensor] | None = None) -> Any:
        """The values of a tensor (or of several) that depends on no inputs but those that are ``given``, or None."""
        before, self.busy = self.busy, True
        try:
            return evaluate(node, self._named, dict(given or {}))
        finally:
            self.busy = before

    def of_example(self, node: fx.Node) -> torch.Tensor | None:
        """The example's value of a whole number that is computed from the inputs alone (``lengths.max()``), or None."""
        value = node.meta["val"]
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            return None
        return self._of_inputs(node)

    def _of_inputs(self, node: fx.Node) -> torch.Tensor | None:
        if node.meta["val"].numel() != 1:
            return None
        if not any(map(changes, sources(node))):
            return None
        held = {n: self.skeleton.real(str(n.target)) for n in sources(node) if CHANGING in n.meta}
        known = {n: _valued(v) for n, v in self.given.items() if isinstance(v, torch.Tensor) and not (v.is_floating_point() and v.is_meta)}
        known.update((n, tensor) for n, tensor in held.items() if not tensor.is_meta)
        found: torch.Tensor | None = self.actual(node, known)
        return found

    def _number(self, node: fx.Node) -> Any:
        known = self.actual(node)
        return self.of_example(node) if known is None else known

    def _named(self, name: str) -> torch.Tensor | None:
        if name in self.changing:
            return None
        tensor = self.constants.get(name)
        tensor = self.skeleton.real(name) if tensor is None else tensor
        return tensor if tensor.device.type != "meta" else None

    def default_device(self) -> torch.device:
        before, self.busy = self.busy, True  # it makes a tensor
        try:
            return torch.get_default_device()
        finally:
            self.busy = before

    def frozen(self, graph: fx.Graph | None) -> set[str]:
        """The buffers that the graph writes and of which code has read values, so that these would be those of the first call for good."""
        if graph is None:  # the trace did not begin
            return set()
        self.writes = {str(n.target) for n in graph.find_nodes(op="get_attr") if is_rewritten(n)}
        return self.writes & self.read

    def shape_of(self, proxy: ShapeProxy) -> ShapeTuple:
        node = proxy.node
        if node not in self._shapes:
            self._shapes[node] = ShapeTuple(self.create_proxy("call_method", "size", (proxy, i), {}) for i in range(proxy.value.ndim))
        return self._shapes[node]

    def _constant(self, tensor: torch.Tensor) -> str:
        name = self.skeleton.attribute_names.get(id(tensor))
        if name is not None and self.constants.get(name, tensor) is not tensor:  # the name of an earlier trace
            name = None
        if name is None and tensor.is_meta and not any(p.is_meta for p in self.skeleton.original.parameters()):
            raise TraceError(f"{self.here()}: forward computes with parameters or buffers that it reached past their names (state_dict())")
        if name is None or (self.path and not name.startswith(f"{self.path}.")):
            base = f"{self.path}._tensor_constant" if self.path else "_tensor_constant"
            taken = self.constants.keys() | self.skeleton.taken
            name = next(n for n in (f"{base}{i}" for i in range(len(self.constants), 1 << 30)) if n not in taken)
            self.skeleton.attribute_names[id(tensor)] = name
            self.skeleton.keep_alive.append(tensor)
        self.constants[name] = tensor
        return name

    def note(self, kind: NoteKind, text: str, where: str = "") -> None:
        """Note something that a user should know, once."""
        self.notes[Note(kind, text, where)] = None

    def specialised(self, proxy: ShapeProxy, what: str) -> None:
        """Code asked for a number: it is reported if a size of an input's own dimension is in it; channels and literals are no loss.

        A branch on the dtype is reported where ``half()`` would take the other one.
        """
        given: Any = proxy.node.args
        compared = [a.meta["val"] if _isinstance(a, fx.Node) else a for a in given]
        if proxy.node.target in (operator.eq, operator.ne) and any(_isinstance(a, torch.dtype) for a in compared):
            if all(_isinstance(a, torch.dtype) and (a.is_floating_point or a.is_complex) for a in compared):
                self.note(NoteKind.DTYPE, f"a branch on the dtype was specialised to {compared[0]}", self.here())
            return
        if _of_dtype(proxy.node):
            self.note(NoteKind.DTYPE, f"{what}, which follows from a dtype, was specialised", self.here())
        if self.path and self.recording and _is_flag(proxy.node):
            self._held(proxy.node, what)
            return
        if counted.by_values(proxy.node, self.skeleton.module):
            raise TraceError(f"{self.here()}: {what} is how many elements of a tensor are true, which only its values say")
        if reads(proxy.node):
            raise TraceError(f"{self.here()}: {what.partition(' on the value ')[0]} {checks.OF_VALUES}")
        if extents.depends(proxy.node, self.skeleton.module) is not None:
            self.asked.add(Note(NoteKind.SIZE, f"{what} was specialised to the example inputs", self.here()), self.source)

    def _held(self, node: fx.Node, what: str) -> None:
        """Code that is not traced may give a part other flags than on the example: the graph takes those that it was traced with alone."""
        if node in self.flags:
            return
        self.flags.add(node)
        text = f"{self.here()}: the part {self.path!r} was traced with {what} and takes no other"
        self._promise(operator.eq, node, node.meta["val"], text)

    def moves(self, value: Any) -> bool:
        """Whether ``value`` is the proxy of a number that a size of the input enters, or that is an input, or of a tensor of one that
        holds nothing else."""
        if not _isinstance(value, ShapeProxy):
            return False
        if _isinstance(value.value, torch.Tensor):
            if value.value.numel() != 1:
                return False
            sized = extents.depends(value.node, self.skeleton.module) is not None and self.actual(value.node) is not None
            return sized or self.of_example(value.node) is not None
        return type(value.value) in (int, float) and extents.depends(value.node, self.skeleton.module) is not None

    def follows(self, value: Any) -> bool:
        """Whether a number that code reads from ``value`` is recorded: it is the proxy of a tensor of one that the inputs enter."""
        tensor: Any = value.value if _isinstance(value, ShapeProxy) else None
        if not _isinstance(tensor, torch.Tensor) or tensor.numel() != 1 or tensor.is_complex():
            return False
        return any(map(changes, sources(value.node))) and self.actual(value.node) is None

    def lists(self, proxy: ShapeProxy) -> bool:
        """Whether the numbers of a tensor are recorded, each for itself: inputs enter them, and there are as many at every call."""
        tensor = proxy.value
        if not 0 < tensor.numel() <= _LISTED or tensor.is_complex():
            return False
        if not tensor.ndim:
            return self.moves(proxy) or self.follows(proxy)
        known = not any(map(changes, sources(proxy.node))) or self.actual(proxy.node) is not None
        return not known and all(extents.is_fixed(proxy.node, axis, self.skeleton.module) for axis in range(tensor.ndim))

    def unrolled(self, proxy: ShapeProxy) -> None:
        """Code loops over a tensor, or over the parts of one."""
        if counted.in_parts_by_values(proxy.node, self.skeleton.module):
            raise TraceError(f"{self.here()}: a loop goes over what is true in a tensor, and only its values say how much that is")
        count = extents.loop(proxy.node, self.skeleton.module, _is_unpacking(sys._getframe(2)))
        if count is not None and any(n.op == "placeholder" for n in sources(proxy.node)):  # all else is as long at any size
            self.note(NoteKind.SIZE, f"loop over a dimension of {count} was specialised to the example inputs", self.here())

    def mapped(self, given: Any, axis: int) -> int:
        """How often ``torch.vmap`` calls its function for ``given``: once for each that the example has, and another number is refused."""
        if not _isinstance(given, ShapeProxy):
            return int(given.shape[axis])
        count = int(given.value.shape[axis])
        if not extents.is_fixed(given.node, axis % given.value.ndim, self.skeleton.module):
            text = f"torch.vmap over {count} was specialised to the example inputs"
            self.note(NoteKind.SIZE, f"{text}; the slim module takes no other number", self.here())
            size = self.graph.call_method("size", (given.node, axis))
            size.meta.update(val=count, where=self.here(), owner=self._owner())
            self._promise(operator.eq, size, count, f"{self.here()}: {text}, and takes no other number")
        return count

    def here(self) -> str:
        known = origin(self.source, is_skipped)[0] if self.source is not None else ""
        if known:
            return known
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if not is_skipped(file):
                return f"{file}:{frame.f_lineno}"
            frame = frame.f_back
        return "<unknown>"


def is_skipped(file: str) -> bool:
    """Whether a frame of this file says nothing about the user's source."""
    return file.startswith(_SKIPPED) and not file.endswith(_NETWORKS)


def _qualified(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _defaults(bound: inspect.BoundArguments) -> dict[str, tuple[Any, ...]]:
    """The numbers and texts that arguments of the example have in ``forward`` where they are left out, from the last one on."""
    found: dict[str, tuple[Any, ...]] = {}
    for param in reversed([p for p in bound.signature.parameters.values() if p.name in bound.arguments]):
        plain = param.default is not param.empty and type(param.default) in (bool, int, float, str)
        if param.kind in (param.VAR_POSITIONAL, param.VAR_KEYWORD) or not (plain or bound.arguments[param.name] is None):
            break
        if plain:
            found[param.name] = (param.default,)
    return found


def _valued(given: torch.Tensor) -> torch.Tensor:
    """An input with values; those of an example on the meta device do not matter to a graph, and are ones."""
    return torch.ones(given.shape, dtype=given.dtype) if given.is_meta else given


def _place(module: nn.Module) -> str:
    """file:line of its ``forward``; empty where that is no Python code."""
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


@functools.cache
def _fitting(forward: Callable[..., Any], bound: bool, given: int, named: tuple[str, ...]) -> None:
    """Raise the ``TypeError`` that a call with so many arguments and these keywords raises, where it raises one: code may catch it."""
    inspect.signature(forward).bind(*[None] * (given + bound), **dict.fromkeys(named))


@functools.cache
def _failure(kind: Any) -> type[TraceError]:
    """What is raised where an operation fails with ``kind``: code that tries one call and then another catches it as it does in a run."""
    caught = next((known for known in (TypeError, ValueError, IndexError, RuntimeError) if issubclass(kind, known)), None)
    if caught is None or issubclass(kind, NotImplementedError):  # which says that there is no kernel without values
        return TraceError
    return type("TraceError", (TraceError, caught), {"__module__": TraceError.__module__})


def _is_unpacking(frame: FrameType) -> bool:
    """Whether code has names for what it takes apart: ``a, b = ...``."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] == "UNPACK_SEQUENCE"


def _of_dtype(node: fx.Node) -> bool:
    """Whether a condition or number is computed of how many bytes the elements of a tensor have, or of the limits of a dtype."""
    return any(
        n.target in _OF_DTYPES or (n.target is getattr and n.args[1] == "itemsize")  # the latter of a dtype
        for n in sources(node, is_no_tensor)
    )


def _mode(module: nn.Module) -> bool:
    """Its mode, for which the code that is traced does not ask by this. A scripted module answers for itself."""
    flag = vars(module).get("training")
    return bool(module.training if flag is None else flag)


def _is_flag(node: fx.Node) -> bool:
    """Whether a number, text or condition is made of such inputs alone, none of a tensor's."""
    todo, seen = [node], {node}
    while todo:
        one = todo.pop()
        if type(one.meta.get("val")) not in (bool, int, float, str) or one.op in ("get_attr", "call_module"):
            return False
        todo += [n for n in one.all_input_nodes if n not in seen]
        seen.update(one.all_input_nodes)
    return True
