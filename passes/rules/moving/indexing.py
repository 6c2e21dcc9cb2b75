"""Indexing and assignment: slices, numbers, lists and index tensors along a channel axis are renumbered."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.errors import UnsupportedError
from fxprune.passes.ir.masks import as_positions, is_mask
from fxprune.passes.ir.nodes import computed_from, op_name
from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.passes.labels.choices import Gate
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, Vector
from fxprune.passes.rules import binding
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, named

_MOVING = "the size of the input decides which of its channels are taken"


def axes_of(entry: Any) -> int:
    """How many axes of a tensor one entry of an index stands for: a mask for as many as it has, as a node of the graph too."""
    mask: Any = entry.meta.get("val") if isinstance(entry, fx.Node) else entry
    return mask.ndim if is_mask(mask) else int(entry is not None and entry is not Ellipsis)


def entries_of(index: Any, ndim: int) -> list[Any]:
    """The index as a list with the ellipsis written out: one entry per axis of the tensor, one for all of a mask, a None per new axis."""
    parts = list(index) if isinstance(index, tuple) else [index]
    used = sum(map(axes_of, parts))
    spare = [slice(None)] * (ndim - used)
    if any(p is Ellipsis for p in parts):
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        return [*parts[:at], *spare, *parts[at + 1 :]]
    return [*parts, *spare]


@functions(operator.getitem)
def getitem(ctx: LabelContext, node: fx.Node, input: Any, index: Any) -> Any:
    if not isinstance(input, Value):
        return input[index]
    raw = list(node.args[1]) if isinstance(node.args[1], (tuple, list)) and isinstance(index, (tuple, list)) else [node.args[1]]
    if (chosen := _chosen_slices(ctx, node, input, index)) is not None:
        return chosen
    if (share := _share_of_one(ctx, node, input)) is not None:
        return share
    input = picked_by_position(ctx, node, input, raw, "it is indexed by values the graph computes", ReasonKind.COMPUTED_INDEX)
    indexed = resolved(ctx, node, input, index, raw)
    pin_pairs(ctx, input, indexed)
    table = node.args[0]
    if isinstance(table, fx.Node) and table.op == "get_attr":
        owner = ctx.traced.skeleton.module_or_none(str(table.target).rpartition(".")[0])
        if isinstance(owner, torch.nn.Embedding):  # positions beyond the example's are read by longer inputs
            ctx.pin(input.axes.get(0), "a vocabulary is not pruned", ReasonKind.STRUCTURE)
    axis = -1
    given = [source for source in entries_of(tuple(raw), input.ndim) for _ in range(max(axes_of(source), 1))]
    for entry, source in zip(entries_of(indexed, input.ndim), given, strict=True):
        axis += entry is not None
        bounds = (source.start, source.stop, source.step) if isinstance(source, slice) else (source,)
        moving = [b for b in bounds if isinstance(b, fx.Node) and isinstance(b.meta.get("val"), int) and not ctx.is_number(b)]
        if moving and axis in input.axes:
            ctx.pin(input.axes[axis], _MOVING, ReasonKind.COMPUTED_INDEX)
        # What is left of every second channel is listed, and a list copies.
        if isinstance(entry, slice) and entry.step not in (None, 1) and axis in input.axes and ctx.stays_view(node):
            ctx.pin(input.axes[axis], "every second or so of its channels is written in place", ReasonKind.WRITTEN_IN_PLACE)
    return ctx.move(node, input, lambda labels: _picked(labels, indexed))


def _share_of_one(ctx: LabelContext, node: fx.Node, x: Value) -> Value | None:
    """One position of the only axis with channels, by a number: what is zero where that channel goes. None elsewhere."""
    index: Any = node.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    plain = all(isinstance(p, (int, slice, type(None), type(...))) and not isinstance(p, bool) for p in parts)
    if len(x.axes) != 1 or ":" in ctx.mode or not plain:
        return None
    (axis, vector), at = next(iter(x.axes.items())), -1
    if axis not in x.zero:
        return None
    for entry in entries_of(tuple(parts), x.ndim):
        at += entry is not None
        if entry is None or at != axis:
            if entry is not None and entry != slice(None):
                return None
            continue
        if isinstance(entry, slice) and any(isinstance(b, fx.Node) for b in (entry.start, entry.stop, entry.step)):
            return None
        taken = vector[entry].reshape(-1)
        if len(taken) != 1:
            return None
        label = int(taken[0])
        ctx.gates.append(Gate(ctx.mode, node, label))
        return Value(tuple(node.meta["val"].shape), {}, frozenset(), ctx.origin(), None, frozenset({label}))
    return None


def _chosen_slices(ctx: LabelContext, node: fx.Node, x: Value, index: Any) -> Value | None:
    """The slices of ``x`` (an expert's matrices) at the positions of what was chosen among channels: those go together. None elsewhere."""
    parts = list(index) if isinstance(index, (tuple, list)) else [index]
    at = next((i for i, part in enumerate(parts) if isinstance(part, Value) and part.picks is not None), None)
    if at is None or any(part is None or (i != at and part is not Ellipsis and part != slice(None)) for i, part in enumerate(parts)):
        return None
    axis = x.ndim - (len(parts) - at) if any(part is Ellipsis for part in parts[:at]) else at
    if parts[at].axes or not ctx.follow(parts[at].picks, x.axes.get(axis)):
        return None
    if ctx.is_weight(x) and x.ndim > 2:
        ctx.read_as_weight(x)
    places = {a: a if a < axis else a + parts[at].ndim - 1 for a in x.axes if a != axis}
    axes = {place: x.axes[a] for a, place in places.items()}
    return ctx.make(node, axes, [places[a] for a in x.zero if a != axis], f"it comes from {op_name(node, ctx.traced)}")


def picked_by_position(ctx: LabelContext, node: fx.Node, x: Value, raw: Sequence[Any], detail: str, kind: ReasonKind) -> Value:
    """``x`` without labels along the axes at which the graph computes positions. Those stay, for the reason given; others may go."""
    axes = dict(x.axes)
    axis = 0
    for source in entries_of(tuple(raw), x.ndim):
        value = source.meta.get("val") if isinstance(source, fx.Node) else None
        if isinstance(value, torch.Tensor) and (is_mask(value) or ctx.real(source) is None):
            for taken in range(axis, axis + axes_of(source)):
                ctx.pin(axes.pop(taken, None), detail, kind)
        axis += axes_of(source)
    if len(axes) == len(x.axes):
        return x
    return Value(x.shape, axes, x.zero & axes.keys(), Reason(ReasonKind.COMPUTED, f"it comes from {op_name(node, ctx.traced)}"))


def made_for_a_size(ctx: LabelContext, index: fx.Node) -> bool:
    """Whether the size of the input enters an index of constants: with another size it picks others."""
    return any(isinstance(n.meta.get("val"), int) and not ctx.is_number(n) for n in computed_from(index))


def pin_pairs(ctx: LabelContext, x: Value, index: Any) -> None:
    """Lists along two axes pick pairs: what is left of one would no longer stand beside what is left of the other."""
    axis = -1
    listed = []
    for entry in entries_of(index, x.ndim):
        axis += entry is not None
        if isinstance(entry, (list, tuple, range, torch.Tensor)):
            listed.append(axis)
    for axis in listed if len(listed) > 1 else ():
        ctx.pin(x.axes.get(axis), "it is picked from by two lists at once", ReasonKind.TWO_INDICES)


def _picked(labels: torch.Tensor, index: Any) -> torch.Tensor:
    """``labels[index]``. Rows of a table that are picked are not laid out in full: a window of tokens has one for each pair of tokens."""
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int64:
        return labels[index]
    # Labels are the same along an expanded axis, so its first index stands for all.
    where = (slice(None), *(0 if stride == 0 else slice(None) for stride in labels.stride()[1:]))
    rows = labels[where]
    thin = rows[:1].expand(index.numel(), *rows.shape[1:]) if labels.stride(0) == 0 else rows[index.reshape(-1)]
    shape = [1 if stride == 0 else size for size, stride in zip(labels.shape[1:], labels.stride()[1:], strict=True)]
    return thin.reshape(*index.shape, *shape).expand(*index.shape, *labels.shape[1:])


def resolved(ctx: LabelContext, node: fx.Node, x: Value, index: Any, raw: Sequence[Any]) -> Any:
    """The index with every tensor in it replaced by its actual values, or by zeros where the graph computes it; ``x`` as
    ``picked_by_position`` leaves it."""
    parts = (
        list(index)
        if isinstance(index, (tuple, list)) and (isinstance(index, tuple) or any(isinstance(i, (Value, slice)) for i in index))
        else [index]
    )
    if len(parts) != len(raw):
        raw = [node.args[1]]
    axis = 0
    done: list[Any] = []
    spread = x.ndim - sum(map(axes_of, raw))
    for part, source in zip(parts, raw, strict=True):
        if part is Ellipsis:
            axis += spread
        elif isinstance(part, Value):
            actual = ctx.real(source)
            taken, mask = axes_of(source), is_mask(source.meta["val"])
            if actual is not None and axis in x.axes and made_for_a_size(ctx, source):
                ctx.pin(x.axes[axis], _MOVING, ReasonKind.COMPUTED_INDEX)
            if mask:
                done += as_positions(torch.empty(part.shape)) if actual is None else actual.cpu().nonzero(as_tuple=True)
            else:
                done.append(torch.zeros(part.shape, dtype=torch.long) if actual is None else actual.cpu())
            axis += taken
            continue
        elif part is not None:
            axis += 1
        done.append(part)
    return tuple(done)


def rewrite_getitem(slim: Rewriter, node: fx.Node) -> None:
    x = slim.value(node.args[0])
    if not isinstance(x, Value) or not any(slim.kept(x, a) is not None for a in x.axes):
        return
    index = node.args[1]
    entries = list(index) if isinstance(index, tuple) else [index]
    # What the user counts from the end stays counted from the end: the network may be called with tensors of more axes or of fewer.
    spread = next((i for i, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    spare = x.ndim - sum(map(axes_of, entries))
    axis = 0
    for i, entry in enumerate(entries):
        first, axis = axis, axis + (spare if i == spread else axes_of(entry))
        if axes_of(entry) != 1 or (isinstance(entry, slice) and entry == slice(None)) or (kept := slim.kept(x, first)) is None:
            continue
        entries[i] = _kept_entry(slim, node, entry, kept, x.shape[first])
        if isinstance(entry, slice) and isinstance(entries[i], list) and any(_is_list(e) for e in entries if e is not entries[i]):
            # Two lists would be taken together: this one picks before.
            beside = [slice(None)] * (first if i < spread else x.ndim - axis)
            where: Any = (*beside, entries[i]) if i < spread else (Ellipsis, entries[i], *beside)
            picked = slim.new.call_function(operator.getitem, (node.args[0], where))
            node.args, entries[i] = (picked, *node.args[1:]), slice(None)
    node.args = (node.args[0], tuple(entries), *node.args[2:])


named("__getitem__", rewrite=rewrite_getitem, inplace=False)(getitem)
functions(operator.getitem, rewrite=rewrite_getitem)(getitem)


def _is_list(entry: Any) -> bool:
    return isinstance(entry, (list, tuple, range)) or (isinstance(entry, fx.Node) and "number" not in entry.meta)


def _kept_entry(slim: Rewriter, node: fx.Node, entry: Any, kept: Vector, size: int) -> Any:
    """One entry of an index, in terms of the kept channels of its axis."""
    if isinstance(entry, slice):
        bounds = slice(*(None if b is None else slim.number(b) for b in (entry.start, entry.stop, entry.step)))
        start, stop, step = bounds.indices(size)
        if step == 1:
            low = int((kept < start).sum())
            return slice(low or None, None if stop >= size else int((kept < max(start, stop)).sum()))
        chosen = np.arange(size)[bounds]
        return left_of(node, chosen, kept).tolist()
    if isinstance(entry, int) or (isinstance(entry, fx.Node) and "number" in entry.meta):
        return int((kept < slim.number(entry) % size).sum())
    if isinstance(entry, (list, tuple, range)):
        chosen = np.asarray(entry)
        return left_of(node, np.flatnonzero(chosen) if chosen.dtype == bool else chosen % size, kept).tolist()
    if isinstance(entry, fx.Node) and is_mask(entry.meta.get("old", entry).meta.get("val")) and slim.pruned(entry, 0):
        return entry  # a mask that goes with the channels
    return slim.renumbered(node, entry, kept, size)


def left_of(node: fx.Node, chosen: np.ndarray[Any, Any], kept: Vector) -> np.ndarray[Any, Any]:
    """Indices of any shape in terms of the kept channels; whole slices of them go, as the labels of what they pick do.

    Raises UnsupportedError where they do not.
    """
    there = np.isin(chosen, kept)
    if there.all():
        return np.asarray(np.searchsorted(kept, chosen))
    for axis in range(chosen.ndim):
        others = tuple(a for a in range(chosen.ndim) if a != axis)
        if np.array_equal(whole := there.all(others), there.any(others)):
            return np.searchsorted(kept, np.compress(whole, chosen, axis))
    where = node.meta.get("where", node.name)
    raise UnsupportedError(f"{where}: an index picks channels of which not whole slices go; pass their layer to ignore=")


def renumber_index(slim: Rewriter, node: fx.Node) -> None:
    """``index`` along ``dim``, of channels that are read or written: constants lose what went and are renumbered."""
    x = slim.value(slim.argument(node, "input"))
    axis = slim.number(slim.argument(node, "dim")) % x.ndim
    kept = slim.kept(x, axis)
    if kept is not None:
        slim.set_argument(node, "index", slim.renumbered(node, slim.argument(node, "index"), kept, x.shape[axis]))


@named("index_select", rewrite=renumber_index, inplace=False)
def index_select(ctx: LabelContext, node: fx.Node, input: Value, dim: int, index: Value) -> Any:
    axis = dim % input.ndim
    if axis in input.axes and ctx.follow(index.picks, input.axes[axis]):
        axes = {a: v for a, v in input.axes.items() if a != axis}
        return ctx.make(node, axes, input.zero, input.why)
    if axis not in input.axes:
        return ctx.make(node, input.axes, input.zero, input.why)
    given = binding.form_of(node).arguments(node.args, node.kwargs)["index"]
    actual = ctx.real(given)
    if actual is None:
        return ctx.opaque(node, [input, index], "it is indexed by values the graph computes", ReasonKind.COMPUTED_INDEX)
    if made_for_a_size(ctx, given):
        ctx.pin(input.axes[axis], _MOVING, ReasonKind.COMPUTED_INDEX)
    return ctx.move(node, input, lambda labels: labels.index_select(axis, actual.cpu()))
