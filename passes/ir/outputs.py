"""What a network returns: its tensors, the names of its parts, and which of the parts were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from fxprune.errors import InputError, kind_of
from fxprune.passes.ir.objects import is_plain

Outputs = Sequence[str | int]


def returned_tensors(nested: Any, within: tuple[int, ...] = (), objects: bool = True) -> list[torch.Tensor]:
    """All tensors of a result in order, those in dataclasses and, with ``objects``, in plain objects (a cache) included."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    if isinstance(nested, Mapping):
        return [t for v in nested.values() for t in returned_tensors(v, within, objects)]
    if isinstance(nested, (tuple, list)):
        return [t for v in nested for t in returned_tensors(v, within, objects)]
    if (
        is_dataclass(nested)
        and not isinstance(nested, type)
        or objects
        and is_plain(nested)
        and not isinstance(nested, (str, bytes, int, float))
    ):
        if id(nested) in within:
            return []
        return [t for v in vars(nested).values() for t in returned_tensors(v, (*within, id(nested)), objects)]
    return []


def named(nested: Any) -> list[tuple[str, Any]]:
    """The parts of a result and their names: keys, fields, or places."""
    if isinstance(nested, Mapping):
        return [(str(k), v) for k, v in nested.items()]
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return list(zip(nested._fields, nested, strict=True))
    if isinstance(nested, (tuple, list)):
        return [(str(i), v) for i, v in enumerate(nested)]
    if is_dataclass(nested) and not isinstance(nested, type) and not getattr(nested, "is_tensor", False):
        return [(f.name, getattr(nested, f.name)) for f in fields(nested)]
    return [("0", nested)]


def is_wanted(name: str, place: int, count: int, wanted: Outputs) -> bool:
    """Whether the part of that name, the ``place``-th of ``count``, is among ``wanted``: names, and places from either end."""
    return any(one in (place, place - count) if type(one) is int else one == name for one in wanted)


def left_out(nested: Any, wanted: Outputs) -> list[tuple[str, Any]]:
    """The parts that were not asked for, by their names.

    Raises:
        InputError: ``wanted`` names a part that is not there.
    """
    parts = named(nested)
    for one in wanted:
        if not any(is_wanted(name, i, len(parts), [one]) for i, (name, _) in enumerate(parts)):
            what = "one tensor" if nested is parts[0][1] else ", ".join(n for n, _ in parts)
            raise InputError(f"outputs names {one!r}, which the model does not return; it returns {what}")
    return [(name, value) for i, (name, value) in enumerate(parts) if not is_wanted(name, i, len(parts), wanted)]


def chosen(nested: Any, wanted: Outputs) -> list[Any]:
    """The parts that were asked for."""
    parts = named(nested)
    return [value for i, (name, value) in enumerate(parts) if is_wanted(name, i, len(parts), wanted)]


def as_listed(outputs: str | int | Iterable[str | int] | None) -> tuple[str | int, ...] | None:
    """``outputs`` as a user gives them, as a tuple; one name or place may stand alone."""
    if outputs is None or isinstance(outputs, (str, int)):
        return outputs if outputs is None else (outputs,)
    listed = tuple(outputs)
    if not listed:
        raise InputError("outputs is empty: name what matters of what the model returns, or leave it out to keep all")
    wrong = next((one for one in listed if type(one) not in (str, int)), None)
    if wrong is not None:
        raise InputError(f"outputs holds {kind_of(wrong)}; it takes names (keys, fields) and places of what the model returns")
    return listed
