"""Proxies that know the value they had on the example inputs: control flow over shapes is answered, arithmetic is recorded."""

from __future__ import annotations

import builtins
import math
import operator
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.errors import TraceError
from fxprune.passes import compat
from fxprune.passes.ir.constants import held
from fxprune.passes.ir.nodes import AUGMENTED, RESHAPING
from fxprune.passes.ir.notes import NoteKind
from fxprune.passes.tracing import checks, legacy
from fxprune.passes.tracing.recorder import Recorder
from fxprune.passes.tracing.sizes import read_values
from fxprune.passes.tracing.sizes.arithmetic import OF_MATH

# ``isinstance`` is patched while tracing (see ``patching``); here the real one is meant.
_isinstance = builtins.isinstance
_STATIC_ATTRIBUTES = frozenset(
    {"ndim", "requires_grad", "layout", "is_sparse", "is_quantized", "is_nested", "grad", "grad_fn", "is_leaf", "names"}
)
_ON_DEVICES = frozenset({"is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu"})
_STATIC_METHODS = frozenset({"dim", "ndimension", "is_floating_point", "is_complex"})


class ShapeTuple(tuple):  # type: ignore[type-arg]
    """A shape as a tuple of numbers or size proxies, with the methods of ``torch.Size`` that networks use."""

    def numel(self) -> Any:
        return math.prod(self)

    def __getitem__(self, index: Any) -> Any:
        got = tuple.__getitem__(self, index)
        return ShapeTuple(got) if _isinstance(index, slice) else got


# What takes axes alone: their numbers are no sizes of the input, though code may compute them as a tensor.
_OF_AXES = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "flip", "squeeze", "unsqueeze"})


class ShapeProxy(fx.Proxy):
    """A proxy that knows its value on the example inputs."""

    __module__ = "torch"  # where code looks for the library that an array is of (opt_einsum, and what contracts by it)
    tracer: Recorder  # type: ignore[assignment]
    __array_priority__ = 1000  # a NumPy number leaves arithmetic with a proxy to the proxy, as with a tensor

    def __getitem__(self, index: Any) -> Any:
        if _isinstance(self.value, torch.Tensor):
            several = _isinstance(index, tuple) or (_isinstance(index, list) and any(_isinstance(one, slice) for one in index))
            index = tuple(map(self._listed, index)) if several else self._listed(index)
        elif _isinstance(self.value, (tuple, list, dict)) and _isinstance(index, (int, str)) and self._is_none(index):
            return None
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def _is_none(self, index: Any) -> bool:
        """Whether a part that is no tensor is None, which code asks about by ``is``."""
        try:
            return self.value[index] is None
        except (IndexError, KeyError):  # it fails as the code's own would
            return False

    def _listed(self, entry: Any) -> Any:
        """A mask of one dimension that does not depend on the inputs picks what it picks now; how much that is, no shape could tell. Nor
        could it where the ends of a slice are elements of tensors, as in networks that come from ONNX."""
        if _isinstance(entry, (list, np.ndarray)) and _is_mask(entry):
            return np.flatnonzero(entry).tolist()
        if _isinstance(entry, slice):
            return slice(*map(self._known, (entry.start, entry.stop, entry.step)))
        if not _isinstance(entry, ShapeProxy) or not _isinstance(entry.value, torch.Tensor):
            return entry
        known = self.tracer.actual(entry.node) if entry.value.dtype == torch.bool and entry.value.ndim == 1 else None
        if known is None:
            return entry
        for name in sorted(held(entry.node) - self.tracer.constants.keys()):
            self.tracer.note(NoteKind.VALUE, f"a mask was specialised to the value of {name!r}", self.tracer.here())
            self.tracer.read.add(name)
        return known.nonzero().flatten().tolist()

    def _known(self, end: Any) -> Any:
        """An end of a slice that is a tensor of one element, as the number that it is, where that is known."""
        if _isinstance(end, ShapeProxy):
            read = _isinstance(end.value, torch.Tensor) and end.value.numel() == 1
            return end.item() if read and (self.tracer.actual(end.node) is not None or self.tracer.moves(end)) else end
        return operator.index(end) if _isinstance(end, torch.Tensor) else end

    @property
    def value(self) -> Any:
        return self.node.meta["val"]

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        args, kwargs = args or (), kwargs or {}
        tracer: Any = compat.find_proxy(args, kwargs).tracer  # type: ignore[union-attr]
        tracer.asked.recorded(tracer.source)
        if _isinstance(orig_method, compat.ScriptMethod):
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
                if name in ("requires_grad", "grad_fn", "is_leaf") and self.tracer.recording and self.node.op != "get_attr":
                    text = f"{name} of a computed tensor was read as without gradients; a branch on it stays as traced"
                    self.tracer.note(NoteKind.LOST, text, self.tracer.here())
                return getattr(value, name)
            if name in _STATIC_METHODS:
                return getattr(value, name)
            if name in _ON_DEVICES:  # which code may compare with True by ``is``
                return self.tracer.device.type == name.removeprefix("is_")
            if name == "type":
                return partial(legacy.cast, self)
            if name == "new":
                return partial(legacy.new, self)
            if name == "item" and (self.tracer.moves(self) or self.tracer.follows(self)):
                return ShapeAttribute(self, name)
            if name == "tolist" and self._is_listed():
                return self._numbers
            if name in ("tolist", "item"):
                return lambda: self._concrete(name, name)
            if name == "numpy":
                return lambda **_: self._concrete("numpy()", "numpy").copy()
            if not hasattr(value, name):
                raise AttributeError(f"'Tensor' object has no attribute {name!r}")
            if name == "nelement" or name == "numel":
                return lambda: self.tracer.shape_of(self).numel()
        elif _isinstance(value, dict) and name in ("keys", "items", "values", "get"):
            known = {k: self[k] for k in value}
            return getattr(known, name)
        elif _isinstance(value, tuple) and name in getattr(value, "_fields", ()) and getattr(value, name) is None:
            return None
        elif _isinstance(value, (torch.device, torch.dtype)):
            if name == "itemsize":
                self.tracer.note(NoteKind.DTYPE, f"the size of an element was specialised to that of {value}", self.tracer.here())
            return getattr(value, name)
        elif not hasattr(value, name):
            if name in OF_MATH and self.tracer.moves(self):
                return lambda: self.tracer.create_proxy("call_function", getattr(math, name), (self,), {})
            if _isinstance(value, (int, float)) and _isinstance(getattr(np, name, None), np.ufunc):  # so NumPy calls a function of a number
                return lambda: getattr(np, name)(self._concrete(f"numpy.{name}()"))
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        return ShapeAttribute(self, name)

    def _is_listed(self) -> bool:
        """Whether ``tolist()`` gives numbers that a graph computes at each call."""
        value = self.value
        if value.ndim == 1 and len(value) and self.tracer.actual(self.node) is not None:
            return self.tracer.moves(self[0])
        return self.tracer.lists(self)

    def _numbers(self) -> Any:
        if not self.value.ndim:
            return self.item()
        return [self[i]._numbers() for i in range(self.value.shape[0])]

    def __iter__(self) -> Iterator[Any]:
        value = self.value
        if _isinstance(value, torch.Tensor):
            if value.ndim == 0:
                raise TypeError("iteration over a 0-d tensor")
            self.tracer.unrolled(self)
            return iter([self[i] for i in range(value.shape[0])])
        if _isinstance(value, dict):
            return iter(list(value))
        if not _isinstance(value, (tuple, list)):
            raise TypeError(f"{type(value).__name__!r} object is not iterable")
        self.tracer.unrolled(self)
        return iter([self[i] for i in range(len(value))])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """As code copies an input: fx would copy the proxy, of which the graph knows nothing."""
        return memo.setdefault(id(self), self.clone() if _isinstance(self.value, torch.Tensor) else self)

    def __copy__(self) -> Any:
        return self

    @property
    def keys(self) -> Any:
        """Which fx has a method for: of a dictionary, those on the example, in their order. Code tells tensors from dictionaries by it."""
        return dict.fromkeys(self.value).keys if _isinstance(self.value, dict) else self.__getattr__("keys")

    def __len__(self) -> int:
        value = self.value
        if _isinstance(value, torch.Tensor):
            self.tracer.unrolled(self)
            return int(value.shape[0])
        return len(value)

    def __enter__(self) -> Any:
        """``with torch.device(x.device)``: what is made in the block is made there."""
        if not _isinstance(self.value, torch.device):
            raise TypeError(f"{type(self.value).__name__!r} object does not support the context manager protocol")
        self.tracer.devices.append((self, self.tracer.default_device()))
        return self

    def __exit__(self, *_: Any) -> None:
        self.tracer.devices.pop()

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __delitem__(self, index: Any) -> None:
        self.tracer.create_proxy("call_function", operator.delitem, (self, index), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            given = value.value if _isinstance(value, ShapeProxy) else value
            if (
                self.node.op == "get_attr"
                and _isinstance(given, torch.Tensor)
                and (given.shape, given.dtype) == (self.value.shape, self.value.dtype)
            ):
                self.data.copy_(value)  # as a constraint on a weight: nobody else holds the numbers that it had
                return
            raise TraceError(f"{self.tracer.here()}: a tensor's data is bound anew, which a graph cannot keep; use copy_()")
        if name == "requires_grad":
            self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
            return
        super().__setattr__(name, value)

    def __contains__(self, item: Any) -> bool:
        return item in self.value

    def __bool__(self) -> bool:
        if type(self.value) is bool and checks.is_made_again(sys._getframe(1), self.value):
            return self.value
        try:
            return bool(self._concrete("a condition"))
        except TraceError:
            answer = checks.goes_on(sys._getframe(1))
            if answer is None:
                raise
            self.tracer.note(NoteKind.LOST, checks.NOT_KEPT, self.tracer.here())
            return answer

    def __int__(self) -> int:
        return int(self._concrete("int()"))

    def __float__(self) -> float:
        return float(self._concrete("float()"))

    def __index__(self) -> int:
        return operator.index(self._concrete("an index"))

    def __round__(self, digits: int | None = None) -> Any:
        return self._rounded(round, "round()", *(() if digits is None else (digits,)))

    def __ceil__(self) -> Any:
        return self._rounded(math.ceil, "ceil()")

    def __floor__(self) -> Any:
        return self._rounded(math.floor, "floor()")

    def __trunc__(self) -> Any:
        return self._rounded(math.trunc, "trunc()")

    def _rounded(self, function: Any, use: str, *digits: int) -> Any:
        """Python gives back whatever these methods do: a proxy, where a size of the input is in the number."""
        if self.tracer.recording and self.tracer.moves(self):
            return self.tracer.create_proxy("call_function", function, (self, *digits), {})
        return function(self._concrete(use), *digits)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    def __repr__(self) -> str:
        return read_values.TEXT if read_values.OTHER in self.node.meta else super().__repr__()

    def __format__(self, spec: str) -> str:
        if read_values.OTHER in self.node.meta:
            return read_values.TEXT
        return repr(self) if _isinstance(self.value, torch.Tensor) else format(self._shown(), spec)

    def __str__(self) -> str:
        if read_values.OTHER in self.node.meta:
            return read_values.TEXT
        return repr(self) if _isinstance(self.value, torch.Tensor) else str(self._shown())

    def _shown(self) -> Any:
        """The value, for code that makes text of it: branches on the name of a dtype are said."""
        if _isinstance(self.value, torch.dtype):
            self.tracer.note(NoteKind.DTYPE, f"the name of a dtype was specialised to {self.value}", self.tracer.here())
        return self.value

    def __hash__(self) -> int:
        value = self.value
        if not _isinstance(value, (int, float, str, bool, torch.dtype, torch.device)):
            return id(self)
        if read_values.OTHER in self.node.meta:
            raise TraceError(f"{self.tracer.here()}: a key {checks.OF_VALUES}")
        return hash(value)

    def _concrete(self, use: str, method: str = "item") -> Any:
        value = self.value
        if _isinstance(value, torch.Tensor):
            actual = self.tracer.actual(self.node)
            if actual is None:
                self.tracer.read |= held(self.node)  # one that forward wrote before: it can be read at each call
                raise TraceError(f"{self.tracer.here()}: {use} {checks.OF_VALUES}")
            for name in held(self.node) - self.tracer.constants.keys():
                self.tracer.note(NoteKind.VALUE, f"{use} was specialised to the value of {name!r}", self.tracer.here())
                self.tracer.read.add(name)
            self.tracer.specialised(self, use)
            return getattr(actual, method)()
        self.tracer.specialised(self, f"{use} on the value {value}")
        return value


def _augmented(operation: Any) -> Any:
    """``x += y`` writes into a tensor or a list, which other names may hold too; a number is another one afterwards. fx knows neither."""

    def method(self: ShapeProxy, other: Any) -> Any:
        if not _isinstance(self.value, (torch.Tensor, list, dict)):
            return NotImplemented
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


def _repeated(operation: Any) -> Any:
    """``[True] * n``: what is no number and no tensor is a plain list, since code asks about its elements by ``is``, or calls them."""

    def method(self: ShapeProxy, other: Any) -> Any:
        if _isinstance(other, (list, tuple)) and other and type(self.value) is int and not any(map(_is_followed, other)):
            return other * operator.index(self)
        return operation(self, other)

    return method


def _is_followed(one: Any) -> bool:
    return _isinstance(one, (ShapeProxy, torch.Tensor, list, tuple, dict)) or type(one) in (int, float, complex)


for _name in ("__mul__", "__rmul__"):
    setattr(ShapeProxy, _name, _repeated(getattr(ShapeProxy, _name)))

for _operation in AUGMENTED:
    setattr(ShapeProxy, f"__{_operation.__name__}__", _augmented(_operation))


def _is_mask(entry: Any) -> bool:
    """Whether a list or an array is a mask of one dimension: it picks what it picks, and how much that is no shape could tell."""
    if _isinstance(entry, np.ndarray):
        return bool(entry.dtype == bool and entry.ndim == 1)
    return bool(entry) and all(type(one) is bool for one in entry)


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
        if self.attr in RESHAPING:  # the tensor itself has another shape from here on
            self.root.node = self.tracer.create_proxy("call_method", self.attr[:-1], (self.root, *args), kwargs).node
            return self.root
        if self.attr in _OF_AXES:
            args = tuple(tuple(map(self._known, a)) if _isinstance(a, (tuple, list)) else self._known(a) for a in args)
        if self.attr in ("resize_", "resize_as_", "as_strided_"):
            raise TraceError(f"{self.tracer.here()}: {self.attr} gives a tensor another size, which a graph cannot follow")
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)
