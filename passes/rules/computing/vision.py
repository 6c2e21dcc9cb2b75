"""Operations of torchvision. Its import takes as long as torch's own, so these rules are added when a model may use them."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import fx

from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value
from fxprune.passes.rules import registry
from fxprune.passes.rules.computing import conv, pointwise
from fxprune.passes.rules.protocols import Rewriter


def _deformable_groups(slim: Rewriter, node: fx.Node) -> None:
    x, weight = slim.argument(node, "input"), slim.argument(node, "weight")
    slim.set_argument(node, "groups", slim.size(x, 1) // slim.size(weight, 1))


def deformable(
    ctx: LabelContext, node: fx.Node, input: Value, weight: Value, offset: Value, mask: Value, bias: Value, *sizes: Any
) -> Value:
    """A convolution that samples at ``offset`` (N, 2 * window * offset groups, *space); ``sizes`` end in groups, offset groups, a flag."""
    groups, offset_groups, _ = (int(s) for s in sizes[-3:])
    for positions in (offset, mask):
        ctx.pin_all(positions, "it is used as sampling positions")
    if offset_groups > 1:
        ctx.pin(input.axes.get(1), "several runs of its channels are sampled at positions of their own")
    return conv.convolve(ctx, node, input, conv.kernel(ctx, node, weight), bias, groups, False, ctx.owner(node))


def regions(ctx: LabelContext, node: fx.Node, input: Value, boxes: Value, **_: Any) -> Any:
    """Windows of ``input`` (N, C, H, W) around ``boxes`` (K, 5): each channel by itself, and K in place of N."""
    ctx.pin_all(boxes, "it is used as boxes")
    for axis in (0, 2, 3):
        ctx.pin(input.axes.get(axis), "boxes are cut out along it")
    kept = Value(input.shape, {a: v for a, v in input.axes.items() if a == 1}, input.zero & {1}, input.why)
    if isinstance(node.meta["val"], torch.Tensor):
        return ctx.make(node, kept.axes, kept.zero, kept.why)
    return tuple(ctx.make(node, kept.axes, kept.zero, kept.why, i) for i in range(len(node.meta["val"])))


# A rule of the user's for one of these may have come first, and stays.
registry.FUNCTIONS.setdefault(torch.ops.torchvision.deform_conv2d, registry.Rule(deformable, _deformable_groups))
registry.FUNCTIONS.setdefault(torch.ops.torchvision.roi_align, registry.Rule(regions))
registry.FUNCTIONS.setdefault(torch.ops.torchvision.roi_pool, registry.Rule(regions))
registry.FUNCTIONS.setdefault(torchvision.ops.stochastic_depth, registry.Rule(pointwise.elementwise))
registry.MODULES.setdefault(torchvision.ops.StochasticDepth, registry.Rule(pointwise.elementwise_module))
