"""Tensors that the graph makes, and sizes that it reads."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from fxprune.passes.compat import assert_true
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, values
from fxprune.passes.rules.computing import zeros
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, named


def _factory_sizes(slim: Rewriter, node: fx.Node) -> None:
    slim.set_argument(node, "size", slim.sizes(node, slim.argument(node, "size")))


@functions(torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn, torch.full, rewrite=_factory_sizes)
def factory(ctx: LabelContext, node: fx.Node, **_: Any) -> Value:
    """Every axis gets labels of its own: its size can follow whatever it meets."""
    shape = tuple(node.meta["val"].shape)
    axes = {a: ctx.fresh("factory", n, soft=True) for a, n in enumerate(shape) if n > 1}
    return ctx.make(node, axes, axes if target_name(node) in ("zeros", "new_zeros") else (), f"it is made by {ctx.op_name()}")


def _drawn_sizes(slim: Rewriter, node: fx.Node) -> None:
    if slim.argument(node, "size") is not None:
        _factory_sizes(slim, node)


@functions(torch.normal, rewrite=_drawn_sizes)
def drawn(ctx: LabelContext, node: fx.Node, **arguments: Any) -> Any:
    """One number for each mean and standard deviation, or as many as its size says."""
    return zeros.elementwise(ctx, node) if values(arguments) else factory(ctx, node)


for _name in ("new_zeros", "new_ones", "new_empty", "new_full"):
    named(_name, rewrite=_factory_sizes, inplace=False)(factory)


def _as_large(slim: Rewriter, node: fx.Node) -> None:
    """Where other channels go than those of the tensor that gives the size, another tensor of the right size gives it."""
    given = slim.argument(node, "input")
    source, made = slim.value(given), slim.value(node)
    sizes = [slim.count(made, a) if slim.count(made, a) != slim.count(source, a) else None for a in range(made.ndim)]
    if any(size is not None for size in sizes):
        size = tuple(slim.new.call_method("size", (given, a)) if n is None else n for a, n in enumerate(sizes))
        slim.set_argument(node, "input", slim.new.call_method("new_empty", (given, size)))


@named("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", rewrite=_as_large, inplace=False)
def like(ctx: LabelContext, node: fx.Node, input: Value, **_: Any) -> Any:
    """Of ``input`` it has the sizes alone: which channels these are is for what it meets to say. Where channels are folded with other
    axes, which no factory could size, it has theirs."""
    axes = {a: ctx.fresh("factory", len(v), soft=True) if ctx.labels.units(v) == len(v) else v for a, v in input.axes.items()}
    return ctx.make(node, axes, axes if target_name(node) == "zeros_like" else (), input.why)


def _picked(slim: Rewriter, node: fx.Node) -> None:
    """The values stand where the original has them; those of removed channels are left out."""
    value = slim.value(node)
    for axis in sorted(value.axes):
        kept = slim.kept(value, axis)
        if kept is not None:
            made = slim.new.create_node(node.op, node.target, node.args, node.kwargs)
            node.op, node.target, node.kwargs = "call_function", operator.getitem, {}
            node.args = (made, (*[slice(None)] * axis, kept.tolist()))


@functions(torch.arange, torch.linspace, torch.logspace, torch.eye, rewrite=_picked)
def counted(ctx: LabelContext, node: fx.Node, **_: Any) -> Value:
    """Numbers made of literals and channel counts alone, one for each channel maybe (the frequencies of a positional encoding)."""
    return _counted(ctx, node, node.all_input_nodes)


def _counted(ctx: LabelContext, node: fx.Node, given: Sequence[fx.Node]) -> Value:
    static = all(_is_static(ctx, source) for source in given)
    axes = {a: ctx.fresh("factory", n, soft=True) for a, n in enumerate(node.meta["val"].shape) if n > 1 and static}
    made: Value = ctx.make(node, axes, (), f"it is made by {ctx.op_name()}")
    return made


def _given(node: fx.Node) -> list[fx.Node]:
    """What a tensor is made of; another tensor, which it is made for, has no part in it."""
    return [n for n in node.all_input_nodes if target_name(node) != "new_tensor" or n is not node.args[0]]


def _copied(slim: Rewriter, node: fx.Node) -> None:
    if not any(isinstance(slim.value(one), Value) for one in _given(node)):  # a tensor has lost its channels already
        _picked(slim, node)


@functions(torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor, rewrite=_copied)
@named("new_tensor", rewrite=_copied, inplace=False)
def copied(ctx: LabelContext, node: fx.Node, **arguments: Any) -> Any:
    """A copy of one tensor has its channels; one of literals may hold one number for each channel."""
    given = values({k: v for k, v in arguments.items() if k != "input" or target_name(node) != "new_tensor"})
    if not given:
        return _counted(ctx, node, _given(node))
    shape = tuple(node.meta["val"].shape)
    if len(given) == 1 and given[0].shape == shape:
        return ctx.make(node, given[0].axes, given[0].zero, given[0].why)
    return ctx.opaque(node, given, "its numbers are copied into a tensor")


def _is_static(ctx: LabelContext, node: fx.Node) -> bool:
    """Whether a number is the same for every input: channel counts, and what is computed of them."""
    if node.op == "call_method" and node.target == "size":
        source, axis = cast(tuple[fx.Node, int], node.args)
        value = ctx.env[ctx.mode].get(source)
        return isinstance(value, Value) and axis % value.ndim in value.axes and ctx.is_number(node)
    if node.op == "placeholder" or isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if node.target is getattr and node.args[1] in ("device", "dtype"):
        return True
    return all(_is_static(ctx, source) for source in node.all_input_nodes)


@functions(torch.scalar_tensor, torch.randint, torch.randperm, torch.tril_indices, torch.triu_indices)
def positions(ctx: LabelContext, node: fx.Node, **_: Any) -> Value:
    """Their values depend on where they stand, so their sizes stay."""
    return ctx.make(node, {}, (), f"it is made by {ctx.op_name()}")


def _size_read(slim: Rewriter, node: fx.Node) -> None:
    """Reads of a pruned axis are answered with its original size while the graph is copied (see ``slim``)."""


@named("size", rewrite=_size_read, inplace=False)
def size(ctx: LabelContext, node: fx.Node, input: Value, **_: Any) -> Any:
    return node.meta["val"]


@named("stride", inplace=False)
def stride(ctx: LabelContext, node: fx.Node, input: Value, dim: Any = None) -> Any:
    """Channels stay whose number is in a stride that is read: those of axes that lie closer in memory."""
    source: Any = node.args[0]
    steps = source.meta["val"].stride()
    furthest = max(steps, default=0) if dim is None else steps[dim]
    for axis, vector in input.axes.items():
        if steps[axis] < furthest:
            ctx.pin(vector, "its strides are read")
    return node.meta["val"]


def _numel(slim: Rewriter, node: fx.Node) -> None:
    """The number of elements of the original, from that of what is left."""
    given = slim.argument(node, "input")
    x = slim.value(given)
    left, whole = math.prod(slim.count(x, a) for a in range(x.ndim)), math.prod(x.shape)
    if left == whole:
        return
    made = slim.new.create_node(node.op, node.target, node.args, node.kwargs)
    divisor = math.gcd(left, whole)
    times = slim.new.call_function(operator.mul, (made, whole // divisor))
    node.op, node.target, node.args, node.kwargs = "call_function", operator.floordiv, (times, left // divisor), {}


@named("numel", "nelement", rewrite=_numel, inplace=False)
def numel(ctx: LabelContext, node: fx.Node, input: Value) -> Any:
    return node.meta["val"]


@functions(assert_true)
def assertion(ctx: LabelContext, node: fx.Node, **_: Any) -> Any:
    return None
