"""What dicts, lists, sets and plain objects hold, kept aside so that it can be put back into the very same objects."""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.passes.compat import tree_leaves

MAPPINGS = frozenset({dict, OrderedDict, defaultdict, weakref.WeakKeyDictionary, weakref.WeakValueDictionary})
CONTAINERS = MAPPINGS | {list, set, deque, weakref.WeakSet}
_BASES = (OrderedDict, dict, list, set, deque)
BAGS = (types.SimpleNamespace, argparse.Namespace, threading.local)  # Python's own objects that hold whatever code puts there
CachedFunction = type(functools.lru_cache(lambda: None))
_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "networkx", "safetensors", "rich"}
_OPAQUE = (
    torch.Tensor,
    nn.Module,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    CachedFunction,
    fx.Graph,
    fx.Proxy,
    fx.Node,
)
_VALUES = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.Tensor, nn.Parameter})
OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
SIMPLE = _VALUES - {torch.Tensor, nn.Parameter}
_DEEP, _LONG = 4, 1000  # how far into containers within containers, and up to which length one is searched for others


def is_foreign(value: Any) -> bool:
    """Whether a function, class or module is torch's, NumPy's, Python's, or the compiler's own."""
    home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    if isinstance(value, types.FunctionType) and "__wrapped__" in value.__dict__:  # functools.wraps gives it the other's home
        home = value.__globals__.get("__name__")
    return not home or str(home).split(".")[0] in _FOREIGN or str(home).startswith("fxprune.passes")


_HOOKS = tuple(
    key for key, value in nn.Module().__dict__.items() if isinstance(value, dict) and key not in ("_parameters", "_buffers", "_modules")
)


def hooks_of(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """What hooks into a module, as pairs of the dict that holds it and a copy: code may register hooks on its first call."""
    held = ((key, module.__dict__.get(key)) for key in _HOOKS)
    return [(value, dict(value)) for _, value in held if isinstance(value, dict)]


def hooks_back(before: Iterable[tuple[dict[Any, Any], dict[Any, Any]]]) -> None:
    """Let the dicts of ``hooks_of`` hold what they held."""
    for now, then in before:
        if now or then:
            now.clear()
            now.update(then)


def _container(value: Any) -> Any:
    """The type whose methods read and fill a container, the built-in one of a user's own; None of what is none."""
    kind = type(value)
    return kind if kind in CONTAINERS else next((base for base in _BASES if isinstance(value, base)), None)


def is_object(value: Any) -> bool:
    """Whether a value is a plain object of the user's, or one of Python's that holds whatever code puts there."""
    known = isinstance(value, BAGS) or not (isinstance(value, _OPAQUE) or is_foreign(type(value)))
    return known and (type(getattr(value, "__dict__", None)) is dict or bool(slots(value)))


@functools.lru_cache(maxsize=256)
def _slots_of(cls: type) -> tuple[str, ...]:
    named = [base.__dict__.get("__slots__", ()) for base in cls.__mro__ if not is_foreign(base)]
    names = [name for held in named for name in ((held,) if isinstance(held, str) else held)]
    return tuple(name for name in names if not name.startswith("__"))


def slots(value: Any) -> tuple[str, ...]:
    """The names of the slots of an object of the user's without a dict."""
    cls: Any = type(value)
    return () if hasattr(value, "__dict__") else _slots_of(cls)


def attributes(value: Any) -> dict[str, Any]:
    """What an object holds: its ``__dict__``, or what is in its slots."""
    if hasattr(value, "__dict__"):
        held: dict[str, Any] = value.__dict__
        return held
    return {name: getattr(value, name) for name in slots(value) if hasattr(value, name)}


def has_tensors(value: Any) -> bool:
    """Whether a nested value holds a tensor."""
    if type(value) in SIMPLE or (type(value) in (tuple, list) and SIMPLE.issuperset(map(type, value))):  # sizes of layers, most of them
        return False
    leaves = tree_leaves(dict(vars(value)) if isinstance(value, BAGS) else value)
    return any(isinstance(leaf, torch.Tensor) or (isinstance(leaf, BAGS) and has_tensors(leaf)) for leaf in leaves)


def own_objects(owner: nn.Module, deep: int = _DEEP) -> list[Any]:
    """Plain objects of the user's classes that a module holds as attributes, in containers, and within one another."""
    found: list[Any] = []
    todo = [(value, deep) for name, value in owner.__dict__.items() if type(value) not in SIMPLE and name not in OF_EVERY_MODULE]
    while todo:
        value, left = todo.pop()
        inner: Any = ()
        if not left:
            continue
        if type(value) in CONTAINERS or isinstance(value, tuple):
            inner = (value.values() if type(value) in MAPPINGS else value) if len(value) <= _LONG else ()
        elif is_object(value):
            found += [] if isinstance(value, BAGS) else [value]
            inner = attributes(value).values()
        todo += [(one, left - 1) for one in inner if type(one) not in SIMPLE]
    return found


class Contents:
    """The contents of the containers that were added, and of those within them."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Any, list[Any]]] = {}
        self._slots: dict[int, tuple[Any, dict[str, Any]]] = {}

    def add(self, value: Any, deep: int = _DEEP) -> None:
        kind = type(value)
        if kind in _VALUES or deep == 0 or id(value) in self._held or id(value) in self._slots:
            return
        inner: Any = ()
        container = _container(value)
        if container in MAPPINGS:
            self._held[id(value)] = value, list(container.items(value))
            inner = list(container.values(value))  # those of a WeakValueDictionary are a generator
        elif container is not None:
            self._held[id(value)] = value, list(container.__iter__(value))
            inner = self._held[id(value)][1]
        elif isinstance(value, tuple):
            inner = value
        elif is_object(value):
            if slots(value):
                self._slots[id(value)] = value, attributes(value)
                inner = list(attributes(value).values())
            else:
                self.add(value.__dict__, deep)
        if len(inner) <= _LONG:
            for one in inner:
                self.add(one, deep - 1)

    def exchange(self, others: Mapping[Any, Any]) -> None:
        """Put ``others[one]`` in the place of every ``one`` that is held, as a key, as a value, or by its ``id()`` as a key."""
        numbers = {id(one): id(other) for one, other in others.items()}

        def other(one: Any) -> Any:
            kind = type(one)
            if kind is int:
                return numbers.get(one, one)
            return others[one] if isinstance(one, nn.Module) and one in others else one

        for value, before in self._held.values():
            pairs = _container(value) in MAPPINGS
            now = [(other(k), v if type(v) is int else other(v)) for k, v in before] if pairs else [*map(other, before)]
            if not _same(now, before, pairs):
                _refill(value, now)

    def restore(self) -> None:
        """Put everything back that has changed since."""
        for value, before in self._held.values():
            container = _container(value)
            pairs = container in MAPPINGS
            now = list(container.items(value)) if pairs else list(container.__iter__(value))
            if not _same(now, before, pairs):
                _refill(value, before)
        for value, state in self._slots.values():
            for name in slots(value):
                if name in state:
                    object.__setattr__(value, name, state[name])
                elif hasattr(value, name):
                    object.__delattr__(value, name)


def _refill(value: Any, held: list[Any]) -> None:
    container = _container(value)
    container.clear(value)
    if container is list or container is deque:
        container.extend(value, held)
    else:
        container.update(value, held)  # a Counter would add


def _same(now: list[Any], before: list[Any], pairs: bool) -> bool:
    """Whether two lists, of entries or of keys and values, hold the very same objects."""
    if len(now) != len(before):
        return False
    return all(a[0] is b[0] and a[1] is b[1] if pairs else a is b for a, b in zip(now, before, strict=True))
