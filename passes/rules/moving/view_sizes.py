"""Whether a view puts channels elsewhere for inputs of other sizes: ``(b, h * w, c)`` as ``(b, c, h, w)``, or the numbers of the example.

What the sizes say settles most views. For the others the graph is run on other sizes, where that can be done, and the labels are viewed
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.passes.ir.nodes import target_name
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, Vector
from fxprune.passes.rules import binding

Shapes = Mapping[fx.Node, Sequence[int]]
_MOVING = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten"})


class Elsewhere(Enum):
    """Where channels lie for inputs of other sizes."""

    NOWHERE = "where they lie on the example, as far as is known"
    IN_OTHER_SAMPLES = "in front of positions that are counted by numbers: a sample gets channels of another, which nobody means"
    NOT_KNOWN = "elsewhere, if the network took other sizes; it took none that were tried"
    IN_OTHER_CHANNELS = "in place of other channels"


def elsewhere(ctx: LabelContext, node: fx.Node, x: Value, made: Value, axis: int, places: Sequence[int]) -> Elsewhere:
    """Where a view of ``x`` as ``made`` puts the channels along ``axis``, on the example along ``places``, for inputs of other sizes."""
    if _is_plain(ctx, node, x, axis):
        return Elsewhere.NOWHERE
    source = _source(node)
    tried = ctx.other_shapes(node)
    if tried:
        moved = [(t[source], t[node]) for t in tried if any(_lies_elsewhere(ctx, node, made, axis, p, t) for p in places)]
        if moved:
            mixed = _stay(x, made, axis, places) and all(before[0] != after[0] for before, after in moved)
            return Elsewhere.IN_OTHER_SAMPLES if mixed else Elsewhere.IN_OTHER_CHANNELS
        if any(t[source][1:] != x.shape[1:] for t in tried) or (axis and _is_every_size_tried(ctx, node, tried)):
            return Elsewhere.NOWHERE
    said = _by_what_its_sizes_say(ctx, node, x, axis, places)
    if tried is not None and said is Elsewhere.IN_OTHER_CHANNELS:  # the network takes no other size that was tried
        return Elsewhere.NOT_KNOWN
    return said


def _is_every_size_tried(ctx: LabelContext, node: fx.Node, tried: Sequence[Shapes]) -> bool:
    """Whether each size that the input decides was another in some of what was tried. What is viewed is then known to vary with the
    batch alone where it did not vary with more: kernels that are made for each sample (``view(b * o, i, k, k)``)."""
    for given in node.graph.find_nodes(op="placeholder"):
        value = given.meta["val"]
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            return False
        for axis, size in enumerate(value.shape):
            if not ctx.is_fixed(given, axis) and all(t[given][axis] == size for t in tried):
                return False
    return True


def _stay(x: Value, made: Value, axis: int, places: Sequence[int]) -> bool:
    """Whether on the example the channels lie in front of what they lay in front of, as one axis or several, or flat with all of it."""
    if x.shape[:axis] != made.shape[:axis]:
        return False
    end = next((e for e in range(axis + 1, made.ndim + 1) if math.prod(made.shape[axis:e]) == x.shape[axis]), axis)
    return all(axis <= place < end for place in places) or (made.ndim == axis + 1 and list(places) == [axis])


def _by_what_its_sizes_say(ctx: LabelContext, node: fx.Node, x: Value, axis: int, places: Sequence[int]) -> Elsewhere:
    if not ctx.is_fixed(_source(node), axis):
        counted = any(_counts_positions(ctx, node, x, axis, place) for place in places)
        return Elsewhere.IN_OTHER_SAMPLES if counted else Elsewhere.NOWHERE
    if not any(_shifts(ctx, node, x, axis, place) for place in places):
        return Elsewhere.NOWHERE
    return Elsewhere.IN_OTHER_SAMPLES if _would_mix_samples(ctx, node, x, axis) else Elsewhere.IN_OTHER_CHANNELS


def _is_plain(ctx: LabelContext, node: fx.Node, x: Value, axis: int) -> bool:
    """Whether the sizes alone say that the channels along ``axis`` stay where they are: what lies behind them is the same before and
    after, be it read of ``x`` or a product of numbers, or what lies in front is and all else is one axis."""
    sizes, source, shape = _sizes(node), _source(node), node.meta["val"].shape
    if sizes is None:
        return node.op == "call_module" or target_name(node) != "unflatten" or ctx.is_fixed(source, axis)
    fixed = [ctx.is_fixed(source, a) for a in range(x.ndim)]
    numbers = [size != -1 and ctx.is_number(size) for size in sizes]

    def same(before: int, place: int) -> bool:
        size = sizes[place]
        if isinstance(size, fx.Node) and ctx.is_size_of(size, source, before):
            return True
        return fixed[before] and numbers[place] and x.shape[before] == shape[place]

    before, after = x.ndim, len(shape)
    while before - 1 > axis and after and same(before - 1, after - 1):
        before, after = before - 1, after - 1
    first = 0
    while first < min(before, after) and same(first, first):
        first += 1
    if first > axis or after - first == 1:
        return True
    inside, outside = 1, 1
    for start in range(before - 1, -1, -1):
        if not fixed[start]:
            break
        inside *= x.shape[start]
        while outside < inside and after and numbers[after - 1]:
            after -= 1
            outside *= shape[after]
        if start <= axis and outside == inside:
            return True
    return False


def _lies_elsewhere(ctx: LabelContext, node: fx.Node, made: Value, axis: int, place: int, shapes: Shapes) -> bool:
    """Whether the channels lie elsewhere than along ``place`` where the tensors have ``shapes``."""
    source = _source(node)
    labels = _labels_at(ctx, source, axis, shapes)
    if labels is None:
        return False
    before, after = shapes[source], shapes[node]
    wanted = ctx.labels.find(made.axes[place])
    if before[axis] == after[place] and math.prod(before[axis + 1 :]) == math.prod(after[place + 1 :]):
        wanted = labels if len(labels) != len(wanted) else wanted
        return not np.array_equal(labels, wanted)
    line = _line(_viewed(labels, axis, before, after), place)
    if line is None:
        return True
    found, once = _runs(line), _once(_runs(wanted))
    return len(found) % len(once) != 0 or not np.array_equal(np.resize(once, len(found)), found)


def _once(labels: Vector) -> Vector:
    """Labels that are repeated as a whole, once."""
    first = labels[: len(np.unique(labels))]
    return first if len(labels) % len(first) == 0 and np.array_equal(np.resize(first, len(labels)), labels) else labels


def _viewed(labels: Vector, axis: int, before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
    along = [1] * len(before)
    along[axis] = len(labels)
    return torch.from_numpy(labels).view(along).expand(*before).reshape(*after)


def _line(labels: torch.Tensor, place: int) -> Vector | None:
    """The labels along one axis, None where they vary along another."""
    line = labels[tuple(slice(None) if a == place else slice(0, 1) for a in range(labels.ndim))]
    return line.flatten().numpy() if bool((labels == line).all()) else None


def _labels_at(ctx: LabelContext, node: Any, axis: int, shapes: Shapes) -> Vector | None:
    """The labels along an axis of a tensor where the tensors have ``shapes``; None where that is not plain."""
    value = ctx.env[ctx.mode][node]
    vector, size = value.axes[axis], shapes[node][axis]
    longer = _longer(ctx.labels.find(vector), size)
    if longer is not None:
        return longer
    for source in node.all_input_nodes:
        given = ctx.env[ctx.mode].get(source)
        for a, other in given.axes.items() if isinstance(given, Value) else ():
            if other is vector and shapes[source][a] == size:
                return _labels_at(ctx, source, a, shapes)
    if target_name(node) not in _MOVING:
        return None
    source = _source(node)
    for a, other in ctx.env[ctx.mode][source].axes.items():
        if np.isin(ctx.labels.find(vector), ctx.labels.find(other)).any():
            labels = _labels_at(ctx, source, a, shapes)
            return None if labels is None else _line(_viewed(labels, a, shapes[source], shapes[node]), axis)
    return None


def _longer(labels: Vector, size: int) -> Vector | None:
    """The labels along an axis that has another size: more samples, or more positions of each channel; None where neither is plain."""
    if len(labels) == size:
        return labels
    runs = _runs(labels)
    if len(runs) < len(labels):
        each = len(labels) // len(runs)
        grown = size % len(runs) == 0 and len(np.unique(runs)) == len(runs) and np.array_equal(np.repeat(runs, each), labels)
        return np.repeat(runs, size // len(runs)) if grown else None
    once = _once(labels)
    return np.resize(once, size) if len(once) < len(labels) and size % len(once) == 0 else None


def _runs(labels: Vector) -> Vector:
    """The labels without the repetitions that follow each other."""
    return labels[np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))]


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
