"""Data movement whose arguments never name a channel: run literally on labels."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, Vector, values
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, modules, named


def call(node: fx.Node, named: Mapping[str, Any]) -> Any:
    """The node's own operation as a function of its first tensor."""

    def run(labels: torch.Tensor) -> Any:
        try:
            if node.op == "call_method":
                return getattr(labels, str(node.target))(**named)
            return node.target(labels, **named)  # type: ignore[operator]
        except (RuntimeError, NotImplementedError) as error:
            if "not implemented for" not in str(error):
                raise
            done = node.target(labels.double(), **named)  # type: ignore[operator]
            return done.long()

    return run


def moved(ctx: LabelContext, node: fx.Node, input: Value, **named: Any) -> Any:
    if computed := values(named):
        return ctx.opaque(node, [input, *computed], "where its parts begin and end is computed by the graph", ReasonKind.COMPUTED_INDEX)
    return ctx.move(node, input, call(node, named))


@named(
    "permute",
    "transpose",
    "swapaxes",
    "swapdims",
    "t",
    "movedim",
    "moveaxis",
    "flatten",
    "ravel",
    "unsqueeze",
    "unbind",
    "flip",
    "fliplr",
    "flipud",
    "rot90",
    "adjoint",
)
def move(ctx: LabelContext, node: fx.Node, input: Value, **named: Any) -> Any:
    return moved(ctx, node, input, **named)


@named("diagonal")
def diagonal_of(ctx: LabelContext, node: fx.Node, input: Value, offset: int = 0, dim1: int | None = None, dim2: int | None = None) -> Any:
    """Channels that meet on the diagonal go together; where only one axis has any, or it is not the main one, they stay."""
    usual = (-2, -1) if node.target is torch.linalg.diagonal else (0, 1)
    first, second = ((default if d is None else d) % input.ndim for d, default in zip((dim1, dim2), usual, strict=True))
    rows, columns = input.axes.get(first), input.axes.get(second)
    if offset or rows is None or columns is None:
        ctx.pin(rows, "a diagonal is taken")
        ctx.pin(columns, "a diagonal is taken")
        return ctx.make(node, _others(input, first, second), (), input.why)
    shorter = min(len(rows), len(columns))
    ctx.unite(rows[:shorter], columns[:shorter])
    alone = Value(input.shape, {a: v for a, v in input.axes.items() if a != second}, input.zero, input.why)
    return ctx.move(node, alone, lambda labels: labels.diagonal(offset, first, second))


@functions(torch.atleast_1d, torch.atleast_2d, torch.atleast_3d)
def at_least(ctx: LabelContext, node: fx.Node, tensors: Any) -> Any:
    given = values(tensors)
    if len(given) != 1 or not isinstance(node.meta["val"], torch.Tensor):
        return ctx.opaque(node, given, "axes of one are added to several tensors at once")
    return ctx.move(node, given[0], node.target)  # type: ignore[arg-type]


@named("diag")
def diag(ctx: LabelContext, node: fx.Node, input: Value, diagonal: int = 0) -> Any:
    return diag_embed(ctx, node, input, diagonal) if input.ndim == 1 else diagonal_of(ctx, node, input, diagonal)


@named("diag_embed")
def diag_embed(ctx: LabelContext, node: fx.Node, input: Value, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    """The last axis becomes rows and columns of a matrix that is zero elsewhere: both have its channels, unless they are shifted."""
    ndim, last = input.ndim + 1, input.ndim - 1
    pair = dim1 % ndim, dim2 % ndim
    if offset:
        ctx.pin(input.axes.get(last), "it is put beside a diagonal")
    places = [a for a in range(ndim) if a not in pair]
    axes = {places[a]: v for a, v in input.axes.items() if a != last}
    if not offset and last in input.axes:
        axes.update(dict.fromkeys(pair, input.axes[last]))
    return ctx.make(node, axes, [a for a in axes if a in pair or places.index(a) in input.zero], input.why)


def _others(x: Value, first: int, second: int) -> dict[int, Vector]:
    """Labels of the axes that a diagonal leaves, by their new places."""
    return {a - (a > first) - (a > second): v for a, v in x.axes.items() if a not in (first, second)}


@functions(getattr)
def attribute(ctx: LabelContext, node: fx.Node, input: Any, name: str) -> Any:
    if isinstance(input, tuple):  # x.max(1).values: a named result of an operation that gives several
        source = node.args[0].meta["val"]  # type: ignore[union-attr]
        return next(v for v, meta in zip(input, source, strict=True) if meta is getattr(source, name))
    if not isinstance(input, Value):  # an entry of a dict that has attributes, or of a dataclass
        return input.get(name) if isinstance(input, dict) else getattr(input, name)
    if not isinstance(node.meta["val"], torch.Tensor):
        return node.meta["val"]
    if name in ("T", "mT", "H", "mH"):
        return ctx.move(node, input, lambda labels: getattr(labels, name))
    if name in ("data", "real", "imag"):
        return ctx.make(node, input.axes, input.zero, input.why)
    return ctx.opaque(node, [input], f"its attribute {name!r} is read")


@named("pixel_shuffle", "pixel_unshuffle")
def pixels(ctx: LabelContext, node: fx.Node, input: Value, **named: Any) -> Any:
    return moved(ctx, node, _between(ctx, node, input), **named)


@modules(nn.PixelShuffle, nn.PixelUnshuffle)
def pixels_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Any:
    return ctx.move(node, _between(ctx, node, input), lambda labels: module.forward(labels))


def _between(ctx: LabelContext, node: fx.Node, x: Value) -> Value:
    """Channels (axis -3) to be spread over space: those that become one channel go together, and what lies along space stays."""
    channel, made = x.ndim - 3, node.meta["val"].shape[-3]
    for axis in (x.ndim - 2, x.ndim - 1):
        ctx.pin(x.axes.get(axis), "pixels are moved along it")
    axes = {a: v for a, v in x.axes.items() if a <= channel}
    if channel in axes and made < x.shape[channel]:
        grid = axes[channel].reshape(made, -1)
        ctx.unite(np.repeat(grid[:, 0], grid.shape[1]), axes[channel])
    return Value(x.shape, axes, x.zero, x.why)


@modules(nn.Flatten)
def move_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Any:
    return ctx.move(node, input, lambda labels: module.forward(labels))


def _shuffled(slim: Rewriter, node: fx.Node) -> None:
    """Any channels may have gone, so what is left no longer falls into groups of equal width: it is picked by its order."""
    given = slim.argument(node, "input")
    x = slim.value(given)
    kept = slim.kept(x, 1)
    if kept is not None:
        order = np.arange(x.shape[1]).reshape(slim.number(slim.argument(node, "groups")), -1).T.reshape(-1)
        chosen = np.searchsorted(kept, order[np.isin(order, kept)]).tolist()
        node.target, node.args, node.kwargs = operator.getitem, (given, (slice(None), chosen)), {}


named("channel_shuffle", "native_channel_shuffle", rewrite=_shuffled, inplace=False)(move)


def _squeezed(slim: Rewriter, node: fx.Node) -> None:
    """Axes of size one are dropped, and others never are: a channel axis left with one channel must stay. Which others are of size one,
    the batch among them, is not the same for every input."""
    x = slim.value(slim.argument(node, "input"))
    dim = slim.argument(node, "dim")
    alone = {a for a in x.axes if slim.count(x, a) == 1 < x.shape[a]}
    dims = range(x.ndim) if dim is None else dim if isinstance(dim, (tuple, list)) else [dim]
    if alone & {slim.number(d) % x.ndim for d in dims}:
        slim.set_argument(node, "dim", tuple(d for d in dims if slim.number(d) % x.ndim not in alone))


named("squeeze", rewrite=_squeezed)(move)


@functions(F.unfold)
def unfold(ctx: LabelContext, node: fx.Node, input: Value, kernel_size: Any, **_: Any) -> Any:
    """Windows of ``input`` (N, C, H, W) as columns (N, C * window, positions); padding holds no channel, so it takes its neighbour's."""
    return _columns(ctx, node, input, math.prod(kernel_size) if isinstance(kernel_size, (tuple, list)) else kernel_size**2)


@modules(nn.Unfold)
def unfold_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Any:
    kernel = module.kernel_size
    return _columns(ctx, node, input, math.prod(kernel) if isinstance(kernel, (tuple, list)) else kernel**2)


def _columns(ctx: LabelContext, node: fx.Node, x: Value, window: int) -> Any:
    channel = x.ndim - 3
    for axis in (x.ndim - 2, x.ndim - 1):
        ctx.pin(x.axes.get(axis), "it is unfolded along it")
    axes = {a: v for a, v in x.axes.items() if a < channel}
    if channel in x.axes:
        axes[channel] = np.repeat(x.axes[channel], window)
    return ctx.make(node, axes, x.zero, x.why)


@functions(F.fold)
def fold(ctx: LabelContext, node: fx.Node, input: Value, **_: Any) -> Any:
    return _folded(ctx, node, input)


@modules(nn.Fold)
def fold_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Any:
    return _folded(ctx, node, input)


def _folded(ctx: LabelContext, node: fx.Node, x: Value) -> Any:
    """Columns (N, C * window, positions) summed back to (N, C, H, W): the entries of one window go together."""
    channel = x.ndim - 2
    ctx.pin(x.axes.get(x.ndim - 1), "it is folded along it")
    channels = node.meta["val"].shape[-3]
    axes = {a: v for a, v in x.axes.items() if a < channel}
    if channel in x.axes:
        grid = x.axes[channel].reshape(channels, -1)
        ctx.unite(np.repeat(grid[:, 0], grid.shape[1]), x.axes[channel])
        axes[channel] = grid[:, 0].copy()
    return ctx.make(node, axes, x.zero, x.why)


@named("unfold", "unfold_copy", inplace=False)
def windows(ctx: LabelContext, node: fx.Node, input: Value, **named: Any) -> Any:
    if node.op == "call_function" and node.target is F.unfold:
        return unfold(ctx, node, input, **named)
    axis = named["dimension"] % input.ndim
    ctx.pin(input.axes.get(axis), "a window slides along it")
    return ctx.make(node, {a: v for a, v in input.axes.items() if a != axis}, input.zero, input.why)
