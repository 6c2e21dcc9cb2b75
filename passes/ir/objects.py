"""Objects that a network returns and that are no tensor, tuple or dict, as a cache is. A graph makes them of what they hold."""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx


def made_object(kind: str, held: Mapping[str, Any]) -> Any:
    """An object of the class ``kind`` ("module:Class") whose attributes are ``held``. Its constructor does not run."""
    cls = found_class(kind)
    made = cls.__new__(cls)
    made.__dict__.update({key: _own(value) for key, value in held.items()})
    return made


def made_state(kind: str, held: Mapping[str, Any]) -> Any:
    """``made_object`` for an object that the next call is given back: what it holds may lose channels, as those who read it do."""
    return made_object(kind, held)


def _own(value: Any) -> Any:
    """Lists and dicts as the object's own: those of a graph refuse to be changed."""
    if isinstance(value, list):
        return [_own(one) for one in value]
    if isinstance(value, dict):
        return {key: _own(one) for key, one in value.items()}
    return value


def found_class(kind: str) -> Any:
    """The class that ``kind`` names."""
    module, _, path = kind.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def name_of(cls: type) -> str | None:
    """The name under which ``found_class`` finds a class; None where it is local to a function."""
    kind = f"{cls.__module__}:{cls.__qualname__}"
    try:
        return kind if found_class(kind) is cls else None
    except (ImportError, AttributeError):
        return None


def is_plain(value: Any) -> bool:
    """Whether an object is its attributes: no tensor, container, function or number under another name, and with no slots beside them."""
    cls = type(value)
    odd = (list, tuple, dict, set, frozenset, str, bytes, int, float, complex, type, enum.Enum, torch.Tensor, fx.Proxy)
    slots = any("__slots__" in vars(base) and vars(base)["__slots__"] for base in cls.__mro__)
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, odd) and not slots


Make = Callable[[str, Mapping[str, Any]], Any]


def parts(
    value: Any, leaf: Callable[[Any], Any], make: Make, node: Callable[[Any, tuple[Any, ...]], Any], within: tuple[int, ...] = ()
) -> Any:
    """``value`` with every object in it made by ``node(make, arguments)`` and everything else by ``leaf``.

    Raises:
        ValueError: an object holds itself, or its class is local to a function.
    """
    if type(value) in (list, tuple):
        return type(value)(parts(one, leaf, make, node, within) for one in value)
    if type(value) is dict:
        return {key: parts(one, leaf, make, node, within) for key, one in value.items()}
    if isinstance(value, type):
        kind = name_of(value)
        if kind is None:
            raise ValueError(f"the class {value.__qualname__} is local to a function")
        return node(found_class, (kind,))
    if not is_plain(value):
        return leaf(value)
    if id(value) in within:
        raise ValueError(f"a {type(value).__name__} holds itself")
    kind = name_of(type(value))
    if kind is None:
        raise ValueError(f"its class {type(value).__qualname__} is local to a function")
    held = {key: parts(one, leaf, make, node, (*within, id(value))) for key, one in vars(value).items()}
    return node(make, (kind, held))
