"""Where an axis comes from: which axes of a tensor make up one of what is moved, reduced or indexed, read off the arguments alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxprune.passes.compat import ConvNd, NormBase
from fxprune.passes.ir.nodes import target_name

_SWAPS = frozenset({"transpose", "swapaxes", "swapdims"})
_TURNED = frozenset({"mT", "mH", "T", "H", "t", "adjoint"})
_VIEWS = frozenset({"view", "reshape", "_unsafe_view"})
_AS_IT_IS = frozenset(
    {"contiguous", "clone", "detach", "relu", "relu_", "gelu", "silu", "sigmoid", "tanh", "softmax", "float", "half", "to"}
)
_LAYERS = (
    ConvNd,
    nn.Linear,
    NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Identity,
    nn.Dropout,
)
_REDUCED = frozenset({"mean", "sum", "amax", "amin", "std", "var"})


def places(node: fx.Node, name: str, before: int, after: int, axis: int, given: list[Any]) -> Sequence[int] | None:
    """The axes that make up ``axis`` of what is moved or reduced, none where it is one; None where ``name`` does neither."""
    if name == "permute":
        return [number((given or list(node.kwargs["dims"]))[axis])]  # type: ignore[arg-type]
    if name in _SWAPS:
        first, second = (number(a) % after for a in (*given, *node.kwargs.values()))
        return [{first: second, second: first}.get(axis, axis)]
    if name in _TURNED or (name == "getattr" and given[0] in _TURNED):
        return [{after - 1: after - 2, after - 2: after - 1}.get(axis, axis)]
    if name == "flatten":
        start, end = (number(a) % before for a in arguments(given, node, start_dim=0, end_dim=-1))
        return range(start, end + 1) if axis == start else [axis if axis < start else axis + end - start]
    if name == "unsqueeze":
        (dim,) = (number(a) % after for a in arguments(given, node, dim=0))
        return [] if axis == dim else [axis - (axis > dim)]
    if name == "select":
        (dim,) = (number(a) % before for a in arguments(given[:1], node, dim=0))
        return [axis + (axis >= dim)]
    if name in _REDUCED:
        (dims,) = arguments(node.args[1:2], node, dim=node.kwargs.get("axis"))
        everywhere = dims is None or isinstance(dims, bool)  # std(unbiased)
        gone = set(range(before) if everywhere else (number(d) % before for d in (dims if isinstance(dims, (tuple, list)) else [dims])))
        left = [a for a in range(before) if a not in gone]
        return [left[axis]] if after == len(left) else [a for a in left if a == axis]
    return None


def same_axis(node: fx.Node, axis: int, layer: Callable[[str], nn.Module]) -> tuple[fx.Node, int]:
    """The first tensor, and its axis, that gave an axis its size: through layers, views by sizes that are read, and what moves axes."""
    while node.all_input_nodes:
        source, value = node.all_input_nodes[0], node.meta["val"]
        before = source.meta.get("val")
        if not isinstance(before, torch.Tensor) or not isinstance(value, torch.Tensor):
            break
        name = target_name(node)
        given = listed(node.args[1:])
        found: Sequence[int] | None = None
        if node.op == "call_module":
            kept = isinstance(layer(str(node.target)), _LAYERS) and (axis == 0 or before.shape == value.shape)
            found = [axis] if kept and len(node.all_input_nodes) == 1 else None
        elif name in _VIEWS and len(given) == value.ndim:
            read = given[axis]
            if not (isinstance(read, fx.Node) and read.op == "call_method" and read.target == "size"):
                break
            node, axis = read.args  # type: ignore[assignment]
            axis %= node.meta["val"].ndim
            continue
        elif name in _AS_IT_IS:
            found = [axis]
        else:
            found = places(node, name, before.ndim, value.ndim, axis, given)
        if found is None or len(found) != 1:
            break
        node, axis = source, found[0]
    return node, axis


def arguments(given: Sequence[Any], node: fx.Node, **defaults: Any) -> list[Any]:
    """Arguments by their places or names."""
    return [*given, *(node.kwargs.get(name, default) for name, default in list(defaults.items())[len(given) :])]


def number(axis: Any) -> int:
    """An axis that code has computed, as on the example."""
    return int(axis.meta["val"] if isinstance(axis, fx.Node) else axis)


def picked(index: Any, before: int, axis: int) -> list[int] | None:
    """The axis that ``axis`` of an indexed tensor is, none where it is new; None where what is picked is not plain."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(e, bool) for e in entries):
        return None
    if not all(e is None or e is Ellipsis or isinstance(e, (int, slice)) or _is_integer(e) for e in entries):
        return None
    used = sum(e is not None and e is not Ellipsis for e in entries)
    place = entries.index(Ellipsis) if Ellipsis in entries else len(entries)
    entries[place : place + 1] = [slice(None)] * (before - used)
    found: list[list[int] | None] = []
    at = 0
    for entry in entries:
        if isinstance(entry, slice):
            plain = all(b is None or isinstance(b, int) for b in (entry.start, entry.stop, entry.step))
            found.append([at] if plain else None)
        elif entry is None:
            found.append([])
        at += entry is not None
    return found[axis]


def _is_integer(entry: Any) -> bool:
    return isinstance(entry, fx.Node) and isinstance(entry.meta.get("val"), int)


def listed(args: tuple[Any, ...]) -> list[Any]:
    return list(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else list(args)
