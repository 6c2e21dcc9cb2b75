"""Splits, slices of one axis, rolls and pads: how much of each part is left is counted, not guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.passes.compat import native_functions
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value
from fxprune.passes.rules import binding
from fxprune.passes.rules.moving.movement import moved
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, modules, named

_ALONG = {"hsplit": 1, "vsplit": 0, "dsplit": 2}


def _axis(node: fx.Node, x: Value, dim: Any) -> int:
    """The axis that is split: the name says it, or ``dim``."""
    along = _ALONG.get(target_name(node), 0 if dim is None else dim)
    return min(int(along), x.ndim - 1) if target_name(node) == "hsplit" else int(along) % x.ndim


def _split_sizes(slim: Rewriter, node: fx.Node) -> None:
    """Each part's new size: parts of one tensor may lose different numbers of channels, whatever split them."""
    given = slim.argument(node, "input")
    x, along = slim.value(given), slim.argument(node, "dim", 0)
    dim = _axis(node, x, slim.number(along))
    if slim.kept(x, dim) is None:
        return
    if target_name(node) in _ALONG:  # of a single axis ``hsplit`` takes that, of two the last
        along = -1 if x.ndim == 1 else dim
    parts: Any = [slim.count(part, dim) for part in slim.value(node)]
    counted = slim.argument(node, "chunks", slim.argument(node, "sections"))
    if len(set(parts)) == 1 and not slim.is_fixed(given, dim) and isinstance(counted, (int, fx.Node)):
        return  # equal parts, as many with every batch that may be folded in
    size = slim.argument(node, "split_size", slim.argument(node, "split_size_or_sections"))
    if isinstance(size, (int, fx.Node)) and len(set(parts)) == 1 and not slim.is_fixed(given, dim):
        parts = slim.rescaled(size, parts[0])  # a batch may be folded in: with more of it there are more parts
    node.args, node.kwargs = (given, parts), {"dim": along}
    node.target = "split" if node.op == "call_method" else torch.split


@named(
    *("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", *_ALONG),
    rewrite=_split_sizes,
    inplace=False,
)
@functions(torch.functional.split, rewrite=_split_sizes)
def split(ctx: LabelContext, node: fx.Node, input: Value, dim: int = 0, **sizes: Any) -> Any:
    axis = _axis(node, input, dim)
    if axis not in input.axes:
        return tuple(ctx.make(node, input.axes, input.zero, input.why, i) for i in range(len(node.meta["val"])))
    given = sizes if target_name(node) in _ALONG else {**sizes, "dim": axis}
    parts = moved(ctx, node, input, **given)
    counted = isinstance(sizes.get("chunks", sizes.get("sections")), int)
    repeated = not counted and ctx.labels.units(input.axes[axis]) < input.shape[axis]
    folded = not ctx.is_fixed(node.all_input_nodes[0], axis)
    periodic = (counted or _by_one_size(node, sizes)) and _same_channels(ctx, parts, axis)
    if repeated and folded and not periodic:
        for part in parts:
            ctx.pin(part.axes.get(axis), "how many parts there are depends on the input", ReasonKind.COMPUTED_INDEX)
    elif not (folded and periodic):
        pin_moving(ctx, node, input, axis, "chunks", "sections", "split_size", "split_size_or_sections")
    return parts


def _by_one_size(node: fx.Node, sizes: Mapping[str, Any]) -> bool:
    return target_name(node) in ("split", "unsafe_split") and isinstance(next(iter(sizes.values())), int)


def _same_channels(ctx: LabelContext, parts: Any, axis: int) -> bool:
    """Whether all parts are the same channels, so that one size serves however many there are."""
    found = [ctx.labels.find(part.axes[axis]) for part in parts if axis in part.axes]
    return len(found) == len(parts) and all(np.array_equal(found[0], other) for other in found)


def _narrow(slim: Rewriter, node: fx.Node) -> None:
    x = slim.value(slim.argument(node, "input"))
    dim = slim.number(slim.argument(node, "dim")) % x.ndim
    start, length = (slim.number(slim.argument(node, name)) for name in ("start", "length"))
    kept = slim.kept(x, dim)
    if kept is not None:
        start = start % x.shape[dim]
        slim.set_argument(node, "start", int((kept < start).sum()))
        slim.set_argument(node, "length", int(((kept >= start) & (kept < start + length)).sum()))


@named("narrow", rewrite=_narrow, inplace=False)
def narrow(ctx: LabelContext, node: fx.Node, input: Value, dim: int, start: Any, length: Any) -> Any:
    pin_moving(ctx, node, input, dim % input.ndim, "start", "length")
    return moved(ctx, node, input, dim=dim, start=start, length=length)


def pin_moving(ctx: LabelContext, node: fx.Node, x: Value, axis: int, *names: str) -> None:
    """Channels that are picked by numbers which the size of the input decides stay: other sizes would pick other ones."""
    form = binding.form_of(node).arguments(node.args, node.kwargs)
    if axis in x.axes and any(isinstance(form.get(name), fx.Node) and not ctx.is_number(form[name]) for name in names):
        ctx.pin(x.axes[axis], "the size of the input decides which of its channels are taken", ReasonKind.COMPUTED_INDEX)


def _select(slim: Rewriter, node: fx.Node) -> None:
    x = slim.value(slim.argument(node, "input"))
    dim = slim.number(slim.argument(node, "dim")) % x.ndim
    kept = slim.kept(x, dim)
    if kept is not None:
        slim.set_argument(node, "index", int((kept < slim.number(slim.argument(node, "index")) % x.shape[dim]).sum()))


@named("select", rewrite=_select, inplace=False)
def select(ctx: LabelContext, node: fx.Node, input: Value, dim: int, index: Any) -> Any:
    pin_moving(ctx, node, input, dim % input.ndim, "index")
    return moved(ctx, node, input, dim=dim, index=index)


def _roll(slim: Rewriter, node: fx.Node) -> None:
    """Rolling by s moves the last s indices to the front; of those, the kept ones count."""
    x = slim.value(slim.argument(node, "input"))
    shifts, dims = slim.argument(node, "shifts"), slim.argument(node, "dims")
    if dims is None:
        return
    many = isinstance(dims, (tuple, list))
    shifts = (shifts,) * len(dims) if many and not isinstance(shifts, (tuple, list)) else shifts
    new = []
    for shift, dim in zip(shifts, dims, strict=True) if many else [(shifts, dims)]:
        kept, size = slim.kept(x, dim % x.ndim), x.shape[dim]
        new.append(shift if kept is None else int((kept >= size - slim.number(shift) % size).sum()))
    slim.set_argument(node, "shifts", tuple(new) if many else new[0])


@named("roll", rewrite=_roll, inplace=False)
def roll(ctx: LabelContext, node: fx.Node, input: Value, shifts: Any, dims: Any = None) -> Any:
    if dims is None:
        ctx.pin_all(input, "it is rolled as one flat row", ReasonKind.FLAT)
        return ctx.make(node, {}, (), input.why)
    rolled = {d % input.ndim for d in (dims if isinstance(dims, (tuple, list)) else (dims,))}
    if not rolled & set(input.axes):
        return ctx.make(node, input.axes, input.zero, input.why)
    for axis in sorted(rolled):
        pin_moving(ctx, node, input, axis, "shifts")
    return moved(ctx, node, input, shifts=shifts, dims=dims)


def _pads(slim: Rewriter, node: fx.Node) -> None:
    """Padded positions have labels of their own; the new amount is how many of them are kept."""
    x, out = slim.value(slim.argument(node, "input")), slim.value(node)
    pad = list(slim.argument(node, "pad"))
    for i in range(0, len(pad), 2):
        axis = x.ndim - 1 - i // 2
        kept_in, kept_out = slim.kept(x, axis), slim.kept(out, axis)
        if kept_in is None and kept_out is None:
            continue
        before, after = slim.number(pad[i]), slim.number(pad[i + 1])
        kept_out = np.arange(out.shape[axis]) if kept_out is None else kept_out
        kept_in = np.arange(x.shape[axis]) if kept_in is None else kept_in
        pad[i] = int((kept_out < before).sum()) if before > 0 else -int((kept_in < -before).sum())
        pad[i + 1] = int((kept_out >= out.shape[axis] - after).sum()) if after > 0 else -int((kept_in >= x.shape[axis] + after).sum())
    slim.set_argument(node, "pad", pad)


@functions(F.pad, native_functions.pad, rewrite=_pads)
def pad(ctx: LabelContext, node: fx.Node, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    return _padded_value(ctx, node, input, list(pad), mode, value)


@functions(torch.constant_pad_nd, rewrite=_pads)
def constant_pad(ctx: LabelContext, node: fx.Node, input: Value, pad: Sequence[int], value: float = 0) -> Any:
    return _padded_value(ctx, node, input, list(pad), "constant", value)


@modules(
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
)
def pad_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Any:
    """Modules pad space; one that reaches into the channels would need its amounts rewritten, so those channels stay."""
    mixed = [input.ndim - 1 - i // 2 for i in range(0, len(module.padding), 2) if module.padding[i] or module.padding[i + 1]]
    return ctx.through(node, input, mixed=mixed, zero=not (getattr(module, "value", 0) and any(p > 0 for p in module.padding)))


def _padded_value(ctx: LabelContext, node: fx.Node, x: Value, pad: list[int], mode: str, value: float | None) -> Value:
    axes = dict(x.axes)
    zero = set(x.zero)
    for i in range(0, len(pad), 2):
        axis = x.ndim - 1 - i // 2
        before, after = pad[i], pad[i + 1]
        if axis not in axes or (before, after) == (0, 0):
            continue
        if mode != "constant":
            ctx.pin(axes.pop(axis), f"it is padded in {mode} mode")
            continue
        vector = axes[axis][max(0, -before) : len(axes[axis]) + min(0, after)]
        axes[axis] = np.concatenate([ctx.fresh("before", max(0, before)), vector, ctx.fresh("after", max(0, after))])
    if mode == "constant" and value and max(pad, default=0) > 0:
        zero = set()  # removed slices are padded with it as others are
    return ctx.make(node, axes, zero, x.why)
