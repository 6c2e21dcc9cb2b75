"""Normalisation. Batch and instance norm treat each channel alone; layer, group and RMS norm share a statistic over channels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrizations

from fxprune.passes.compat import WEIGHT_NORMS, InstanceNormBase, NormBase
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value
from fxprune.passes.rules.layer_specs import NORMALISED, layers
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, modules, named

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LAYER = (nn.LayerNorm, *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))
_STATE = ("weight", "bias", "running_mean", "running_var")


def _per_channel(ctx: LabelContext, node: fx.Node, x: Value, axis: int, others: list[Value | None]) -> Value:
    """Each channel along ``axis`` of ``x`` has its own entry in every tensor of ``others``: scale, shift, mean, variance."""
    axes = dict(x.axes)
    for other in others:
        if other is None:
            continue
        if 0 not in other.axes:
            if axis in axes and math.prod(other.shape) > 1:
                ctx.pin(axes.pop(axis), "it is normalised by a tensor of fixed size", because=other.why)
        elif axis in axes:
            ctx.unite(axes[axis], other.axes[0])
        else:
            ctx.pin(other.axes[0], "it normalises channels of fixed size", because=x.why)
    weight, bias, mean, _ = others
    # (x - mean) * scale + shift: zero where the shift is, and either the scale or both x and its mean (of zeros, where it is computed).
    shifted = bias is None or 0 in bias.zero
    scaled = (weight is not None and 0 in weight.zero) or (axis in x.zero and (mean is None or 0 in mean.zero))
    zero = ({axis} if shifted and scaled else set()) | (set(x.zero) - {axis} if bias is None and mean is None else set())
    return ctx.make(node, axes, zero, x.why)


def _batch_channel(module: Any, x: Value) -> int:
    return x.ndim - _spatial(module) - 1 if isinstance(module, InstanceNormBase) else 1


def _resize_batch(slim: Rewriter, module: Any, x: Value, y: Value) -> None:
    module.num_features = slim.count(x, _batch_channel(module, x))


def _same_shape(module: Any, args: tuple[Any, ...]) -> torch.Tensor:
    """Norms are never run for their shape: in training mode they refuse one value per channel, which says nothing about shapes."""
    x: torch.Tensor = args[0]
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if x.is_contiguous() else torch.empty_like(x)


layers(
    NormBase,
    produces=False,
    resize=_resize_batch,
    without_parameters=lambda module, x, y: [(x, _batch_channel(module, x))],
    shape=_same_shape,
)


@modules(*_BATCH)
def batch_norm_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Value:
    channel = _batch_channel(module, input)
    for key in _STATE:
        ctx.bind(node, key, 0, input.axes.get(channel))
    parts = [ctx.weight(node, k) for k in _STATE]
    for axis in range(channel + 1, input.ndim):
        ctx.pin(input.axes.get(axis), "a normalisation averages over it")
    return _per_channel(ctx, node, input, channel, parts)


def _spatial(module: nn.Module) -> int:
    return int(type(module).__name__[-2]) if type(module).__name__.endswith("d") else 2


@functions(F.batch_norm, torch.batch_norm)
def batch_norm(
    ctx: LabelContext,
    node: fx.Node,
    input: Value,
    running_mean: Value | None = None,
    running_var: Value | None = None,
    weight: Value | None = None,
    bias: Value | None = None,
    training: Any = False,
    **_: Any,
) -> Value:
    if training or running_mean is None:  # its own statistics, as of a weight that is standardised
        for axis in sorted(set(input.axes) - {1}):
            ctx.inexact(input.axes[axis], "statistics over channels")
    ctx.read_as_weight(weight)
    return _per_channel(ctx, node, input, 1, [weight, bias, running_mean, running_var])


@functions(F.instance_norm)
def instance_norm(
    ctx: LabelContext,
    node: fx.Node,
    input: Value,
    running_mean: Value | None = None,
    running_var: Value | None = None,
    weight: Value | None = None,
    bias: Value | None = None,
    **_: Any,
) -> Value:
    for axis in range(2, input.ndim):
        ctx.inexact(input.axes.get(axis), "statistics over channels")
    ctx.read_as_weight(weight)
    return _per_channel(ctx, node, input, 1, [weight, bias, running_mean, running_var])


def _layer(ctx: LabelContext, node: fx.Node, x: Value, dims: int, weight: Value | None, bias: Value | None) -> Value:
    """The last ``dims`` axes of ``x`` share a mean and variance (RMS norm: a mean square)."""
    axes = dict(x.axes)
    for axis in range(x.ndim - dims, x.ndim):
        own = axis - (x.ndim - dims)
        for part in (weight, bias):
            if part is None:
                continue
            if own not in part.axes:
                if axis in axes and part.shape[own] > 1:
                    ctx.pin(axes.pop(axis), "it is normalised by a tensor of fixed size", because=part.why)
            elif axis in axes:
                ctx.unite(axes[axis], part.axes[own])
            else:
                ctx.pin(part.axes[own], "it normalises channels of fixed size", because=x.why)
        ctx.statistic(node, x, axis, "statistics over channels")
    first = x.ndim - dims
    zero = {a for a in axes if a >= first and weight is not None and a - first in weight.zero and (bias is None or a - first in bias.zero)}
    return ctx.make(node, axes, zero, x.why)


def _shape(slim: Rewriter, node: fx.Node) -> None:
    x = slim.argument(node, "input")
    shape = slim.argument(node, "normalized_shape")
    first = slim.value(x).ndim - len(shape)
    slim.set_argument(node, "normalized_shape", slim.sizes(x, shape, first))


def _resize_layer(slim: Rewriter, module: Any, x: Value, y: Value) -> None:
    """An RMS norm that keeps the original's divisor has its eps and weight rescaled: with d of D channels left its mean square is D / d
    times too large."""
    if slim.exact and hasattr(nn, "RMSNorm") and isinstance(module, nn.RMSNorm):
        pruned = [a for a in range(x.ndim - len(module.normalized_shape), x.ndim) if slim.pruned_axis(x, a) and a in x.zero]
        ratio = math.prod(x.shape[a] / slim.count(x, a) for a in pruned)
        module.eps = (torch.finfo(torch.float32).eps if module.eps is None else module.eps) * ratio
        if module.weight is not None:
            module.weight.data.mul_(math.sqrt(ratio))
    assert NORMALISED.resize is not None
    NORMALISED.resize(slim, module, x, y)


layers(
    *_LAYER,
    produces=False,
    resize=_resize_layer,
    without_parameters=NORMALISED.without_parameters,
    shape=_same_shape,
)


@modules(*_LAYER)
def layer_norm_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Value:
    return _layer(ctx, node, input, len(module.normalized_shape), ctx.weight(node, "weight"), ctx.weight(node, "bias"))


@functions(F.layer_norm, torch.layer_norm, rewrite=_shape)
def layer_norm(
    ctx: LabelContext,
    node: fx.Node,
    input: Value,
    normalized_shape: Any,
    weight: Value | None = None,
    bias: Value | None = None,
    **_: Any,
) -> Value:
    ctx.read_as_weight(weight)
    return _layer(ctx, node, input, len(normalized_shape), weight, bias)


if hasattr(F, "rms_norm"):

    @functions(F.rms_norm, torch.rms_norm, rewrite=_shape)
    def rms_norm(ctx: LabelContext, node: fx.Node, input: Value, normalized_shape: Any, weight: Value | None = None, **_: Any) -> Value:
        ctx.read_as_weight(weight)
        return _layer(ctx, node, input, len(normalized_shape), weight, None)


@modules(nn.GroupNorm)
def group_norm_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Value:
    return _group(ctx, node, input, module.num_groups, ctx.weight(node, "weight"), ctx.weight(node, "bias"))


def _group_arguments(slim: Rewriter, node: fx.Node) -> None:
    """Whole groups may have gone; where positions within groups went, the number of groups stays."""
    x, groups = slim.value(slim.argument(node, "input")), slim.argument(node, "num_groups")
    slim.set_argument(node, "num_groups", slim.rescaled(groups, groups_left(slim, x, slim.number(groups))))


def _resize_group(slim: Rewriter, module: Any, x: Value, y: Value) -> None:
    module.num_groups = groups_left(slim, x, module.num_groups)
    module.num_channels = slim.count(x, 1)


layers(nn.GroupNorm, produces=False, resize=_resize_group, without_parameters=lambda module, x, y: [(x, 1)], shape=_same_shape)


def groups_left(slim: Rewriter, x: Value, groups: int) -> int:
    """How many of the groups of a group norm still have a channel."""
    kept = slim.kept(x, 1)
    return groups if kept is None else len(np.unique(kept // (x.shape[1] // groups)))


@functions(F.group_norm, torch.group_norm, rewrite=_group_arguments)
def group_norm(
    ctx: LabelContext,
    node: fx.Node,
    input: Value,
    num_groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    **_: Any,
) -> Value:
    ctx.read_as_weight(weight)
    return _group(ctx, node, input, num_groups, weight, bias)


def _group(ctx: LabelContext, node: fx.Node, x: Value, groups: int, weight: Value | None, bias: Value | None) -> Value:
    """``x`` (N, C, *): statistics over each of ``groups`` runs of channels, which must keep equal widths."""
    vector = x.axes.get(1)
    per = x.shape[1] // groups
    if vector is not None:
        grid = vector.reshape(groups, per)
        whole = groups > per > 1  # whole groups go, and the others' statistics stay what they were
        if whole:
            ctx.unite(np.repeat(grid[:, 0], per), vector)
        elif groups > 1 and per > 1:
            ctx.unite(np.tile(grid[0], groups), vector)
        if per > 1 and not whole:
            ctx.statistic(node, x, 1, "statistics over channels")
    for axis in range(2, x.ndim):
        ctx.pin(x.axes.get(axis), "a normalisation averages over it")
    made = _per_channel(ctx, node, x, 1, [weight, bias, None, None])
    scaled = weight is not None and 0 in weight.zero
    shared = {1} if vector is not None and per > 1 and not scaled else set()  # a removed channel then holds minus the others' mean
    return ctx.make(node, made.axes, made.zero - shared, made.why)


@functions(F.local_response_norm)
def local_response_norm(ctx: LabelContext, node: fx.Node, input: Value, **_: Any) -> Value:
    ctx.pin(input.axes.get(1), "a local response norm mixes neighbouring channels")
    return ctx.through(node, input, mixed=())


@modules(nn.LocalResponseNorm)
def local_response_norm_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Any:
    return local_response_norm(ctx, node, input)


@functions(F.normalize)
def normalize(ctx: LabelContext, node: fx.Node, input: Value, p: float = 2.0, dim: Any = 1, **_: Any) -> Value:
    for axis in dim if isinstance(dim, (tuple, list)) else (dim,):
        # A removed slice is zero and adds nothing to the norm, so the result is the same.
        if axis % input.ndim not in input.zero:
            ctx.inexact(input.axes.get(axis % input.ndim), "a norm over channels")
    return ctx.through(node, input)


@named("renorm")
def renorm(ctx: LabelContext, node: fx.Node, input: Value, p: float, dim: int, maxnorm: float) -> Value:
    """Slices along ``dim`` that are longer than ``maxnorm`` are cut to it, as max-norm constraints do with a layer's weight."""
    for axis in range(input.ndim):
        if axis != dim % input.ndim and not (axis in input.zero and p >= 0):
            ctx.inexact(input.axes.get(axis), "a norm over channels")
    return ctx.through(node, input)


def _keep_length(slim: Rewriter, node: fx.Node) -> None:
    """What is left of ``v`` is shorter than it was: ``g`` becomes shorter by as much, so that what is left of the weight is as it was."""
    v, g, dim = (slim.argument(node, name, default) for name, default in (("v", None), ("g", None), ("dim", 0)))
    held, length = slim.actual_weight(v), slim.actual_weight(g)
    known = slim.value(v)
    lost = {axis: slim.kept(known, axis) for axis in known.axes if dim == -1 or axis != dim % known.ndim}
    if held is None or length is None or all(kept is None for kept in lost.values()):
        return
    left = held
    for axis, kept in lost.items():
        left = left if kept is None else left.index_select(axis, torch.from_numpy(kept).to(held.device))
    over = [axis for axis in range(held.ndim) if dim == -1 or axis != dim % held.ndim]
    before, now = (torch.linalg.vector_norm(t, dim=over, keepdim=True) for t in (held, left))
    slim.set_values(str(g.target), length * torch.where(before > 0, now / before, 1.0).reshape(length.shape))


@functions(*WEIGHT_NORMS, rewrite=_keep_length)
def weight_norm(ctx: LabelContext, node: fx.Node, v: Value, g: Value, dim: int = 0) -> Value:
    """``v * g / ||v||``, the norm over every dimension but ``dim``. Over fewer channels it is smaller, which ``g`` makes up for."""
    for axis, vector in v.axes.items():
        if dim == -1 or axis != dim % v.ndim:
            ctx.inexact(vector, "a weight is divided by its norm over channels, whose length is set so that the rest of it stays")
    rows, lengths = v.axes.get(dim), g.axes.get(dim)
    if rows is not None and lengths is not None:
        ctx.unite(rows, lengths)
        ctx.inexact(rows, "the zeroed original divides zero by zero")
    elif rows is not None or lengths is not None:
        ctx.pin(rows if lengths is None else lengths, "its length has a fixed size", because=(g if lengths is None else v).why)
    return ctx.make(node, v.axes, v.axes, v.why)


def _keep_largest(slim: Rewriter, node: fx.Node) -> None:
    """What is left of the weight has a smaller singular value: ``_v`` becomes longer by as much, and evaluation divides by the same one.

    Training estimates it again, for what is left.
    """
    module: Any = slim.original(node)
    held, known = slim.actual_weight(node.args[0]), slim.value(node.args[0])
    if held is None or held.ndim == 1 or all(slim.kept(known, axis) is None for axis in known.axes):
        return
    u, v, flat = module._u, module._v, held.movedim(module.dim, 0)
    mask = torch.ones_like(flat)
    for axis in known.axes:
        kept = slim.kept(known, axis)
        if kept is not None:
            gone = np.setdiff1d(np.arange(known.shape[axis]), kept)
            mask.movedim(0, module.dim).index_fill_(axis, torch.from_numpy(gone).to(held.device), 0)
    before, now = (torch.dot(u, t.flatten(1) @ v) for t in (flat, flat * mask))
    if now > 0:
        slim.set_values(f"{node.target}._v", v * (before / now))


@modules(*([parametrizations._SpectralNorm] if hasattr(parametrizations, "_SpectralNorm") else []), rewrite=_keep_largest)
def spectral_norm_module(ctx: LabelContext, node: fx.Node, module: Any, weight: Value) -> Value:
    """``weight`` over its largest singular value, as ``_u`` (along ``dim``) and ``_v`` (along the rest, flattened) estimate it.

    Of fewer rows and columns that is smaller, which the length of ``_v`` makes up for.
    """
    if weight.ndim == 1:
        return ctx.through(node, weight)
    for vector in weight.axes.values():
        ctx.inexact(vector, "a weight is divided by its largest singular value, which is kept as it was for evaluation")
    rest = [a for a in range(weight.ndim) if a != module.dim]
    for axis in [a for a in rest if a in weight.axes][1:]:
        ctx.pin(weight.axes[axis], "it is flattened with other channels")
    for name, axes in (("_u", [module.dim]), ("_v", rest)):
        estimate = ctx.weight(node, name)
        labelled = [a for a in axes if a in weight.axes][:1]
        if estimate is None or 0 not in estimate.axes:
            continue
        if not labelled:
            ctx.pin(estimate.axes[0], "the layer reads channels of fixed size", because=weight.why)
        for axis in labelled:
            before, after = (math.prod(weight.shape[a] for a in axes if (a > axis) == later and a != axis) for later in (False, True))
            ctx.unite(np.tile(np.repeat(weight.axes[axis], after), before), estimate.axes[0])
    return ctx.make(node, weight.axes, weight.zero, weight.why)
