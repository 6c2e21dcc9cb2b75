"""Views, expansions and repetitions: the sizes that name channels are recomputed from what is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, values
from fxprune.passes.rules.layers import layers
from fxprune.passes.rules.moving.movement import flat, moved
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import modules, named


def _view_sizes(slim: Rewriter, node: fx.Node) -> None:
    name = "size" if "size" in node.kwargs else "shape"
    if name in node.kwargs:
        node.kwargs = {**node.kwargs, name: slim.sizes(node, node.kwargs[name])}
    else:
        node.args = (
            (node.args[0], *slim.sizes(node, flat(node.args[1:])))
            if node.op == "call_method"
            else (node.args[0], slim.sizes(node, flat(node.args[1:])))
        )


@named("view", "reshape", "_unsafe_view", rewrite=_view_sizes, inplace=False)
def view(ctx: LabelContext, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], torch.dtype):
        return ctx.opaque(node, [input], "its bits are read as another dtype")
    shape = node.meta["val"].shape
    quick = _same_places(input, shape)
    if quick is not None:
        return ctx.make(node, {quick[a]: v for a, v in input.axes.items()}, [quick[a] for a in input.zero], input.why)
    return ctx.move(node, input, lambda labels: labels.reshape(shape))


def _same_places(x: Value, shape: Sequence[int]) -> dict[int, int] | None:
    """Where each labelled axis of ``x`` lies in ``shape``, if the view leaves every one of them whole."""
    places = {}
    for axis in x.axes:
        before, size = math.prod(x.shape[:axis]), x.shape[axis]
        run = 1
        for place, extent in enumerate(shape):
            if run == before and extent == size:
                places[axis] = place
                break
            run *= extent
        else:
            return None
    return places


@named("view_as", "reshape_as", inplace=False)
def view_as(ctx: LabelContext, node: fx.Node, input: Value, other: Value) -> Any:
    moved = ctx.move(node, input, lambda labels: labels.reshape(node.meta["val"].shape))
    axes, _ = ctx.combine(moved.shape, [moved, other])
    return ctx.make(node, axes, [a for a in moved.zero if a in axes], input.why)


def _unflatten_sizes(slim: Rewriter, node: fx.Node) -> None:
    x = slim.value(slim.argument(node, 0, "input"))
    sizes = slim.argument(node, 2, "sizes" if "sizes" in node.kwargs else "unflattened_size")
    name = "sizes" if "sizes" in node.kwargs else "unflattened_size"
    slim.set_argument(node, 2, name, slim.sizes(node, sizes, slim.argument(node, 1, "dim") % x.ndim))


@named("unflatten", rewrite=_unflatten_sizes, inplace=False)
def unflatten(ctx: LabelContext, node: fx.Node, input: Value, *_: Any, **__: Any) -> Any:
    return view(ctx, node, input)


def _resize_unflatten(slim: Rewriter, module: Any, x: Value, y: Value) -> None:
    axis = module.dim % x.ndim
    module.unflattened_size = tuple(slim.count(y, axis + i) if s != -1 else -1 for i, s in enumerate(module.unflattened_size))


layers(
    nn.Unflatten,
    has_channels=False,
    resize=_resize_unflatten,
    without_parameters=lambda module, x, y: [(y, module.dim % x.ndim + i) for i, s in enumerate(module.unflattened_size) if s != -1],
)


@modules(nn.Unflatten)
def unflatten_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Any:
    return view(ctx, node, input)


def _expand_sizes(slim: Rewriter, node: fx.Node) -> None:
    _view_sizes(slim, node)


@named("expand", "broadcast_to", rewrite=_expand_sizes, inplace=False)
def expand(ctx: LabelContext, node: fx.Node, input: Value, *_: Any, **__: Any) -> Any:
    """An axis that is expanded gets labels of its own: its size can follow whatever it meets."""
    shape = tuple(node.meta["val"].shape)
    shift = len(shape) - input.ndim
    axes = {a + shift: v for a, v in input.axes.items()}
    for axis, size in enumerate(shape):
        if size > 1 and (axis < shift or input.shape[axis - shift] == 1):
            axes[axis] = ctx.fresh("expand", size, soft=True)
    return ctx.make(node, axes, [a + shift for a in input.zero], input.why)


@named("expand_as", inplace=False)
def expand_as(ctx: LabelContext, node: fx.Node, input: Value, other: Value) -> Any:
    axes, _ = ctx.combine(other.shape, [input, other])
    return ctx.make(node, axes, [a for a in axes if a - other.ndim + input.ndim in input.zero], input.why)


def _repeats(slim: Rewriter, node: fx.Node) -> None:
    x, out = slim.value(node.args[0]), slim.value(node)
    times = flat(node.args[1:]) if len(node.args) > 1 else list(node.kwargs.get("dims", node.kwargs.get("repeats", ())))  # type: ignore[arg-type]
    shift = out.ndim - x.ndim
    new = [
        slim.count(out, a) if slim.kept(out, a) is not None and (a < shift or x.shape[a - shift] == 1) else t
        for a, t in enumerate([1] * (out.ndim - len(times)) + times)
    ]
    node.args, node.kwargs = (node.args[0], tuple(new)), {}


@named("repeat", "tile", rewrite=_repeats, inplace=False)
def repeat(ctx: LabelContext, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    moved = ctx.move(node, input, lambda labels: labels.expand(input.shape).repeat(*_padded(input, args, kwargs)))
    shift = moved.ndim - input.ndim
    axes = dict(moved.axes)
    for axis, size in enumerate(moved.shape):
        if size > 1 and axis not in axes and (axis < shift or input.shape[axis - shift] == 1):
            axes[axis] = ctx.fresh("repeat", size, soft=True)
    return ctx.make(node, axes, moved.zero, input.why)


def _padded(x: Value, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
    times = flat(args) if args else list(kwargs.get("dims", kwargs.get("repeats", ())))
    return [1] * (x.ndim - len(times)) + list(times)


@named("repeat_interleave", inplace=False)
def repeat_interleave(ctx: LabelContext, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    if any(True for _ in values((args, kwargs))):
        return ctx.opaque(node, [input, *values((args, kwargs))], "it is repeated a different number of times per index")
    return moved(ctx, node, input, *args, **kwargs)
