"""Rectangles: labels that vary along several axes of one tensor are reduced to one, by uniting every slice along it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.passes.ir.nodes import leads_to, target_name
from fxprune.passes.labels.values import Labels, Vector


@dataclass(frozen=True, eq=False)
class Reduction:
    """A label tensor brought down to one axis.

    ``axis``: the axis, None where one label fills the whole tensor. ``labels``: one per index of the axis, or that label (none for an
    empty tensor). ``united``: labels that must go together for it. ``chosen``: whether an attention's axis was chosen.
    """

    axis: int | None
    labels: Vector
    united: tuple[Vector, Vector] | None = None
    chosen: bool = False


def rectangle(labels: torch.Tensor, node: fx.Node, wish: str) -> Reduction:
    """Reduce a label tensor to one axis. Where it varies along several, pick one and unite every slice along it.

    ``wish``: the axis that the policy names for an attention ("heads", "head_dim" or "auto"), if ``node`` makes a tensor of one.
    """
    if not labels.numel():
        return _empty(labels)
    squeezed = labels
    for axis in range(labels.ndim):
        if squeezed.shape[axis] > 1:
            head = squeezed.narrow(axis, 0, 1)
            if squeezed.stride(axis) == 0 or torch.equal(squeezed, head.expand_as(squeezed)):
                squeezed = head
    varying = [a for a in range(labels.ndim) if squeezed.shape[a] > 1]
    if len(varying) == 1:
        return Reduction(varying[0], squeezed.reshape(-1).numpy().copy())  # of its own: it may be a row of something large
    if not varying:
        return Reduction(None, np.unique(squeezed.numpy()))
    axis, chosen = _choose(node, squeezed, varying, wish)
    across = squeezed.movedim(axis, 0).reshape(squeezed.shape[axis], -1).numpy()
    first = across[:, 0].copy()
    return Reduction(axis, first, (np.repeat(first, across.shape[1]), across.reshape(-1)), chosen)


def _empty(labels: torch.Tensor) -> Reduction:
    """A part without elements (what partial rotary leaves of a head that is turned whole) still has its other axes: by its strides."""
    along = [a for a in range(labels.ndim) if labels.shape[a] > 1 and labels.stride(a)]
    if len(along) == 1:
        size, stride, start = labels.shape[along[0]], labels.stride(along[0]), labels.storage_offset()
        if start + (size - 1) * stride < labels.untyped_storage().nbytes() // labels.element_size():  # a copy has nothing to look at
            return Reduction(along[0], labels.as_strided((size,), (stride,), start).numpy().copy())
    return Reduction(None, np.zeros(0, dtype=np.int64))


def _choose(node: fx.Node, labels: torch.Tensor, varying: list[int], wish: str) -> tuple[int, bool]:
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
        return best, False
    heads, head_dim = min(pair), max(pair)
    return {"heads": heads, "head_dim": head_dim}.get(wish, best if best in pair else max(pair, key=lambda a: (counts[a], a))), True


def _units_along(labels: torch.Tensor, axis: int) -> int:
    """How many units would be left if every slice along ``axis`` were united."""
    across: Any = labels.movedim(axis, 0).reshape(labels.shape[axis], -1).numpy()
    _, flat = np.unique(across, return_inverse=True)
    flat = flat.reshape(across.shape)
    trial = Labels()
    trial.new(int(flat.max()) + 1)
    trial.unite(np.repeat(flat[:, 0], flat.shape[1]), flat.reshape(-1))
    return trial.units(flat[:, 0])


_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention", "__matmul__"})
# A layer reads it, or it is chosen among (a router's groups of experts).
_ENDS = frozenset({"linear", "conv1d", "conv2d", "conv3d", "size", "topk", "argmax"})


def feeds_attention(node: fx.Node) -> bool:
    """Whether what ``node`` makes is contracted with another activation before a layer reads it."""
    return leads_to(
        node,
        lambda user: target_name(user) in _PRODUCTS,
        lambda user: user.op in ("call_function", "call_method") and target_name(user) not in _ENDS,
    )
