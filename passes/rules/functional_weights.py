"""Layers that are calls, not modules: which dimension of a parameter holds the output channels of the function that reads it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxprune.passes.compat import OpOverload, OpOverloadPacket
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.ir.traced import TracedModel

# Where the weight stands among the arguments, for functions whose weight has its outputs along dimension 0.
_ROWS: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d, "torchvision::deform_conv2d"), (1,)),
    F.bilinear: (2,),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), (2, 3)),
}
_TRANSPOSED = frozenset({F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})
_PRODUCTS = frozenset({torch.matmul, operator.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, "matmul", "mm", "bmm"})


def output_dims(traced: TracedModel) -> dict[str, frozenset[int]]:
    """Parameter name -> its dimensions that are output channels of a functional layer. Weights that are transposed or computed first
    are followed to where they are read."""
    found: dict[str, set[int]] = {}
    skeleton = traced.skeleton
    for graph in traced.graphs.values():
        for node in graph.nodes:
            name = str(node.target)
            if node.op == "get_attr" and name in skeleton.parameter_names and skeleton.tensor(name).ndim > 1:
                dims = list(range(skeleton.tensor(name).ndim))
                found.setdefault(name, set()).update(d for d in _produced(node, dims) if d >= 0)
    return {name: frozenset(dims) for name, dims in found.items() if dims}


def _produced(node: fx.Node, dims: Sequence[int]) -> Iterator[int]:
    """``dims``: for each axis of what ``node`` gives (of each part, where it gives several), the parameter's dimension, -1 for none."""
    for user in node.users:
        target = _function(user)
        if target in _ROWS:
            if any(_argument(user, place, "weight") is node for place in _ROWS[target]):
                yield dims[0]
        elif target in _TRANSPOSED:
            if _argument(user, 1, "weight") is node:
                yield dims[1 if (_argument(user, 6, "groups") or 1) == 1 else 0]
        elif target is F.embedding:
            if _argument(user, 1, "weight") is node:
                yield dims[1]
        elif target in _PRODUCTS:
            yield dims[-1] if user.args and user.args[-1] is node else dims[-2]
        elif (moved := _moved(node, user, dims)) is not None:
            yield from _produced(user, moved)


def _function(node: fx.Node) -> Any:
    """What a node calls; an operator of a library that may not be imported goes by its name."""
    target: Any = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    return target._qualified_op_name if isinstance(target, OpOverloadPacket) else target


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _moved(source: fx.Node, node: fx.Node, dims: Sequence[int]) -> Sequence[int] | None:
    """The dimensions after a transposition, a split, an operation that keeps the shape (a norm of the weight), or one that puts more in
    front (a weight expanded over a batch); None after anything else."""
    name = target_name(node)
    before, after = source.meta.get("val"), node.meta.get("val")
    if name == "getitem" and not isinstance(before, torch.Tensor):
        return dims
    if name == "getattr" and node.args[1] in ("T", "mT") or name == "t":
        return [*dims[:-2], dims[-1], dims[-2]]
    if name in ("transpose", "swapaxes", "swapdims") and len(node.args) == 3:
        first, second = (int(a) for a in node.args[1:])  # type: ignore[arg-type]
        made = list(dims)
        made[first], made[second] = made[second], made[first]
        return made
    if name == "permute" and len(node.args) > 1:
        order: Any = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return [dims[i] for i in order]
    if name in ("split", "split_with_sizes", "chunk"):
        return dims
    if not isinstance(after, torch.Tensor) or not isinstance(before, torch.Tensor):
        return None
    same = tuple(after.shape[-before.ndim :]) == tuple(before.shape)
    return [*[-1] * (after.ndim - before.ndim), *dims] if same else None
