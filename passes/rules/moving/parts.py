"""Splits, slices of one axis, rolls and pads: how much of each part is left is counted, not guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value
from fxprune.passes.rules.moving.movement import move, moved
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, modules, named


def _split_sizes(slim: Rewriter, node: fx.Node) -> None:
    """Each part's new size: parts of one tensor may lose different numbers of channels, whatever split them."""
    x = slim.value(slim.argument(node, 0, "tensor" if "tensor" in node.kwargs else "input"))
    dim = slim.argument(node, 2, "dim", 0) % x.ndim
    if slim.kept(x, dim) is None:
        return
    parts = [slim.count(part, dim) for part in slim.value(node)]
    node.args, node.kwargs = (slim.argument(node, 0, "input"), parts), {"dim": dim}
    if node.op == "call_method":
        node.target = "split"
    else:
        node.target = torch.split


@named("split", "chunk", "split_with_sizes", "tensor_split", rewrite=_split_sizes, inplace=False)
@functions(torch.functional.split)
def split(ctx: LabelContext, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % input.ndim
    if dim in input.axes:
        return moved(ctx, node, input, *args, **kwargs)
    return tuple(ctx.make(node, input.axes, input.zero, input.why, i) for i in range(len(node.meta["val"])))


def _narrow(slim: Rewriter, node: fx.Node) -> None:
    x = slim.value(slim.argument(node, 0, "input"))
    dim = slim.argument(node, 1, "dim") % x.ndim
    start, length = (slim.number(slim.argument(node, i, n)) for i, n in ((2, "start"), (3, "length")))
    kept = slim.kept(x, dim)
    if kept is not None:
        start = start % x.shape[dim]
        slim.set_argument(node, 2, "start", int((kept < start).sum()))
        slim.set_argument(node, 3, "length", int(((kept >= start) & (kept < start + length)).sum()))


named("narrow", rewrite=_narrow, inplace=False)(move)


def _select(slim: Rewriter, node: fx.Node) -> None:
    x = slim.value(slim.argument(node, 0, "input"))
    dim = slim.argument(node, 1, "dim") % x.ndim
    kept = slim.kept(x, dim)
    if kept is not None:
        slim.set_argument(node, 2, "index", int((kept < slim.number(slim.argument(node, 2, "index")) % x.shape[dim]).sum()))


named("select", rewrite=_select, inplace=False)(move)


def _roll(slim: Rewriter, node: fx.Node) -> None:
    """Rolling by s moves the last s indices to the front; of those, the kept ones count."""
    x = slim.value(slim.argument(node, 0, "input"))
    shifts, dims = slim.argument(node, 1, "shifts"), slim.argument(node, 2, "dims", None)
    if dims is None:
        return
    many = isinstance(dims, (tuple, list))
    new = []
    for shift, dim in zip(shifts, dims, strict=True) if many else [(shifts, dims)]:
        kept, size = slim.kept(x, dim % x.ndim), x.shape[dim]
        new.append(shift if kept is None else int((kept >= size - slim.number(shift) % size).sum()))
    slim.set_argument(node, 1, "shifts", tuple(new) if many else new[0])


@named("roll", rewrite=_roll, inplace=False)
def roll(ctx: LabelContext, node: fx.Node, input: Value, shifts: Any, dims: Any = None) -> Any:
    if dims is None:
        ctx.pin_all(input, "it is rolled as one flat row", ReasonKind.FLAT)
        return ctx.make(node, {}, (), input.why)
    rolled = {d % input.ndim for d in (dims if isinstance(dims, (tuple, list)) else (dims,))}
    if not rolled & set(input.axes):
        return ctx.make(node, input.axes, input.zero, input.why)
    return moved(ctx, node, input, shifts, dims)


def _pads(slim: Rewriter, node: fx.Node) -> None:
    """Padded positions have labels of their own; the new amount is how many of them are kept."""
    x, out = slim.value(slim.argument(node, 0, "input")), slim.value(node)
    pad = list(slim.argument(node, 1, "pad"))
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
    slim.set_argument(node, 1, "pad", pad)


@functions(F.pad, torch._C._nn.pad, rewrite=_pads)
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
    return ctx.through(
        node, input, mixed=[input.ndim - 1 - i // 2 for i in range(0, len(module.padding), 2) if module.padding[i] or module.padding[i + 1]]
    )


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
        if value:
            zero.discard(axis)
    return ctx.make(node, axes, zero, x.why)
