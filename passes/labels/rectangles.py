"""Rectangles: labels that vary along several axes of one tensor are reduced to one, by uniting every slice along it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxprune.passes.labels.values import Labels, Vector
from fxprune.passes.rules.registry import target_name

if TYPE_CHECKING:
    from fxprune.passes.coupling.walk import Walk


def rectangle(walk: Walk, node: fx.Node, labels: torch.Tensor) -> tuple[int, Vector] | None:
    """Reduce a label tensor to one axis. Where it varies along several, pick one and unite every slice along it.

    Returns (axis, labels) or None where the label is the same everywhere: it is pinned then.
    """
    squeezed = labels
    for axis in range(labels.ndim):
        if squeezed.shape[axis] > 1:
            head = squeezed.narrow(axis, 0, 1)
            if squeezed.stride(axis) == 0 or torch.equal(squeezed, head.expand_as(squeezed)):
                squeezed = head
    varying = [a for a in range(labels.ndim) if squeezed.shape[a] > 1]
    if len(varying) == 1:
        return varying[0], squeezed.reshape(-1).numpy().copy()  # of its own: it may be a row of something large
    if not varying:
        if labels.numel():  # it belongs to no axis any more, so the tensor as a whole must stay, be it a single number
            walk.pin(np.unique(squeezed.numpy()), "one channel fills a whole tensor")
        return None
    axis = _choose(walk, node, squeezed, varying)
    across = squeezed.movedim(axis, 0).reshape(squeezed.shape[axis], -1).numpy()
    first = across[:, 0].copy()
    walk.labels.unite(np.repeat(first, across.shape[1]), across.reshape(-1))
    return axis, first


def one_axis(walk: Walk, a: Vector, b: Vector) -> Vector:
    """Two sets of labels came to lie on one axis. An index goes if either of its labels does, which two sparsities cannot both
    decide: those that an expansion made yield, of others those with fewer units stay."""
    few, many = sorted((a, b), key=lambda v: (not walk.is_soft(np.unique(v)), walk.labels.units(v)))
    walk.pin(few, "it is folded into one axis with other channels")
    return many


def _choose(walk: Walk, node: fx.Node, labels: torch.Tensor, varying: list[int]) -> int:
    """The axis with the most units; for attention the axis the policy names (Wang 2024 prunes neither: the axis is ours)."""
    if any(target_name(user) == "view_as_complex" for user in node.users):  # the last axis is a real and an imaginary part
        varying = [a for a in varying if a != labels.ndim - 1] or varying
    counts = {axis: _units_along(labels, axis) for axis in varying}
    best = max(varying, key=lambda a: (counts[a], a))
    distinct = [a for a in varying if counts[a] > 1]
    pair = sorted(distinct, key=lambda a: labels.shape[a])[-2:]
    if len(distinct) > 2:  # (3, heads, head_dim): the small outer axis separates q, k and v and is neither
        outer = [a for a in distinct if labels.shape[a] in (2, 3)]
        if outer:
            pair = [a for a in distinct if a != outer[0]][-2:]
    if len(pair) < 2 or not feeds_attention(node):
        return best
    heads, head_dim = min(pair), max(pair)
    key = f"{walk.mode}:{node.name}"
    wish = walk.forced.get(key, walk.attention)
    chosen = {"heads": heads, "head_dim": head_dim}.get(wish, best if best in pair else max(pair, key=lambda a: (counts[a], a)))
    walk.choices[key] = np.unique(labels.numpy())
    return chosen


def _units_along(labels: torch.Tensor, axis: int) -> int:
    """How many units would be left if every slice along ``axis`` were united."""
    across: Any = labels.movedim(axis, 0).reshape(labels.shape[axis], -1).numpy()
    _, flat = np.unique(across, return_inverse=True)
    flat = flat.reshape(across.shape)
    trial = Labels()
    trial.new(int(flat.max()) + 1)
    trial.unite(np.repeat(flat[:, 0], flat.shape[1]), flat.reshape(-1))
    return trial.units(flat[:, 0])


def feeds_attention(node: fx.Node) -> bool:
    """Whether what ``node`` makes is contracted with another activation before a layer reads it."""
    seen, todo = set(), list(node.users)
    while todo:
        user = todo.pop()
        if user in seen:
            continue
        seen.add(user)
        name = target_name(user)
        if name in ("matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention", "__matmul__"):
            return True
        if user.op in ("call_function", "call_method") and name not in ("linear", "conv1d", "conv2d", "conv3d", "size"):
            todo.extend(user.users)
    return False
