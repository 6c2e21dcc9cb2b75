"""Tensors that the graph makes, and sizes that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxprune.passes.rules.registry import functions, named
from fxprune.passes.rules.values import Value

if TYPE_CHECKING:
    from fxprune.passes.labels import Walk


def _factory_sizes(slim: Any, node: fx.Node) -> None:
    given: Any = node.kwargs.get("size")
    if given is not None:
        node.kwargs = {**node.kwargs, "size": slim.sizes(node, given)}
        return
    first = 1 if node.op == "call_method" else 0
    args: Any = node.args[first:]
    listed = isinstance(args[0], (tuple, list))
    node.args = (*node.args[:first], slim.sizes(node, args[0] if listed else args), *(args[1:] if listed else ()))


@functions(torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn, torch.full, rewrite=_factory_sizes)
def factory(walk: Walk, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Every axis gets labels of its own: its size can follow whatever it meets."""
    shape = tuple(node.meta["val"].shape)
    axes = {a: walk.fresh("factory", n, soft=True) for a, n in enumerate(shape) if n > 1}
    return walk.make(node, axes, axes if node.target is torch.zeros else (), f"it is made by {walk.op_name()}")


for _name in ("new_zeros", "new_ones", "new_empty", "new_full"):
    named(_name, rewrite=_factory_sizes, inplace=False)(lambda walk, node, *args, **kwargs: factory(walk, node))


@functions(
    torch.arange,
    torch.scalar_tensor,
    torch.linspace,
    torch.eye,
    torch.randint,
    torch.randperm,
    torch.tensor,
    torch.tril_indices,
    torch.triu_indices,
    torch.normal,
)
def positions(walk: Walk, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Their values depend on where they stand, so their sizes stay."""
    return walk.make(node, {}, (), f"it is made by {walk.op_name()}")


def _size_read(slim: Any, node: fx.Node) -> None:
    """Reads of a pruned axis are answered with its original size while the graph is copied (see ``slim``)."""


@named("size", rewrite=_size_read, inplace=False)
def size(walk: Walk, node: fx.Node, input: Value, *_: Any) -> Any:
    return node.meta["val"]


@functions(torch._assert)
def assertion(walk: Walk, node: fx.Node, *_: Any, **__: Any) -> Any:
    return None
