"""Convolutions of any dimension, transposed or not, with any number of groups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Labels, Value, Vector
from fxprune.passes.rules.layer_specs import layers, set_size
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, modules

_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _groups(slim: Rewriter, node: fx.Node) -> None:
    """A functional convolution names its groups, and whole groups may have gone."""
    transposed = "transpose" in getattr(node.target, "__name__", "")
    groups = slim.argument(node, "groups", 1)
    if slim.number(groups) == 1:
        return
    x, weight = slim.argument(node, "input"), slim.argument(node, "weight")
    channel = slim.value(x).ndim - slim.value(weight).ndim + 1
    left = group_count(slim.size(x, channel), slim.size(node, channel), slim.size(weight, 1), transposed)
    slim.set_argument(node, "groups", slim.rescaled(groups, left))


def group_count(inputs: int, outputs: int, per_group: int, transposed: bool) -> int:
    """How many groups a sliced convolution has; ``per_group`` is its weight's size along dimension 1."""
    return (outputs if transposed else inputs) // per_group


def _resize(slim: Rewriter, module: Any, x: Value, y: Value) -> None:
    """The channels of a convolution whose weight was sliced, and the groups that are left."""
    weight = module.weight
    channel = x.ndim - weight.ndim + 1
    inputs, outputs = slim.count(x, channel), slim.count(y, channel)
    if module.groups > 1:
        set_size(module, "groups", group_count(inputs, outputs, weight.shape[1], module.transposed))
    set_size(module, "in_channels", inputs)
    set_size(module, "out_channels", outputs)


def _shape(module: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
    x, n = args[0], len(module.kernel_size)
    if x.ndim != n + 2 or isinstance(module.padding, str) or x.shape[1] != module.in_channels:
        return None
    space = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(x.shape[2:], module.padding, module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    if min(space) < 1:
        return None
    return torch.empty((x.shape[0], module.out_channels, *space), dtype=module.weight.dtype, device="meta")


def _function(module: Any) -> str:
    return f"conv{module.weight.ndim - 2}d"


layers(*_MODULES, outputs={"weight": 0, "bias": 0}, inputs={"weight": 1}, channel_dims=2, resize=_resize, shape=_shape, function=_function)
layers(
    *_TRANSPOSED,
    # The weight is (inputs, outputs / groups, *kernel): with groups, whole ones go along its inputs, positions within them along the other.
    outputs=lambda module: {"weight": 1 if module.groups == 1 else (0, 1), "bias": 0},
    inputs={"weight": 0},
    channel_dims=2,
    resize=_resize,
    function=_function,
)


@modules(*_MODULES)
def conv_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Value:
    if module.groups == 1:
        ctx.bind(node, "weight", 1, input.axes.get(input.ndim - module.weight.ndim + 1))
    weight = ctx.weight_dims(node, "weight", (0, 1))
    assert weight is not None
    if module.groups == 1:
        ctx.bind(node, "bias", 0, weight.axes.get(0))
    still = _untouched(weight, module.stride, module.padding)
    return convolve(ctx, node, input, weight, ctx.weight(node, "bias"), module.groups, False, str(node.target), still)


@modules(*_TRANSPOSED)
def conv_transpose_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value, output_size: Any = None) -> Value:
    weight = ctx.weight_dims(node, "weight", (0, 1))
    assert weight is not None
    still = _untouched(weight, module.stride, module.padding, module.output_padding)
    return convolve(ctx, node, input, weight, ctx.weight(node, "bias"), module.groups, True, str(node.target), still)


@functions(F.conv1d, F.conv2d, F.conv3d, rewrite=_groups)
def conv(
    ctx: LabelContext,
    node: fx.Node,
    input: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    still = _untouched(weight, stride, padding)
    return convolve(ctx, node, input, kernel(ctx, node, weight), bias, groups, False, ctx.owner(node), still)


@functions(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, rewrite=_groups)
def conv_transpose(
    ctx: LabelContext,
    node: fx.Node,
    input: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    still = _untouched(weight, stride, padding, output_padding)
    return convolve(ctx, node, input, kernel(ctx, node, weight), bias, groups, True, ctx.owner(node), still)


def kernel(ctx: LabelContext, node: fx.Node, weight: Value) -> Value:
    """A computed weight may carry labels along its kernel's width and height: those stay."""
    ctx.read_as_weight(weight)
    for axis, vector in weight.axes.items():
        if axis > 1:
            ctx.pin(vector, "a kernel's width is not pruned", ReasonKind.STRUCTURE)
    return Value(weight.shape, {a: v for a, v in weight.axes.items() if a < 2}, weight.zero, weight.why)


def _untouched(weight: Value, stride: Any, padding: Any, output_padding: Any = 0) -> frozenset[int]:
    """The spatial axes, counted from 0, along which a kernel of one element visits every index once: nothing is mixed there."""

    def along(setting: Any, i: int) -> Any:
        return setting[min(i, len(setting) - 1)] if isinstance(setting, (tuple, list)) else setting

    return frozenset(
        i
        for i, width in enumerate(weight.shape[2:])
        if width == along(stride, i) == 1 and not along(output_padding, i) and (isinstance(padding, str) or along(padding, i) == 0)
    )


def convolve(
    ctx: LabelContext,
    node: fx.Node,
    x: Value,
    w: Value,
    bias: Value | None,
    groups: int,
    transposed: bool,
    layer: str,
    still: frozenset[int] = frozenset(),
) -> Value:
    """``x`` (..., in, *space); ``w`` (out, in / groups, *kernel), transposed (in, out / groups, *kernel); ``still``: see ``_untouched``."""
    space = w.ndim - 2
    channel = x.ndim - space - 1
    kept = {*range(channel), *(channel + 1 + i for i in still)}  # the axes beside the channels that come through
    for axis in sorted(set(range(channel + 1, x.ndim)) - kept):
        ctx.pin(x.axes.get(axis), "a convolution slides along it")
    arriving = x.axes.get(channel)
    summed = groups == 1 or x.shape[channel] > groups
    if arriving is not None and summed and channel not in x.zero and (0 if transposed else 1) not in w.zero:
        ctx.inexact(arriving, "two activations are multiplied and summed over it")
    if arriving is None:
        for dim in (0,) if transposed else (1,):
            ctx.pin(w.axes.get(dim), "the layer reads channels of fixed size", because=x.why)
    if groups == 1:
        into, out = (0, 1) if transposed else (1, 0)
        if arriving is not None:
            _tie(ctx, arriving, w, into)
        made = w.axes.get(out)
    else:
        made = _grouped(ctx, x, channel, arriving, w, groups, transposed)
    if made is not None and bias is not None and 0 not in bias.axes and math.prod(bias.shape) > 1:
        ctx.pin(made, "its bias has a fixed size", because=bias.why)
        made = None
    meta = node.meta["val"]
    axes = {a: v for a, v in x.axes.items() if a in kept}
    zero = {a for a in x.zero if a in kept} if bias is None else set()
    if made is not None:
        axes[channel] = made
        nothing = _makes_zero(w, groups, transposed) or (not summed and channel in x.zero)
        if nothing and (bias is None or 0 in bias.zero):
            zero.add(channel)
        if bias is not None and 0 in bias.axes:
            ctx.unite(made, bias.axes[0])
    elif bias is not None:
        ctx.pin(bias.axes.get(0), "the layer's output has a fixed size", ReasonKind.FIXED_SIZE)
    positions = x.shape if transposed else tuple(meta.shape)
    macs = math.prod(positions) * w.shape[1] * math.prod(w.shape[2:])
    along = (arriving, w.axes.get(1)) if transposed else (made, w.axes.get(1))
    ctx.cost(layer, macs, *along, *(v for a, v in x.axes.items() if a in kept))
    return ctx.make(node, axes, zero)


def _makes_zero(w: Value, groups: int, transposed: bool) -> bool:
    """Whether a removed output channel has a kernel of zeros."""
    return (0 if not transposed else 1 if groups == 1 else 0) in w.zero or (transposed and groups > 1 and 1 in w.zero)


def _tie(ctx: LabelContext, arriving: Vector, w: Value, dim: int) -> None:
    if dim in w.axes:
        ctx.unite(arriving, w.axes[dim])
    elif w.shape[dim] != 1:
        ctx.pin(arriving, "it meets a weight of fixed size", because=w.why)


def _grouped(ctx: LabelContext, x: Value, channel: int, arriving: Vector | None, w: Value, groups: int, transposed: bool) -> Vector | None:
    """A grouped convolution loses whole groups, or the same positions in every group: whichever leaves more units.

    Returns the labels of the output's channels.
    """
    per_in = x.shape[channel] // groups
    per_out = w.shape[1] if transposed else w.shape[0] // groups
    own = w.axes.get(0)  # inputs if transposed, else outputs
    if own is None or (not transposed and arriving is None and per_in == 1):
        for vector in (arriving, *w.axes.values()):
            ctx.pin(vector, "a grouped convolution reads channels of fixed size", ReasonKind.FIXED_SIZE)
        return None
    if transposed and arriving is not None:
        ctx.unite(arriving, own)
    if arriving is not None and (per_in == 1 or _whole_groups(ctx, arriving, groups, per_in)):
        lead = ctx.labels.find(arriving).reshape(groups, per_in)[:, 0].copy()
        ctx.unite(np.repeat(lead, per_in), arriving)
        if 1 in w.axes:
            ctx.pin(w.axes[1], "whole groups of the convolution are removed, so each group keeps its width", ReasonKind.STRUCTURE)
        made = np.repeat(lead, per_out)
        if transposed:
            return made
        ctx.unite(made, own)
        return own
    if arriving is not None:
        inside = arriving.reshape(groups, per_in)[0].copy()
        ctx.unite(np.tile(inside, groups), arriving)
        if not transposed:
            _tie(ctx, inside, w, 1)
    if transposed:
        return np.tile(w.axes[1], groups) if 1 in w.axes else None
    ctx.unite(np.tile(own.reshape(groups, per_out)[0], groups), own)
    return own


def _whole_groups(ctx: LabelContext, arriving: Vector, groups: int, per_in: int) -> bool:
    """Whether removing whole groups leaves more units than removing positions within them, given what is united already."""
    key = f"{ctx.mode}:{ctx.node.name}" if ctx.node is not None else ""
    if ctx.forced.get(key) == "within":
        return False
    _, flat = np.unique(ctx.labels.find(arriving), return_inverse=True)
    grid = flat.reshape(groups, per_in)

    def units(lead: Any, others: Any) -> int:
        trial = Labels()
        trial.new(int(flat.max()) + 1)
        trial.unite(lead.reshape(-1), others.reshape(-1))
        return trial.units(np.arange(int(flat.max()) + 1))

    whole = units(np.repeat(grid[:, :1], per_in, 1), grid)
    within = units(np.repeat(grid[:1], groups, 0), grid)
    if whole > within:
        ctx.whole.add(key)
    return whole > within
