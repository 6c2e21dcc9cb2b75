"""Concatenation and stacking: labels follow one another, or meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.passes.ir.nodes import target_name
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, Vector
from fxprune.passes.rules.registry import functions, named


@named("cat", "concat", "concatenate", inplace=False)
def cat(ctx: LabelContext, node: fx.Node, tensors: Sequence[Value], dim: int = 0, **kwargs: Any) -> Value:
    parts = [t for t in tensors if t.shape != (0,)]
    return _joined(ctx, node, parts, kwargs.get("axis", dim) % parts[0].ndim)


def _joined(ctx: LabelContext, node: fx.Node, parts: Sequence[Value], dim: int) -> Value:
    axes: dict[int, Vector] = {}
    zero: set[int] = set()
    for axis in {a for p in parts for a in p.axes} - {dim}:
        bare = next((p for p in parts if axis not in p.axes), None)
        having = [p for p in parts if axis in p.axes]
        if bare is not None:
            for part in having:
                ctx.clash(part.axes[axis], bare)
                ctx.pin(part.axes[axis], "it is concatenated with a tensor of fixed size", because=bare.why)
            continue
        first = next((p.axes[axis] for p in having if not ctx.is_soft(p.axes[axis])), having[0].axes[axis])
        for part in having:
            ctx.unite(first, part.axes[axis])
        axes[axis] = first
        if all(axis in p.zero for p in parts):
            zero.add(axis)
    if any(dim in p.axes for p in parts):
        pieces = []
        for part in parts:
            piece = part.axes.get(dim)
            if piece is None:
                piece = ctx.fresh("cat", part.shape[dim])
                ctx.pin(piece, "it is a part of fixed size", because=part.why)
            pieces.append(piece)
        axes[dim] = np.concatenate(pieces)
        if all(dim in p.zero or dim not in p.axes for p in parts):  # a part of fixed size loses nothing
            zero.add(dim)
    return ctx.make(node, axes, zero, parts[0].why)


@named("stack", inplace=False)
def stack(ctx: LabelContext, node: fx.Node, tensors: Sequence[Value], dim: int = 0, **_: Any) -> Value:
    place = dim % (tensors[0].ndim + 1)
    shifted = [
        Value(
            (*t.shape[:place], 1, *t.shape[place:]),
            {a + (a >= place): v for a, v in t.axes.items()},
            frozenset(a + (a >= place) for a in t.zero),
            t.why,
        )
        for t in tensors
    ]
    return _joined(ctx, node, shifted, place)


_ALONG = {"hstack": 1, "column_stack": 1, "vstack": 0, "row_stack": 0, "dstack": 2}


@named(*_ALONG, inplace=False)
def stacked(ctx: LabelContext, node: fx.Node, tensors: Sequence[Value], **_: Any) -> Any:
    """Concatenation along an axis that the name says; tensors that lack it get one."""
    name, dims = target_name(node), {t.ndim for t in tensors}
    dim, least = _ALONG[name], max(_ALONG[name], 1)
    if len(dims) > 1 or min(dims) < least:
        return ctx.opaque(node, tensors, "tensors of different dimensions are stacked")
    if min(dims) > least or name == "hstack":
        return _joined(ctx, node, tensors, min(dim, min(dims) - 1))
    return stack(ctx, node, tensors, dim)


@functions(torch.broadcast_tensors)
def broadcast_tensors(ctx: LabelContext, node: fx.Node, *tensors: Value) -> Any:
    shape = tuple(node.meta["val"][0].shape)
    axes, _ = ctx.combine(shape, tensors)
    return tuple(ctx.make(node, axes, (), t.why, i) for i, t in enumerate(tensors))
