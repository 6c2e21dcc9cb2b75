"""Tensors that the graph makes, and sizes that it reads."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, named


def _factory_sizes(slim: Rewriter, node: fx.Node) -> None:
    given: Any = node.kwargs.get("size")
    if given is not None:
        node.kwargs = {**node.kwargs, "size": slim.sizes(node, given)}
        return
    first = 1 if node.op == "call_method" else 0
    args: Any = node.args[first:]
    listed = isinstance(args[0], (tuple, list))
    node.args = (*node.args[:first], slim.sizes(node, args[0] if listed else args), *(args[1:] if listed else ()))


@functions(torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn, torch.full, rewrite=_factory_sizes)
def factory(ctx: LabelContext, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Every axis gets labels of its own: its size can follow whatever it meets."""
    shape = tuple(node.meta["val"].shape)
    axes = {a: ctx.fresh("factory", n, soft=True) for a, n in enumerate(shape) if n > 1}
    return ctx.make(node, axes, axes if node.target is torch.zeros else (), f"it is made by {ctx.op_name()}")


for _name in ("new_zeros", "new_ones", "new_empty", "new_full"):
    named(_name, rewrite=_factory_sizes, inplace=False)(lambda ctx, node, *args, **kwargs: factory(ctx, node))


def _picked(slim: Rewriter, node: fx.Node) -> None:
    """The values stand where the original has them; those of removed channels are left out."""
    value = slim.value(node)
    for axis in sorted(value.axes):
        kept = slim.kept(value, axis)
        if kept is not None:
            made = slim.new.create_node(node.op, node.target, node.args, node.kwargs)
            node.target, node.args, node.kwargs = operator.getitem, (made, (*[slice(None)] * axis, kept.tolist())), {}


@functions(torch.arange, torch.linspace, torch.logspace, torch.eye, torch.tensor, torch.as_tensor, rewrite=_picked)
def counted(ctx: LabelContext, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Numbers made of literals and channel counts alone, one for each channel maybe (the frequencies of a positional encoding)."""
    static = all(_is_static(ctx, source) for source in node.all_input_nodes)
    axes = {a: ctx.fresh("factory", n, soft=True) for a, n in enumerate(node.meta["val"].shape) if n > 1 and static}
    made: Value = ctx.make(node, axes, (), f"it is made by {ctx.op_name()}")
    return made


def _is_static(ctx: LabelContext, node: fx.Node) -> bool:
    """Whether a number is the same for every input: channel counts, and what is computed of them."""
    if node.op == "call_method" and node.target == "size":
        source, axis = cast(tuple[fx.Node, int], node.args)
        value = ctx.env[ctx.mode][source]
        return isinstance(value, Value) and axis % value.ndim in value.axes
    if node.op == "placeholder" or isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if node.target is getattr and node.args[1] in ("device", "dtype"):
        return True
    return all(_is_static(ctx, source) for source in node.all_input_nodes)


@functions(torch.scalar_tensor, torch.randint, torch.randperm, torch.tril_indices, torch.triu_indices, torch.normal)
def positions(ctx: LabelContext, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Their values depend on where they stand, so their sizes stay."""
    return ctx.make(node, {}, (), f"it is made by {ctx.op_name()}")


def _size_read(slim: Rewriter, node: fx.Node) -> None:
    """Reads of a pruned axis are answered with its original size while the graph is copied (see ``slim``)."""


@named("size", rewrite=_size_read, inplace=False)
def size(ctx: LabelContext, node: fx.Node, input: Value, *_: Any) -> Any:
    return node.meta["val"]


@functions(torch._assert)
def assertion(ctx: LabelContext, node: fx.Node, *_: Any, **__: Any) -> Any:
    return None
