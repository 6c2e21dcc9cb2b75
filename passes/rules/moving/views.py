"""Views, expansions and repetitions: the sizes that name channels are recomputed from what is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.passes.ir.nodes import target_name
from fxprune.passes.ir.notes import NoteKind
from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, values
from fxprune.passes.rules import binding
from fxprune.passes.rules.layer_specs import layers
from fxprune.passes.rules.moving.movement import moved
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import modules, named

BY_NUMBERS = "a view by numbers was specialised to the example inputs: larger ones would put channels of one sample into others"


def _view_sizes(slim: Rewriter, node: fx.Node) -> None:
    for name in ("size", "shape"):
        given = slim.argument(node, name)
        if isinstance(given, (tuple, list)):
            slim.set_argument(node, name, slim.sizes(node, given))


@named("view", "reshape", "_unsafe_view", "view_copy", rewrite=_view_sizes, inplace=False)
def view(ctx: LabelContext, node: fx.Node, input: Value, **named: Any) -> Any:
    if isinstance(named.get("dtype"), torch.dtype):
        return ctx.opaque(node, [input], "its bits are read as another dtype")
    shape = node.meta["val"].shape
    quick = _same_places(input, shape)
    if quick is not None:
        made = ctx.make(node, {quick[a]: v for a, v in input.axes.items()}, [quick[a] for a in input.zero], input.why)
    else:
        made = ctx.move(node, input, lambda labels: labels.reshape(shape))
    for axis, vector in input.axes.items():
        if not made.axes:
            continue
        labels = ctx.labels.find(vector)
        places = [quick[axis]] if quick is not None else [p for p, v in made.axes.items() if np.isin(ctx.labels.find(v), labels).any()]
        if not ctx.is_fixed(_source(node), axis):
            if any(_counts_positions(ctx, node, input, axis, place) for place in places):
                ctx.note(NoteKind.SIZE, BY_NUMBERS)
        elif any(place in made.axes and _shifts(ctx, node, input, axis, place) for place in places):
            if _nothing_beside(input, axis, shape):  # a map of one pixel: what other sizes give is hardly meant
                ctx.note(
                    NoteKind.SIZE, "a map of one pixel was specialised to the example inputs: of larger ones channels would lie elsewhere"
                )
            elif _would_mix_samples(ctx, node, input, axis):
                ctx.note(NoteKind.SIZE, BY_NUMBERS)
            else:
                ctx.pin(vector, "the size of the input decides where its channels lie", ReasonKind.FOLDED)
    return made


def _source(node: fx.Node) -> Any:
    """The node that gives what is seen otherwise."""
    if node.op == "call_module":  # nn.Flatten, nn.Unflatten
        return node.all_input_nodes[0]
    return binding.form_of(node).arguments(node.args, node.kwargs)["input"]


def _sizes(node: fx.Node) -> Sequence[Any] | None:
    """The sizes that a view is given, one for each axis of what it gives; None where they are not said like that."""
    if node.op == "call_module":  # nn.Flatten and nn.Unflatten: their sizes are of the axes that they take
        return None
    given = binding.form_of(node).arguments(node.args, node.kwargs)
    sizes = given.get("size", given.get("shape", ()))
    return sizes if isinstance(sizes, (tuple, list)) and len(sizes) == len(node.meta["val"].shape) else None


def _nothing_beside(x: Value, axis: int, shape: Sequence[int]) -> bool:
    return math.prod(x.shape[axis + 1 :]) == 1 and shape[-1] == x.shape[axis]


def _would_mix_samples(ctx: LabelContext, node: fx.Node, x: Value, axis: int) -> bool:
    """Whether channels stay where they are, in front of positions that are counted by numbers, with -1 for the batch: ``(b, c, n, 1)`` as
    ``(-1, c, n)``. Of inputs with other numbers of positions a sample would get channels of another, which nobody means."""
    shape, sizes = node.meta["val"].shape, _sizes(node)
    if axis != 1 or sizes is None or len(shape) < 3:
        return False
    stays = x.shape[:2] == tuple(shape[:2]) and type(sizes[0]) is int and sizes[0] == -1
    return stays and all(size != -1 and ctx.is_number(size) for size in sizes[1:])


def _counts_positions(ctx: LabelContext, node: fx.Node, x: Value, axis: int, place: int) -> bool:
    """Whether a view counts by numbers what lies behind the channels and varies with the input, and takes in what is more of it."""
    sizes = _sizes(node)
    if sizes is None:
        return False
    behind = sizes[place + 1 :]
    counted = bool(behind) and all(type(size) is int and size != -1 for size in behind)
    varies = any(not ctx.is_fixed(_source(node), a) for a in range(axis + 1, x.ndim))
    return counted and varies and any(_gives_way(ctx, size) for size in _taken_over(node, sizes))


def _shifts(ctx: LabelContext, node: fx.Node, x: Value, axis: int, place: int) -> bool:
    """Whether channels along ``axis`` lie elsewhere than along ``place`` for inputs of other sizes: ``(b, h * w, c)`` as ``(b, c, h, w)``.

    What is counted is how many elements lie between one channel and the next, before and after: a number, or sizes that the input decides.
    """
    shape, sizes = node.meta["val"].shape, _sizes(node)
    if sizes is None:
        return False
    before, after = x.ndim, len(shape)
    while before - 1 > axis and after - 1 > place and x.shape[before - 1] == shape[after - 1] > 1:
        if ctx.is_number(sizes[after - 1]) and sizes[after - 1] != -1 and not ctx.is_fixed(_source(node), before - 1):
            break  # a number that happens to be the example's size
        before, after = before - 1, after - 1
    own, behind = sizes[place], sizes[place + 1 : after]
    if all(ctx.is_fixed(_source(node), a) for a in range(axis + 1, before)):
        return any(isinstance(size, fx.Node) and not ctx.is_number(size) for size in behind) or _is_given(ctx, own)
    numbers = [size != -1 and ctx.is_number(size) for size in (own, *behind)]
    alone = numbers[0] and shape[place] == x.shape[axis]  # rather than all that lies beside it as well, as a classifier wants it
    return all(numbers[1:]) and (bool(behind) or alone) and any(_gives_way(ctx, size) for size in _taken_over(node, sizes))


def _taken_over(node: fx.Node, sizes: Sequence[Any]) -> list[Any]:
    """The sizes that are not just those of an axis of what is viewed, each axis once: these leave nothing to take in."""
    source = _source(node)
    read = [s.args[1] if isinstance(s, fx.Node) and target_name(s) == "size" and s.args[0] is source else None for s in sizes]
    return [size for size, axis in zip(sizes, read, strict=True) if axis is None or read.count(axis) > 1]


def _gives_way(ctx: LabelContext, size: Any) -> bool:
    """Whether a size takes in what is more or less of other axes. Beside numbers and the batch alone, a view fails at other sizes."""
    if not isinstance(size, fx.Node):
        return bool(size == -1)
    read_first = target_name(size) in ("size", "sym_size", "getitem") and len(size.args) == 2 and size.args[1] == 0
    return not (read_first or target_name(size) == "len" or ctx.is_number(size))


def _is_given(ctx: LabelContext, size: Any) -> bool:
    """Whether a size is one that the input decides, with no number of channels in it."""
    if not isinstance(size, fx.Node) or ctx.is_number(size):
        return False
    todo = [size]
    while todo:
        node = todo.pop()
        if node.op == "call_method" and node.target == "size":
            if ctx.is_number(node):
                return False
            continue
        if any(isinstance(a, int) and a > 1 for a in node.args) and target_name(node) in ("mul", "imul"):
            return False
        todo += [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.Tensor)]
    return True


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
    x = slim.value(slim.argument(node, "input"))
    first = slim.number(slim.argument(node, "dim")) % x.ndim
    slim.set_argument(node, "sizes", slim.sizes(node, slim.argument(node, "sizes"), first))


@named("unflatten", rewrite=_unflatten_sizes, inplace=False)
def unflatten(ctx: LabelContext, node: fx.Node, input: Value, **_: Any) -> Any:
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


@named("expand", "broadcast_to", rewrite=_view_sizes, inplace=False)
def expand(ctx: LabelContext, node: fx.Node, input: Value, **_: Any) -> Any:
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


def _times(x: Value, named: Mapping[str, Any]) -> list[Any]:
    """How often each axis of the result is repeated; ``x`` may have fewer axes, or for ``tile`` more."""
    given = next(iter(named.values()))
    times = list(given) if isinstance(given, (tuple, list)) else [given]
    return [1] * (x.ndim - len(times)) + times


def _repeats(slim: Rewriter, node: fx.Node) -> None:
    x, out = slim.value(slim.argument(node, "input")), slim.value(node)
    name = "repeats" if slim.argument(node, "repeats") is not None else "dims"
    times = _times(x, {name: slim.argument(node, name)})
    shift = out.ndim - x.ndim
    new = []
    for axis, given in enumerate(times):
        inside = 1 if axis < shift else slim.count(x, axis - shift)
        left = slim.count(out, axis)
        new.append(given if left == inside * slim.number(given) else slim.rescaled(given, left // inside))
    slim.set_argument(node, name, tuple(new))


@named("repeat", "tile", rewrite=_repeats, inplace=False)
def repeat(ctx: LabelContext, node: fx.Node, input: Value, **named: Any) -> Any:
    times = _times(input, named)
    form = binding.form_of(node).arguments(node.args, node.kwargs)
    counted = _times(input, {k: v for k, v in form.items() if k != "input"})
    shift = len(times) - input.ndim
    once = set()
    for axis, vector in input.axes.items():
        if times[axis + shift] > 1 and isinstance(counted[axis + shift], fx.Node) and ctx.counts_channels(counted[axis + shift]):
            # A filter of every channel: the channels that it is repeated for are those that go.
            ctx.pin(vector, "it is repeated once for each channel", ReasonKind.FOLDED)
            once.add(axis + shift)
    inside = Value(input.shape, {a: v for a, v in input.axes.items() if a + shift not in once}, input.zero, input.why)
    moved = ctx.move(node, inside, lambda labels: labels.expand(input.shape).repeat(*times))
    axes = dict(moved.axes)
    for axis, size in enumerate(moved.shape):
        if axis in once:
            axes[axis] = np.repeat(ctx.fresh("repeat", times[axis], soft=True), size // times[axis])
        elif size > 1 and axis not in axes and (axis < shift or input.shape[axis - shift] == 1):
            axes[axis] = ctx.fresh("repeat", size, soft=True)
    return ctx.make(node, axes, moved.zero, input.why)


@named("repeat_interleave", inplace=False)
def repeat_interleave(ctx: LabelContext, node: fx.Node, input: Value, **named: Any) -> Any:
    if found := values(named):
        return ctx.opaque(node, [input, *found], "it is repeated a different number of times per index")
    return moved(ctx, node, input, **named)
