"""Element-wise operations, and those that work on each channel alone: activations, arithmetic, dropout, pooling, resizing."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.passes.compat import native_functions
from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value
from fxprune.passes.rules.computing import zeros
from fxprune.passes.rules.computing.elementwise import CASTS, DIVISIONS, ELEMENTWISE, OPERATORS
from fxprune.passes.rules.layer_specs import layers
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, modules, named


@named(*CASTS)
def cast(ctx: LabelContext, node: fx.Node, input: Value, **_: Any) -> Any:
    """The same numbers, in another form or place; of a tensor whose form is taken no values are read."""
    return ctx.make(node, input.axes, input.zero, input.why)


@named(*ELEMENTWISE)
@functions(*OPERATORS)
def elementwise(ctx: LabelContext, node: fx.Node, **arguments: Any) -> Any:
    return zeros.elementwise(ctx, node)


def _same_expert(slim: Rewriter, node: fx.Node) -> None:
    """Positions of what was chosen, compared with a number: that of the same channel among those that are left."""
    value = slim.value(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    kept = slim.kept_of(value.picks) if isinstance(value, Value) and value.picks is not None else None
    if kept is not None and type(node.args[1]) is int:
        node.args = (node.args[0], int((kept < node.args[1]).sum()))


named("eq", rewrite=_same_expert)(elementwise)
functions(operator.eq, rewrite=_same_expert)(elementwise)


@named("where")
def where(ctx: LabelContext, node: fx.Node, condition: Value, **arguments: Any) -> Any:
    """Of three tensors, element by element; of a condition alone, the positions where it holds."""
    if isinstance(node.meta["val"], torch.Tensor):
        return zeros.elementwise(ctx, node)
    return ctx.opaque(node, [condition], "positions in it are computed by the graph", ReasonKind.COMPUTED_INDEX)


@named(*DIVISIONS)
@functions(operator.truediv, operator.itruediv, operator.floordiv, operator.mod)
def quotient(ctx: LabelContext, node: fx.Node, input: Any, other: Any, **arguments: Any) -> Any:
    if isinstance(other, Value):
        for axis in other.zero:
            ctx.inexact(other.axes[axis], "it divides by what is zero once its channels are")
    return zeros.elementwise(ctx, node)


@functions(F.prelu, torch.prelu)
def prelu(ctx: LabelContext, node: fx.Node, input: Value, weight: Value) -> Value:
    """``weight`` (channels) or (1): one slope for each index of axis 1."""
    axis = 1 if input.ndim > 1 else 0
    axes = dict(input.axes)
    if 0 in weight.axes and axis in axes:
        ctx.unite(axes[axis], weight.axes[0])
    elif 0 in weight.axes:
        ctx.pin(weight.axes[0], "it meets channels of fixed size", because=input.why)
    elif axis in axes and math.prod(weight.shape) > 1:
        ctx.pin(axes.pop(axis), "its slopes have a fixed size", because=weight.why)
    return ctx.make(node, axes, input.zero, input.why)


layers(nn.PReLU, produces=False, sizes={"num_parameters": ("weight", 0)})


@modules(nn.PReLU)
def prelu_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Any:
    weight = ctx.weight(node, "weight")
    assert weight is not None
    return prelu(ctx, node, input, weight)


MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.RReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Tanh,
    nn.Hardtanh,
    nn.Mish,
    nn.Softsign,
    nn.Hardshrink,
    nn.Tanhshrink,
    nn.Softshrink,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.LogSigmoid,
    nn.Threshold,
)


@modules(*MODULES)
def elementwise_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Any:
    return zeros.elementwise(ctx, node, module)


def _pooled(ctx: LabelContext, node: fx.Node, x: Value, space: int, how: Mapping[str, Any]) -> Any:
    """The last ``space`` axes are windows; a second result (the indices of a maximum) has the channels of the first.

    ``how``: the arguments. An output size of None leaves an axis as it is, and so does a window of one that moves by one without padding:
    channels may lie there. (Positions of maxima count along all axes, so there they may not.)
    """
    axes = range(x.ndim - space, x.ndim)
    if isinstance(node.meta["val"], torch.Tensor):
        size = how.get("output_size")
        sizes = size if isinstance(size, (tuple, list)) and len(size) == space else [1] * space
        still = _still(how, space)
        return ctx.through(node, x, mixed=[a for a, each, same in zip(axes, sizes, still, strict=True) if each is not None and not same])
    return tuple(ctx.through(node, x, mixed=axes, zero=i == 0, index=i) for i in range(len(node.meta["val"])))


def _still(how: Mapping[str, Any], space: int) -> list[bool]:
    """For each window axis whether pooling leaves it as it is."""

    def each(name: str, default: Any) -> list[Any]:
        given = how.get(name)
        given = default if given is None or given == () or given == [] else given
        return list(given) * (1 if len(given) == space else space) if isinstance(given, (tuple, list)) else [given] * space

    window = each("kernel_size", 0)
    padding = each("padding", 0)
    return [(k, s, p) == (1, 1, 0) for k, s, p in zip(window, each("stride", window), padding, strict=True)]


def _space(target: Any) -> int:
    name = target.__name__ if not isinstance(target, str) else target
    return next(int(name[i - 1]) for i in range(len(name), 0, -1) if name[i - 1] in "123" and name[i : i + 1] == "d")


@functions(
    *(getattr(F, f"{kind}_pool{n}d") for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)),
    *(
        getattr(torch, f"{kind}_pool{n}d", F.relu)
        for kind in ("max", "adaptive_avg")
        for n in (1, 2, 3)
        if hasattr(torch, f"{kind}_pool{n}d")
    ),
    *(getattr(F, f"{kind}_pool{n}d_with_indices") for kind in ("max", "adaptive_max") for n in (1, 2, 3)),
    *(getattr(F, f"fractional_max_pool{n}d{more}") for n in (2, 3) for more in ("", "_with_indices")),
    torch.avg_pool1d,
    torch.adaptive_max_pool1d,
    *(
        getattr(native_functions, name)
        for name in (
            "adaptive_avg_pool2d",
            "adaptive_avg_pool3d",
            "adaptive_max_pool2d",
            "adaptive_max_pool3d",
            "max_pool2d_with_indices",
            "max_pool3d_with_indices",
        )
    ),
)
def pool(ctx: LabelContext, node: fx.Node, input: Value, **others: Any) -> Any:
    return _pooled(ctx, node, input, _space(node.target), others)


@modules(*(getattr(nn, f"{kind}Pool{n}d") for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax", "LP") for n in (1, 2, 3)))
def pool_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Any:
    return _pooled(ctx, node, input, _space(type(module).__name__), vars(module))


@functions(F.max_unpool1d, F.max_unpool2d, F.max_unpool3d, native_functions.max_unpool2d, native_functions.max_unpool3d)
def max_unpool(ctx: LabelContext, node: fx.Node, input: Value, indices: Value, **_: Any) -> Any:
    """Each maximum goes back to where it came from: ``indices`` has the channels of ``input``."""
    for axis in range(input.ndim - _space(node.target), input.ndim):
        for value in (input, indices):
            ctx.pin(value.axes.get(axis), "its channels are mixed with each other")
    axes, _spans = ctx.combine(input.shape, [input, indices])
    return ctx.make(node, axes, input.zero, input.why)


@functions(
    F.interpolate,
    F.upsample,
    *(f for name, f in vars(native_functions).items() if "upsample_" in name and "backward" not in name),
)
def interpolate(ctx: LabelContext, node: fx.Node, input: Value, **_: Any) -> Value:
    return ctx.through(node, input, mixed=range(2, input.ndim))


@modules(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def upsample_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Value:
    return ctx.through(node, input, mixed=range(2, input.ndim))


@functions(F.grid_sample, torch.grid_sampler)
def grid_sample(ctx: LabelContext, node: fx.Node, input: Value, grid: Value, **_: Any) -> Value:
    """Each sample of ``input`` has a grid of its own, so channels that are folded with the batch are those of the grid's first axis."""
    for axis, vector in grid.axes.items():
        if axis > 0:
            ctx.pin(vector, "it is used as sampling positions")
    folded = [Value(v.shape[:1], {a: x for a, x in v.axes.items() if a == 0}, frozenset(), v.why) for v in (input, grid)]
    ctx.combine(input.shape[:1], folded)
    return ctx.through(node, input, mixed=range(2, input.ndim))


@functions(F.affine_grid)
def affine_grid(ctx: LabelContext, node: fx.Node, theta: Value, **_: Any) -> Any:
    return ctx.opaque(node, [theta], "it is a map of sampling positions")


@named("tril", "triu")
def triangle(ctx: LabelContext, node: fx.Node, input: Value, **_: Any) -> Value:
    return ctx.through(node, input, mixed=(-1, -2))


@functions(F.glu, native_functions.glu)
def glu(ctx: LabelContext, node: fx.Node, input: Value, dim: int = -1) -> Value:
    """The two halves of axis ``dim`` are multiplied, one of them through a sigmoid: they go together."""
    axis = dim % input.ndim
    axes = dict(input.axes)
    if axis in axes:
        first, second = axes[axis].reshape(2, -1)
        ctx.unite(first.copy(), second.copy())
        axes[axis] = first.copy()
    return ctx.make(node, axes, input.zero, input.why)


@modules(nn.GLU)
def glu_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Any:
    return glu(ctx, node, input, module.dim)
