"""The numbers of the user's code that stand in a graph: where they come from, what they were, and what the slim graph has instead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxprune.passes.ir.nodes import target_name
from fxprune.passes.labels.values import Value, Vector
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.tracing.decompositions import AS_WIDE_AS, FLAT

VIEWS = frozenset({"view", "reshape", "_unsafe_view", "expand", "broadcast_to"})
SPLITS = frozenset({"split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"})
FACTORIES = frozenset({"zeros", "ones", "empty", "rand", "randn"})


@dataclass(frozen=True, eq=False)
class Literal:
    """``owner``: the module whose code gave the number. ``site``: what is the same for all modules that run that code.
    ``old``, ``new``: the number and what it has to be. ``along``: the labels of the axis whose size it is, None where it is no size.
    ``implied``: it does not stand there, but other code of the class may know it: the size of the parts of a ``chunk``."""

    owner: str
    where: str
    operation: str
    site: tuple[Any, ...]
    old: int
    new: int
    along: Vector | None
    implied: bool = False


def leaves(nested: Any) -> Iterator[Any]:
    """What stands in a node's arguments, in order, without the lists and slices around it."""
    if isinstance(nested, (tuple, list)):
        for one in nested:
            yield from leaves(one)
    elif isinstance(nested, dict):
        for key in nested:
            yield from leaves(nested[key])
    elif isinstance(nested, slice):
        yield from (nested.start, nested.stop, nested.step)
    else:
        yield nested


def is_number(leaf: Any) -> bool:
    return isinstance(leaf, int) and not isinstance(leaf, bool)


def literals(slimmer: Slimmer, mode: str, old: fx.Graph, new: fx.Graph) -> Iterator[Literal]:
    """The numbers of ``old`` that say a size or change in ``new``, its rewrite."""
    known = slimmer.graph.values[mode]
    made = {slimmer.copied[node]: node for node in new.nodes if node in slimmer.copied}
    for node in old.nodes:
        if node.op not in ("call_function", "call_method") or node not in made:
            continue
        name = target_name(node)
        if name == "size":  # its number is an axis; the slim graph may read a size of another tensor
            continue
        if name in SPLITS:
            yield from _parts(slimmer, node, name, known)
            continue
        if FLAT in node.meta:
            yield from _flat(slimmer, node, known)
        before, after = list(leaves((node.args, node.kwargs))), list(leaves((made[node].args, made[node].kwargs)))
        if len(before) != len(after):
            continue
        value = known.get(node)
        for place, (a, b) in enumerate(zip(before, after, strict=True)):
            if not is_number(a) or not is_number(b):
                continue
            along = _axis_of(name, place, node, value, len(before))
            if a != b or along is not None:
                yield _literal(slimmer, node.meta, name, place, a, b, along)


def _flat(slimmer: Slimmer, node: fx.Node, known: Mapping[fx.Node, Any]) -> Iterator[Literal]:
    """The sizes by which the code of a contraction makes its weight flat but for the first axis."""
    sizes, meta = node.meta[FLAT]
    weight = known[node.all_input_nodes[-1]]
    left = [slimmer.count(weight, axis) for axis in range(weight.ndim)]
    for place, size in enumerate(leaves(sizes)):
        if is_number(size) and size in (weight.shape[0], math.prod(weight.shape[1:])):
            new = math.prod(left[1:]) if place else left[0]
            yield _literal(slimmer, meta, "view", place + 1, size, new, None if place else weight.axes.get(0))


def _axis_of(name: str, place: int, node: fx.Node, value: Any, count: int) -> Vector | None:
    """The labels of the axis whose size the argument at ``place`` is."""
    if not isinstance(value, Value):
        return None
    first = 1 if name in VIEWS else 0 if name in FACTORIES else None
    if name == "unflatten" and len(node.args) > 1 and is_number(node.args[1]):
        source = node.args[0]
        ndim = source.meta["val"].ndim  # type: ignore[union-attr]
        first = 2 - int(node.args[1]) % ndim  # type: ignore[arg-type]
    if first is None or not first <= place or place - first >= value.ndim:
        return None
    return value.axes.get(place - first)


def _parts(slimmer: Slimmer, node: fx.Node, name: str, known: Mapping[fx.Node, Any]) -> Iterator[Literal]:
    sizes, dim = _split_arguments(node)
    parts = known.get(node)
    if not isinstance(parts, tuple) or not is_number(dim):
        return
    if name in ("chunk", "unsafe_chunk", "tensor_split"):
        axis = int(dim) % parts[0].ndim
        if len({part.shape[axis] for part in parts}) == len({slimmer.count(part, axis) for part in parts}) == 1:
            yield _literal(slimmer, node.meta, name, 0, parts[0].shape[axis], slimmer.count(parts[0], axis), parts[0].axes.get(axis), True)
        return
    for place, part in enumerate(parts):
        axis = int(dim) % part.ndim
        size = sizes[place] if isinstance(sizes, (tuple, list)) and len(sizes) == len(parts) else sizes
        if not isinstance(size, int) or size != part.shape[axis]:
            continue
        at = place if isinstance(sizes, (tuple, list)) else 0  # one number stands for all parts
        yield _literal(slimmer, node.meta, name, at, size, slimmer.count(part, axis), part.axes.get(axis))


def _split_arguments(node: fx.Node) -> tuple[Any, Any]:
    """How large the parts are or how many, and the axis."""
    named = [value for key, value in node.kwargs.items() if key not in ("dim", "input", "tensor")]
    sizes = node.args[1] if len(node.args) > 1 else named[0] if named else None
    return sizes, node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)


def _literal(
    slimmer: Slimmer, meta: Mapping[str, Any], name: str, place: int, old: int, new: int, along: Vector | None, implied: bool = False
) -> Literal:
    owner, where = str(meta.get("owner") or ""), str(meta.get("where") or "forward")
    module = slimmer.skeleton.original_module(owner) if slimmer.skeleton.module_or_none(owner) is not None else slimmer.skeleton.original
    kind = type(module)
    return Literal(owner, where, name, (kind, where, name, place), old, new, along, implied)


def read_sizes(slimmer: Slimmer, mode: str, graph: fx.Graph) -> Iterator[list[Vector]]:
    """The labels of two axes of which the first gets its size by a read of the second: ``y.view(b, c, h, w)`` with the ``c`` of ``x``."""
    known = slimmer.graph.values[mode]
    for node in graph.nodes:
        name, value = target_name(node) if node.op in ("call_function", "call_method") else "", known.get(node)
        if name not in VIEWS or not isinstance(value, Value):
            continue
        given = list(leaves((node.args, node.kwargs)))
        for place, leaf in enumerate(given):
            if not (isinstance(leaf, fx.Node) and leaf.op == "call_method" and leaf.target == "size" and len(leaf.args) == 2):
                continue
            along, source = _axis_of(name, place, node, value, len(given)), known.get(leaf.args[0])  # type: ignore[arg-type]
            if along is None or not isinstance(source, Value) or not is_number(leaf.args[1]):
                continue
            other = source.axes.get(int(leaf.args[1]) % source.ndim)  # type: ignore[arg-type]
            if other is not None and other is not along and len(other) == len(along):
                yield [along, other]


def attention_widths(slimmer: Slimmer, mode: str, graph: fx.Graph) -> Iterator[list[Vector]]:
    """The labels of the heads side by side and of the query's channels, of which ``F.multi_head_attention_forward`` wants as many."""
    known, named = slimmer.graph.values[mode], {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        query = named.get(node.meta.get(AS_WIDE_AS, ""))
        values = known.get(node), known.get(query) if query is not None else None
        if all(isinstance(value, Value) for value in values):
            axes = [value.axes.get(value.ndim - 1) for value in values if isinstance(value, Value)]
            if all(axis is not None for axis in axes):
                yield axes  # type: ignore[misc]


def even_parts(slimmer: Slimmer, mode: str, graph: fx.Graph) -> Iterator[list[Vector]]:
    """The labels of the parts of every split into parts of one size: a ``chunk``, or a ``split`` by one number."""
    known = slimmer.graph.values[mode]
    for node in graph.nodes:
        name = target_name(node) if node.op in ("call_function", "call_method") else ""
        parts = known.get(node)
        if name not in SPLITS or not isinstance(parts, tuple) or len(parts) < 2:
            continue
        sizes = (
            node.args[1] if len(node.args) > 1 else next((v for k, v in node.kwargs.items() if k not in ("dim", "input", "tensor")), None)
        )
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        if not is_number(dim) or isinstance(sizes, (tuple, list)):
            continue
        axis = int(dim) % parts[0].ndim
        if len({part.shape[axis] for part in parts}) == 1 and all(axis in part.axes for part in parts):
            yield [part.axes[axis] for part in parts]
