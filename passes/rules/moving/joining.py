"""Concatenation and stacking: labels follow one another, or meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.passes.ir.nodes import target_name
from fxprune.passes.labels.choices import Sum
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
        axes[dim] = np.concatenate([_piece(ctx, part, dim, "cat") for part in parts])
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
    made = _joined(ctx, node, shifted, place)
    return _of_experts(ctx, node, made, place, tensors)


def _of_experts(ctx: LabelContext, node: fx.Node, made: Value, place: int, tensors: Sequence[Value]) -> Value:
    """What the modules of one list gave, side by side: each may be left out, with its place. Else what it is anyway."""
    nodes: Any = node.args[0] if node.args else node.kwargs["tensors"]
    if place in made.axes or len(tensors) < 2 or ":" in ctx.mode or not _siblings(ctx, nodes):
        return made
    labels = ctx.fresh("stack", len(tensors), soft=True)
    for i, label in enumerate(labels.tolist()):
        ctx.sums.append(Sum(ctx.mode, node, i, frozenset({label})))
    zero = [place] if all(_is_zeroed(ctx, one) for one in nodes) else []
    return ctx.make(node, {**made.axes, place: labels}, [*made.zero, *zero], made.why)


def _siblings(ctx: LabelContext, nodes: Any) -> bool:
    """Whether each tensor was made by a module of its own of one ``nn.ModuleList``."""
    found: list[tuple[str, str]] = []
    if isinstance(nodes, fx.Node):  # the parts of a split
        return False
    for node in nodes:
        parts = ctx.owner(node).split(".")
        places = [i for i in range(1, len(parts)) if isinstance(ctx.traced.skeleton.original_module(".".join(parts[:i])), nn.ModuleList)]
        if not places:
            return False
        found.append((".".join(parts[: places[-1]]), parts[places[-1]]))
    return len({home for home, _ in found}) == 1 and len({key for _, key in found}) == len(found)


def _is_zeroed(ctx: LabelContext, node: fx.Node) -> bool:
    """Whether a layer made a tensor, which gives zeros once its weight and bias are zeros."""
    return node.op == "call_module" and isinstance(
        ctx.traced.skeleton.module(str(node.target)), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )


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


@functions(torch.block_diag, torch.functional.block_diag)
def block_diag(ctx: LabelContext, node: fx.Node, *tensors: Value) -> Any:
    """Matrices along a diagonal: their rows follow one another, and their columns do."""
    if any(t.ndim != 2 for t in tensors):
        return ctx.opaque(node, list(tensors), "rows and matrices are put along a diagonal")
    axes: dict[int, Vector] = {}
    zero = []
    for dim in (0, 1):
        if any(dim in t.axes for t in tensors):
            axes[dim] = np.concatenate([_piece(ctx, t, dim, "block_diag") for t in tensors])
            zero += [dim] if all(dim in t.zero or dim not in t.axes for t in tensors) else []
    return ctx.make(node, axes, zero, tensors[0].why)


def _piece(ctx: LabelContext, part: Value, dim: int, key: str) -> Vector:
    """The labels of what is joined; those of a part of fixed size stay."""
    piece = part.axes.get(dim)
    if piece is None:
        piece = ctx.fresh(key, part.shape[dim])
        ctx.pin(piece, "it is a part of fixed size", because=part.why)
    return piece


@functions(torch.broadcast_tensors)
def broadcast_tensors(ctx: LabelContext, node: fx.Node, *tensors: Value) -> Any:
    shape = tuple(node.meta["val"][0].shape)
    axes, _ = ctx.combine(shape, tensors)
    return tuple(ctx.make(node, axes, (), t.why, i) for i, t in enumerate(tensors))
