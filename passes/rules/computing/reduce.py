"""Reductions, softmax and the like: an axis of channels that they share a value over may be pruned, and that value changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, values
from fxprune.passes.rules.registry import functions, modules, named


def _dims(x: Value, dim: Any) -> set[int]:
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return set(range(x.ndim))
    return {d % x.ndim for d in (dim if isinstance(dim, (tuple, list)) else (dim,))} if x.ndim else set()


def _reduce(ctx: LabelContext, node: fx.Node, x: Value, dims: set[int], keepdim: bool, exact: bool, place_free: bool = False) -> Any:
    """Axes ``dims`` go (or stay with size one). ``exact``: slices that hold zeros do not change the result. ``place_free``: ``x`` is the
    node's first input and the order along ``dims`` does not count, nor is a place returned."""
    for axis in dims & set(x.axes):
        if not exact and place_free:
            ctx.statistic(node, x, axis, "a reduction over channels")
        elif not (exact and axis in x.zero):
            ctx.inexact(x.axes[axis], "a reduction over channels")
    axes: dict[int, Any] = {}
    zero = set()
    for axis, vector in x.axes.items():
        if axis in dims:
            continue
        place = axis if keepdim else axis - sum(d < axis for d in dims)
        axes[place] = vector
        if axis in x.zero:
            zero.add(place)
    if isinstance(node.meta["val"], torch.Tensor):
        return ctx.make(node, axes, zero, x.why)
    return tuple(ctx.make(node, axes, zero if i == 0 else (), x.why, i) for i in range(len(node.meta["val"])))


@named("sum", "nansum", "count_nonzero", "norm", "vector_norm", inplace=False)
def total(ctx: LabelContext, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    name = str(getattr(node.target, "__name__", node.target))
    rest = list(args)
    exact = True
    if "norm" in name:  # norm(x, p, dim, keepdim)
        order = kwargs.get("p", kwargs.get("ord", rest[0] if rest else 2))
        exact = not isinstance(order, (int, float)) or order >= 0  # the smallest magnitude is a removed slice's
        rest = rest[1:]
    dim = kwargs.get("dim", kwargs.get("axis", rest[0] if rest and not isinstance(rest[0], torch.dtype) else None))
    return _reduce(ctx, node, input, _dims(input, dim), _keepdim(rest, kwargs), exact=exact)


@named(
    "mean",
    "nanmean",
    "amax",
    "amin",
    "prod",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "logsumexp",
    "median",
    "any",
    "all",
    "aminmax",
    inplace=False,
)
def average(ctx: LabelContext, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    dim = kwargs.get("dim", kwargs.get("axis", args[0] if args and not isinstance(args[0], torch.dtype) else None))
    if isinstance(dim, bool):  # var(x, unbiased)
        dim = None
    place_free = getattr(node.target, "__name__", node.target) not in ("median", "nanmedian")
    return _reduce(ctx, node, input, _dims(input, dim), _keepdim(list(args), kwargs), exact=False, place_free=place_free)


def _keepdim(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if "keepdim" in kwargs or "keepdims" in kwargs:
        return bool(kwargs.get("keepdim", kwargs.get("keepdims")))
    return any(a is True for a in args[-1:]) and len(args) > 1


@named("max", "min", inplace=False)
def extreme(ctx: LabelContext, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Value):
        return ctx.pointwise(node, input, other, zero="all")
    dim = kwargs.get("dim", other)
    dims = _dims(input, dim)
    if not isinstance(node.meta["val"], torch.Tensor) and any(
        user.args[1:2] == (1,) or user.target is not _getitem() for user in node.users
    ):
        for axis in dims:
            ctx.pin(input.axes.get(axis), "the index of a maximum over it is used")
    return _reduce(ctx, node, input, dims, _keepdim(list(args), kwargs), exact=False, place_free=True)


def _getitem() -> Any:
    import operator

    return operator.getitem


@named("argmax", "argmin", inplace=False)
def index_of(ctx: LabelContext, node: fx.Node, input: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    dims = _dims(input, dim)
    for axis in dims:
        ctx.pin(input.axes.get(axis), "the index of a maximum over it is used")
    return _reduce(ctx, node, input, dims, keepdim, exact=False)


@named("topk", "sort", "argsort", inplace=False)
def ordered(ctx: LabelContext, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    name = getattr(node.target, "__name__", node.target)
    place = 1 if name == "topk" else 0
    dim = kwargs.get("dim", args[place] if len(args) > place and not isinstance(args[place], bool) else -1)
    if isinstance(node.meta["val"], torch.Tensor):
        return ctx.through(node, input, mixed=(dim,), zero=False)
    return tuple(ctx.through(node, input, mixed=(dim,), zero=False, index=i) for i in range(len(node.meta["val"])))


def _shared(ctx: LabelContext, node: fx.Node, x: Value, dim: int | None, what: str) -> Value:
    axis = (1 if x.ndim > 1 else 0) if dim is None else dim % x.ndim
    ctx.statistic(node, x, axis, what)
    return ctx.make(node, x.axes, (), x.why)


@named("softmax", "log_softmax", "softmin", "gumbel_softmax", "_safe_softmax", inplace=False)
def softmax(ctx: LabelContext, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Value:
    dim = kwargs.get("dim", args[0] if args and not isinstance(args[0], torch.dtype) else None)
    return _shared(ctx, node, input, dim, "softmax over channels")


@modules(nn.Softmax, nn.LogSoftmax, nn.Softmin)
def softmax_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Value:
    return _shared(ctx, node, input, module.dim, "softmax over channels")


@modules(nn.Softmax2d)
def softmax2d_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Value:
    return _shared(ctx, node, input, -3, "softmax over channels")


@named("cumsum", "cumprod", "logcumsumexp")
def cumulative(ctx: LabelContext, node: fx.Node, input: Value, dim: int, **_: Any) -> Value:
    ctx.inexact(input.axes.get(dim % input.ndim), "a running total over channels")
    return ctx.make(node, input.axes, {a for a in input.zero if a != dim % input.ndim}, input.why)


@named("diff", inplace=False)
def difference(ctx: LabelContext, node: fx.Node, input: Value, n: int = 1, dim: int = -1, *more: Any, **kwargs: Any) -> Any:
    """Neighbours along ``dim`` are subtracted."""
    if ends := values((more, kwargs)):
        return ctx.opaque(node, [input, *ends], "it is joined with other tensors before neighbours are subtracted")
    return ctx.through(node, input, mixed=(dim,))


def _together(ctx: LabelContext, *operands: Value) -> Value:
    """Tensors broadcast against each other; zero where all of them are."""
    shape = tuple(torch.broadcast_shapes(*(v.shape for v in operands)))
    axes, _spans = ctx.combine(shape, operands)
    zero = frozenset(a for a in axes if all(a - len(shape) + v.ndim in v.zero for v in operands))
    return Value(shape, axes, zero, operands[0].why)


@functions(F.cosine_similarity)
def cosine_similarity(ctx: LabelContext, node: fx.Node, x1: Value, x2: Value, dim: int = 1, eps: float = 1e-8) -> Any:
    both = _together(ctx, x1, x2)
    return _reduce(ctx, node, both, {dim % both.ndim}, False, exact=True)


@functions(F.pairwise_distance)
def pairwise_distance(
    ctx: LabelContext, node: fx.Node, x1: Value, x2: Value, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Any:
    """Distances of rows. Each channel adds ``eps``, which is far below what the oracle sees where it is the default."""
    both = _together(ctx, x1, x2)
    return _reduce(ctx, node, both, {both.ndim - 1}, keepdim, exact=p > 0 and eps <= 1e-5)


@modules(nn.PairwiseDistance)
def pairwise_distance_module(ctx: LabelContext, node: fx.Node, module: Any, x1: Value, x2: Value) -> Any:
    return pairwise_distance(ctx, node, x1, x2, module.norm, module.eps, module.keepdim)


@modules(nn.CosineSimilarity)
def cosine_similarity_module(ctx: LabelContext, node: fx.Node, module: Any, x1: Value, x2: Value) -> Any:
    return cosine_similarity(ctx, node, x1, x2, module.dim, module.eps)


@functions(torch.linalg.vecdot)
def vecdot(ctx: LabelContext, node: fx.Node, x: Value, y: Value, dim: int = -1) -> Any:
    """Products of rows, summed: a channel that is zero in either adds nothing."""
    shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
    axes, _spans = ctx.combine(shape, [x, y])
    zero = frozenset(a for a in axes if any(a - len(shape) + v.ndim in v.zero for v in (x, y)))
    return _reduce(ctx, node, Value(shape, axes, zero, x.why), {dim % len(shape)}, False, exact=True)


@functions(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits)
def loss(ctx: LabelContext, node: fx.Node, input: Value, target: Value, *rest: Any, **kwargs: Any) -> Any:
    """Element by element, then the mean (or sum) of all: a network may compute a loss of its own (a codebook's)."""
    both = _together(ctx, input, target, *values((rest, kwargs)))
    shape = both.shape
    if node.meta["val"].ndim == len(shape):
        return ctx.make(node, both.axes, (), input.why)
    return _reduce(ctx, node, both, set(range(len(shape))), False, exact=False)
