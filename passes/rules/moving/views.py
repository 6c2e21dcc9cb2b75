"""Views, expansions and repetitions: the sizes that name channels are recomputed from what is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.passes.ir.notes import NoteKind
from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, values
from fxprune.passes.rules import binding
from fxprune.passes.rules.layer_specs import layers
from fxprune.passes.rules.moving.movement import moved
from fxprune.passes.rules.moving.view_sizes import Elsewhere, elsewhere
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
        found = elsewhere(ctx, node, input, made, axis, [p for p in places if p in made.axes])
        if found is Elsewhere.IN_OTHER_SAMPLES:
            ctx.note(NoteKind.SIZE, BY_NUMBERS)
        elif found is Elsewhere.NOT_KNOWN:
            ctx.note(
                NoteKind.SIZE, "a view by numbers was specialised to the example inputs: no other sizes were found that the model takes"
            )
        elif found is Elsewhere.IN_OTHER_CHANNELS and _nothing_beside(input, axis, shape):  # what other sizes give is hardly meant
            ctx.note(NoteKind.SIZE, "a map of one pixel was specialised to the example inputs: of larger ones channels would lie elsewhere")
        elif found is Elsewhere.IN_OTHER_CHANNELS:
            ctx.pin(vector, "the size of the input decides where its channels lie", ReasonKind.FOLDED)
    return made


def _nothing_beside(x: Value, axis: int, shape: Sequence[int]) -> bool:
    return math.prod(x.shape[axis + 1 :]) == 1 and shape[-1] == x.shape[axis]


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


def _own_sizes(slim: Rewriter, node: fx.Node) -> None:
    """Where the other tensor loses channels along an axis that the first has by itself, that axis is named as the first has it."""
    source, other = slim.argument(node, "input"), slim.argument(node, "other")
    x, like = slim.value(source), slim.value(other)
    shift = like.ndim - x.ndim
    own = [a >= shift and x.shape[a - shift] != 1 for a in range(like.ndim)]
    if any(mine and slim.count(x, a - shift) != slim.count(like, a) for a, mine in enumerate(own)):
        node.target = "expand"
        sizes = [-1 if mine else slim.new.call_method("size", (other, a)) for a, mine in enumerate(own)]
        node.args, node.kwargs = (source, *sizes), {}


@named("expand_as", rewrite=_own_sizes, inplace=False)
def expand_as(ctx: LabelContext, node: fx.Node, input: Value, other: Value) -> Any:
    """Of ``other`` only sizes are taken: along an axis that ``input`` has by itself, without channels, those of ``other`` may go."""
    shift = other.ndim - input.ndim
    bare = {a for a in other.axes if a >= shift and input.shape[a - shift] != 1 and a - shift not in input.axes}
    like = Value(other.shape, {a: v for a, v in other.axes.items() if a not in bare}, other.zero, other.why)
    axes, _ = ctx.combine(other.shape, [input, like])
    return ctx.make(node, axes, [a for a in axes if a - shift in input.zero], input.why)


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


def _as_long_as_it_gets(slim: Rewriter, node: fx.Node) -> None:
    """The length of the result, which torch takes to save a look at the repeats, is that of the original: of one number it is known."""
    if slim.argument(node, "output_size") is not None and isinstance(slim.argument(node, "repeats"), int):
        slim.set_argument(node, "output_size", None)


@named("repeat_interleave", rewrite=_as_long_as_it_gets, inplace=False)
def repeat_interleave(ctx: LabelContext, node: fx.Node, input: Value, **named: Any) -> Any:
    if found := values(named):
        return ctx.opaque(node, [input, *found], "it is repeated a different number of times per index")
    return moved(ctx, node, input, **named)
