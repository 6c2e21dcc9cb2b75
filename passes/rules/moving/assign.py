"""Writes into a part of a tensor, and reads by computed positions: what is written meets the channels of the place it goes to."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxprune.passes.ir.constants import held
from fxprune.passes.ir.masks import is_mask
from fxprune.passes.ir.nodes import computed_from, sources, target_name
from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, Vector, values
from fxprune.passes.rules import binding
from fxprune.passes.rules.moving.indexing import (
    axes_of,
    entries_of,
    made_for_a_size,
    picked_by_position,
    pin_pairs,
    renumber_index,
    resolved,
    rewrite_getitem,
)
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, named

_COMPUTED = "positions in it are computed by the graph"


@functions(operator.setitem, rewrite=rewrite_getitem)
def setitem(ctx: LabelContext, node: fx.Node, target: Value, index: Any, value: Any) -> None:
    """``target[index] = value``: the channels of the part that is written are those of what is written there."""
    if _masks(node.args[1]) and index.shape == target.shape:  # element by element, as masked_fill
        ctx.combine(target.shape, [v for v in (target, index, value) if isinstance(v, Value)])
        ctx.overwritten(node.args[0], target.zero if _is_zero(value) else ())
        return
    place = _masked(ctx, node, target, index, value) or _place(ctx, node, target, index)
    if place is None:
        for found in (target, *values((index, value))):
            ctx.pin_all(found, "a part of it is assigned to", ReasonKind.ASSIGNED)
        return
    region, back = place
    zero = target.zero
    if isinstance(value, Value):
        value = _without_ones(value, region.ndim)
        ctx.combine(region.shape, [region, value])
        shift = region.ndim - value.ndim
        zero = frozenset(axis for where, axis in back.items() if where - shift in value.zero and axis in target.zero)
    elif not _is_zero(value):
        zero = frozenset()
    ctx.overwritten(node.args[0], zero)


def _place(ctx: LabelContext, node: fx.Node, target: Value, index: Any) -> tuple[Value, dict[int, int]] | None:
    """The part that is written, and for its labelled axes the target's; None where the graph computes which channels those are."""
    given: Any = node.args[1]
    raw = list(given) if isinstance(given, (tuple, list)) else [given]
    target = picked_by_position(ctx, node, target, raw, "a part of it is assigned to", ReasonKind.ASSIGNED)
    if _masks(given):  # over axes without channels: how much is written is unknown, which channels is not
        back = {axis - index.ndim + 1: axis for axis in target.axes}
        shape = (1, *target.shape[index.ndim :])
        return Value(shape, {w: target.axes[a] for w, a in back.items()}, frozenset(), target.why), back
    indexed = resolved(ctx, node, target, index, raw)
    pin_pairs(ctx, target, indexed)
    entries = entries_of(indexed, target.ndim)
    stepped = any(isinstance(e, slice) and e.step not in (None, 1) for e in entries)
    if stepped and any(isinstance(e, (list, torch.Tensor)) for e in entries):
        return None  # kept channels of a step are listed, and two lists would be taken together
    return ctx.region(node, target, lambda labels: labels[indexed])


def _masked(ctx: LabelContext, node: fx.Node, target: Value, index: Any, value: Any) -> tuple[Value, dict[int, int]] | None:
    """As ``_place``, where one mask says which channels are written (``y[:, mask] = 0``): it goes with them. None elsewhere."""
    given: Any = node.args[1]
    raw = entries_of(tuple(given) if isinstance(given, (tuple, list)) else (given,), target.ndim)
    place = next((i for i, entry in enumerate(raw) if _masks(entry)), None)
    others = [entry for i, entry in enumerate(raw) if i != place]
    if place is None or axes_of(raw[place]) != 1 or any(entry is not None and not isinstance(entry, slice) for entry in others):
        return None
    axis = sum(entry is not None for entry in raw[:place])
    source = raw[place]
    mask, vector, actual = ctx.env[ctx.mode][source], target.axes.get(axis), ctx.real(source)
    written = _without_ones(value, len(raw)) if isinstance(value, Value) else None
    along = place - len(raw) + written.ndim if written is not None else -1
    spans = written is not None and along >= 0 and written.shape[along] != 1
    if vector is None or (actual is None and spans):
        return None
    if 0 in mask.axes and not spans and not held(source) & ctx.traced.read:
        ctx.unite(vector, mask.axes[0])
    elif actual is None or made_for_a_size(ctx, source):
        return None
    entries = entries_of(tuple(index) if isinstance(index, (tuple, list)) else (index,), target.ndim)
    entries[place] = actual.cpu().nonzero().flatten() if spans and actual is not None else slice(None)
    return ctx.region(node, target, lambda labels: labels[tuple(entries)])


def _masks(index: Any) -> bool:
    """Whether an index in the graph is one mask."""
    return isinstance(index, fx.Node) and is_mask(index.meta.get("val"))


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _without_ones(value: Value, ndim: int) -> Value:
    """``value`` with no more than ``ndim`` axes: those in front have size one."""
    spare = max(value.ndim - ndim, 0)
    axes = {a - spare: v for a, v in value.axes.items()}
    return Value(value.shape[spare:], axes, frozenset(a - spare for a in value.zero), value.why) if spare else value


@named("index_put")
def index_put(ctx: LabelContext, node: fx.Node, input: Value, indices: Sequence[Any], written: Value, accumulate: bool = False) -> Any:
    """``input[indices] = written``; channels that are picked by an index stay."""
    parts = entries_of(tuple(slice(None) if i is None else i for i in indices), input.ndim)
    picked = [a for a, e in enumerate(parts) if not isinstance(e, slice)]
    if any(isinstance(e, Value) and e.ndim != 1 for e in parts) or len(picked) != 1:
        return ctx.opaque(node, [input, *values((indices, written))], "a part of it is assigned to", ReasonKind.ASSIGNED)
    if isinstance(written, Value) and written.ndim != input.ndim and math.prod(written.shape) > 1:
        return ctx.opaque(node, [input, written], "a part of it is assigned to", ReasonKind.ASSIGNED)
    return _along(ctx, node, input, picked[0], values(written))


@named("masked_scatter")
def masked_scatter(ctx: LabelContext, node: fx.Node, input: Value, mask: Value, source: Value) -> Any:
    """Elements of ``source``, in order, where ``mask`` is true: rows of it, where the mask was expanded along the last axis."""
    last, given = input.ndim - 1, binding.form_of(node).arguments(node.args, node.kwargs)["mask"].meta["val"]
    by_rows = given.ndim == input.ndim and (given.shape[last] == 1 or given.stride(last) == 0)
    if not by_rows or source.shape[-1:] != input.shape[-1:]:
        return ctx.opaque(node, [input, mask, source], "a part of it is assigned to", ReasonKind.ASSIGNED)
    rows = []
    for value in (input, mask, source):
        for axis in value.axes.keys() - {value.ndim - 1}:
            ctx.pin(value.axes[axis], "a part of it is assigned to", ReasonKind.ASSIGNED)
        axes = {0: value.axes[value.ndim - 1]} if value.ndim - 1 in value.axes else {}
        rows.append(Value(value.shape[-1:], axes, frozenset(axes if value.ndim - 1 in value.zero else ()), value.why))
    found, _ = ctx.combine(input.shape[-1:], rows)
    zero = [last] if 0 in found and 0 in rows[0].zero and 0 in rows[2].zero else []
    return ctx.make(node, {last: found[0]} if found else {}, zero, input.why)


def _renumbered(slim: Rewriter, node: fx.Node) -> None:
    """A constant index into channels: what went is dropped from it, the rest is renumbered."""
    x = slim.value(slim.argument(node, "input"))
    name = "index" if slim.argument(node, "index") is not None else "indices"
    dim = slim.argument(node, "dim")
    if dim is None:
        return
    axis = slim.number(dim) % x.ndim
    kept = slim.kept(x, axis)
    if kept is None:
        return
    given = slim.argument(node, name)
    base, _, sizes = _before_expansion(given, axis)
    index = slim.renumbered(node, base, kept, x.shape[axis])
    if base is not given:
        found = [slim.new.call_method("size", s) if isinstance(s, tuple) else s for s in sizes]
        if _original(base).ndim != len(sizes):
            index = slim.new.call_method("view", (index, *(-1 if a == axis else 1 for a in range(len(sizes)))))
        index = slim.new.call_method("expand", (index, *(-1 if a == axis else s for a, s in enumerate(found))))
    slim.set_argument(node, name, index)


@named("scatter", "scatter_add", "scatter_reduce", rewrite=_renumbered)
def scatter(ctx: LabelContext, node: fx.Node, input: Value, dim: int, index: Value, **rest: Any) -> Any:
    """``input`` with entries of the source put, or added, at computed positions along ``dim``; the other axes go together."""
    sources = values(rest)
    plain = next((v for v in rest.values() if isinstance(v, (int, float)) and not isinstance(v, bool)), 0)
    if (axis := _where_chosen(ctx, input, dim, index, sources)) is not None:
        return ctx.make(node, {axis: input.axes[axis]}, input.zero, input.why)
    if (put := _put(ctx, node, input, dim % input.ndim, index, sources, not plain)) is not None:
        return put
    return _along(ctx, node, input, dim, [index, *sources], sources if not plain else None)


def _put(ctx: LabelContext, node: fx.Node, x: Value, axis: int, index: Value, sources: Sequence[Value], zero: bool) -> Value | None:
    """Slices of the one source, or one number, at channels that a constant names, at all positions beside them: each goes with the channel
    that it is put to. None elsewhere. ``zero``: no number but zero is put."""
    slices = [v for v in sources if v.ndim]
    if len(slices) > 1 or any(v.shape != index.shape or v.axes.keys() - {axis} for v in slices):
        return None
    chosen = _row(ctx, node, x, axis, index, "index")
    if chosen is None or any(n != m for a, (n, m) in enumerate(zip(index.shape, x.shape, strict=True)) if a != axis):
        return None
    region = Value(index.shape, {axis: x.axes[axis][chosen]} if len(chosen) > 1 else {}, frozenset(), x.why)
    if len(chosen) == 1:
        ctx.pin(x.axes[axis][chosen], "a part of it is assigned to", ReasonKind.ASSIGNED)
    ctx.combine(region.shape, [region, *slices])
    return ctx.make(node, x.axes, {axis} if zero and all(axis in v.zero for v in (x, *slices)) else (), x.why)


def _where_chosen(ctx: LabelContext, input: Value, dim: int, index: Value, sources: Sequence[Value] = ()) -> int | None:
    """The axis ``dim`` of ``input`` where entries are put or read at positions of what was chosen among its channels. None elsewhere."""
    axis = dim % input.ndim
    if index.ndim != input.ndim or input.axes.keys() - {axis} or any(v.axes for v in (index, *sources)):
        return None
    return axis if ctx.follow(index.picks, input.axes.get(axis)) else None


@named("index_add", "index_copy", "index_reduce", "index_fill", rewrite=renumber_index)
def index_add(ctx: LabelContext, node: fx.Node, input: Value, dim: int, index: Value, **rest: Any) -> Any:
    """Slices of the source put, or added, at positions along ``dim``: computed ones, or channels that a constant names."""
    sources = values(rest)
    filled = "fill" in target_name(node) and not any(_is_zero(v) for v in rest.values())
    if (written := _written_channels(ctx, node, input, dim, sources, filled)) is not None:
        return written
    return _along(ctx, node, input, dim, sources, None if filled else sources)


def _written_channels(ctx: LabelContext, node: fx.Node, x: Value, dim: int, sources: Sequence[Value], filled: bool) -> Value | None:
    """Slices of the one source, or one number, put or added where a constant says: each slice goes with the channel that it is written to.
    None elsewhere. ``filled``: the number is not zero."""
    axis = dim % x.ndim
    given: Any = binding.form_of(node).arguments(node.args, node.kwargs).get("index")
    actual = ctx.real(given)
    slices = [v for v in sources if v.ndim]
    if axis not in x.axes or actual is None or actual.ndim != 1 or len(slices) > 1 or any(v.ndim != x.ndim for v in slices):
        return None
    if _made_with_sizes(given):
        return None
    places = actual.cpu().long() % x.shape[axis]
    region, back = ctx.region(node, x, lambda labels: labels.index_select(axis, places))
    if back.get(axis) != axis:
        return None
    ctx.combine(region.shape, [region, *slices])
    return ctx.make(node, x.axes, [a for a in x.axes if not filled and all(a in v.zero for v in (x, *slices))], x.why)


@named("gather", rewrite=_renumbered, inplace=False)
def gather(ctx: LabelContext, node: fx.Node, input: Value, dim: int, index: Value, **_: Any) -> Any:
    if (picked := _picked(ctx, node, input, dim, index, "index")) is not None:
        return picked
    if _where_chosen(ctx, input, dim, index) is not None:
        return ctx.make(node, {}, (), input.why)
    return _along(ctx, node, input, dim, [index], [])


@named("take_along_dim", rewrite=_renumbered, inplace=False)
def take_along_dim(ctx: LabelContext, node: fx.Node, input: Value, indices: Value, dim: int | None = None, **_: Any) -> Any:
    if dim is None or indices.ndim != input.ndim:
        return ctx.opaque(node, [input, indices], "it is gathered by values the graph computes", ReasonKind.COMPUTED_INDEX)
    if (picked := _picked(ctx, node, input, dim, indices, "indices")) is not None:
        return picked
    return _along(ctx, node, input, dim, [indices], [], broadcast=True)


_EXPANSIONS = frozenset({"expand", "broadcast_to", "expand_as", "repeat", "tile"})
_AS_THEY_ARE = frozenset({"contiguous", "clone", "detach"})


def _before_expansion(index: Any, axis: int) -> tuple[Any, int, list[Any]]:
    """What ``index`` is an expansion of along other axes than ``axis``, to sizes that may be the input's; the axis there; and the sizes,
    -1 where there is one along an axis already. ``index`` itself where it is no such expansion."""
    unchanged: tuple[Any, int, list[Any]] = (index, axis, [])
    if not isinstance(index, fx.Node):
        return unchanged
    ndim = _original(index).ndim
    sizes: list[Any] = [1] * ndim
    inner: dict[int, int] = {a: a for a in range(ndim)}  # axes of ``index`` -> those of ``node`` that they are
    node, expanded = index, False
    while any(n.op == "placeholder" for n in sources(node)) or target_name(node) in _EXPANSIONS:
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not isinstance(_original(source), torch.Tensor):
            break  # one of several results (top-k) is no expansion
        before, after = _original(source).shape, _original(node).shape
        if target_name(node) in _EXPANSIONS:
            given, shift = _sizes_of(node), len(after) - len(before)
            if len(given) != len(after):
                break
            for outer, place in list(inner.items()):
                size, own = given[place], place - shift
                if own >= 0 and (before[own] == after[place] != 1 or size == -1):
                    inner[outer] = own
                elif own < 0 or before[own] == 1:
                    sizes[outer] = size
                    del inner[outer]
                else:
                    return unchanged
            expanded = True
        elif target_name(node) == "unsqueeze" and len(node.args) == 2 and isinstance(node.args[1], int):
            new = node.args[1] % len(after)
            inner = {outer: place - (place > new) for outer, place in inner.items() if place != new}
        elif target_name(node) not in _AS_THEY_ARE:
            break
        node = source
    along = inner.get(axis)
    if not expanded or along is None or any(n.op == "placeholder" for n in sources(node)):
        return unchanged
    before = _original(node).shape
    for outer, place in inner.items():
        if outer != axis:
            sizes[outer] = -1
        if outer != axis and len(before) != ndim and before[place] != 1:
            return unchanged
    plain = len(before) == ndim or math.prod(before) == before[along]
    return (node, along, sizes) if plain and before[along] == _original(index).shape[axis] else unchanged


def _original(node: fx.Node) -> Any:
    """What a node of the original graph gives on the example; of one of the slim graph, what the original's does."""
    return node.meta.get("old", node).meta["val"]


def _sizes_of(expansion: fx.Node) -> list[Any]:
    """The sizes that a tensor is expanded to; one of another tensor as that and its axis."""
    given = expansion.args[1:] or tuple(expansion.kwargs.values())
    if target_name(expansion) == "expand_as":
        return [(given[0], a) for a in range(_original(expansion).ndim)]
    return list(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else list(given)


def _made_with_sizes(node: fx.Node) -> bool:
    """Whether a size of another tensor enters what ``node`` is computed from."""
    return any(n.op == "placeholder" or target_name(n) == "size" for n in computed_from(node))


def _picked(ctx: LabelContext, node: fx.Node, x: Value, dim: int, index: Value, name: str) -> Any:
    """Channels that a constant picks, the same for all positions beside them; None where that is not so."""
    axis = dim % x.ndim
    chosen = _row(ctx, node, x, axis, index, name)
    return None if chosen is None else ctx.make(node, {axis: x.axes[axis][chosen]}, {axis} & x.zero, x.why)


def _row(ctx: LabelContext, node: fx.Node, x: Value, axis: int, index: Value, name: str) -> Vector | None:
    """The channels of ``x`` that a constant names along its one axis of channels, the same for all positions beside them, of which it
    names all or one; None where that is not so."""
    full: Any = binding.form_of(node).arguments(node.args, node.kwargs).get(name)
    given, along, _ = _before_expansion(full, axis)
    actual = ctx.real(given)
    if set(x.axes) != {axis} or actual is None or index.ndim != x.ndim:
        return None
    if actual.numel() > actual.shape[along] and _made_with_sizes(given):
        return None  # it is as large as the example beside the channels, which no constant may be
    row = actual.movedim(along, 0).reshape(actual.shape[along], -1)
    if not bool((row == row[:, :1]).all()):
        return None
    if any(n not in (1, m) for a, (n, m) in enumerate(zip(full.meta["val"].shape, x.shape, strict=True)) if a != axis):
        return None
    return row[:, 0].cpu().numpy()


def _along(
    ctx: LabelContext,
    node: fx.Node,
    input: Value,
    dim: int,
    others: Sequence[Value],
    adding: Sequence[Value] | None = None,
    broadcast: bool = False,
) -> Value:
    """Positions along ``dim`` are computed, so what lies there stays; along the others all tensors agree index by index.

    ``adding``: what the result is made of beside ``input``; None where that holds something other than zeros in removed channels.
    """
    dim %= input.ndim
    same = [v for v in (input, *others) if v.ndim == input.ndim]
    sizes = [{v.shape[a] for v in same} - ({1} if broadcast else set()) for a in range(input.ndim)]
    shape = tuple(max(s, default=1) if a != dim and len(s) == 1 else 1 for a, s in enumerate(sizes))
    flat = []
    for value in (input, *others):
        for axis, vector in value.axes.items():
            if value.ndim != input.ndim or shape[axis] == 1:
                ctx.pin(vector, _COMPUTED, ReasonKind.COMPUTED_INDEX)
        if value.ndim == input.ndim:
            free = {a: v for a, v in value.axes.items() if shape[a] > 1}
            flat.append(Value(tuple(min(n, s) for n, s in zip(value.shape, shape, strict=True)), free, value.zero, value.why))
    axes, _ = ctx.combine(shape, flat)
    zero = [] if adding is None else [a for a in axes if all(a in v.zero for v in (input, *adding))]
    return ctx.make(node, axes, zero, input.why)
