"""Reductions, softmax and the like: an axis of channels that they share a value over may be pruned, and that value changes."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.errors import UnsupportedError
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.labels.choices import BOTH
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, values
from fxprune.passes.rules import binding
from fxprune.passes.rules.computing import zeros
from fxprune.passes.rules.computing.choosing import check_choice, chooses, is_chosen_from
from fxprune.passes.rules.protocols import Rewriter
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
    kept = zeros.keeps_zero(node) if zero else ()
    if isinstance(node.meta["val"], torch.Tensor):
        return ctx.make(node, axes, zero if kept[:1] == (True,) else (), x.why)
    return tuple(ctx.make(node, axes, zero if kept[i : i + 1] == (True,) else (), x.why, i) for i in range(len(node.meta["val"])))


@named("sum", "nansum", "count_nonzero", inplace=False)
def total(ctx: LabelContext, node: fx.Node, input: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    return _reduce(ctx, node, input, _dims(input, dim), keepdim, exact=True)


@named("norm", "vector_norm", "matrix_norm", inplace=False)
def length(ctx: LabelContext, node: fx.Node, input: Value, dim: Any = None, keepdim: bool = False, **named: Any) -> Any:
    order = named.get("p", named.get("ord"))
    if dim is None and "matrix_norm" in target_name(node):
        dim = (-2, -1)
    exact = not isinstance(order, (int, float)) or order >= 0  # below, the smallest magnitude counts, which is a removed slice's
    return _reduce(ctx, node, input, _dims(input, dim), keepdim, exact=exact)


@named(
    *("mean", "nanmean", "amax", "amin", "prod", "logsumexp", "median", "nanmedian"),
    *("any", "all", "aminmax"),
    inplace=False,
)
def average(ctx: LabelContext, node: fx.Node, input: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    dims = _dims(input, dim)
    median = target_name(node) in ("median", "nanmedian")
    if median:
        _pin_used_index(ctx, node, input, dims)
    return _reduce(ctx, node, input, dims, keepdim, exact=False, place_free=not median)


def _least(named: Mapping[str, Any]) -> int:
    """How many numbers a variance needs: one more than its correction."""
    correction = named.get("correction")
    return 1 + int(named.get("unbiased", True) if correction is None else correction)


def _still_spread(slim: Rewriter, node: fx.Node) -> None:
    """Of one part of a group there may be fewer left than of the whole."""
    x, dim = slim.value(slim.argument(node, "input")), slim.argument(node, "dim")
    dims = _dims(x, map_arg(dim, slim.number))
    least = _least({name: slim.argument(node, name) for name in ("unbiased", "correction") if slim.argument(node, name) is not None})
    left = math.prod(slim.count(x, axis) for axis in dims)
    if left < least <= math.prod(x.shape[axis] for axis in dims):
        where = node.meta.get("where", node.name)
        raise UnsupportedError(
            f"{where}: {target_name(node)} needs {least} numbers, and {left} would be left; remove fewer of these channels"
        )


@named("var", "std", "var_mean", "std_mean", inplace=False, rewrite=_still_spread)
def spread(ctx: LabelContext, node: fx.Node, input: Value, dim: Any = None, keepdim: bool = False, **named: Any) -> Any:
    dims = _dims(input, dim)
    for axis in dims & set(input.axes):
        if math.prod(input.shape[a] for a in dims - {axis}) == 1 and (least := _least(named)) > 1:
            ctx.at_least(input.axes[axis], least)
    return _reduce(ctx, node, input, dims, keepdim, exact=False, place_free=True)


@named("quantile", "nanquantile", inplace=False)
def quantile(ctx: LabelContext, node: fx.Node, input: Value, q: Any, dim: int | None = None, keepdim: bool = False, **_: Any) -> Any:
    """Several quantiles ``q`` make a first axis."""
    many = isinstance(q, Value) and q.ndim > 0
    if isinstance(q, Value):
        ctx.pin_all(q, "it says which quantiles are taken")
    inner = _reduce_value(ctx, input, _dims(input, dim), keepdim)
    shift = int(many)
    return ctx.make(node, {a + shift: v for a, v in inner.items()}, (), input.why)


def _reduce_value(ctx: LabelContext, x: Value, dims: set[int], keepdim: bool) -> dict[int, Any]:
    for axis in dims & set(x.axes):
        ctx.inexact(x.axes[axis], "a reduction over channels")
    return {axis if keepdim else axis - sum(d < axis for d in dims): v for axis, v in x.axes.items() if axis not in dims}


@named("kthvalue", "mode", inplace=False)
def chosen(ctx: LabelContext, node: fx.Node, input: Value, dim: int = -1, keepdim: bool = False, **_: Any) -> Any:
    """The k-th smallest, or the commonest, of those along ``dim``: which one it is depends on all of them."""
    dims = _dims(input, dim)
    for axis in dims:
        ctx.pin(input.axes.get(axis), "which of its values is taken depends on how many there are")
    return _reduce(ctx, node, input, dims, keepdim, exact=False)


@named("max", "min", inplace=False)
def extreme(ctx: LabelContext, node: fx.Node, input: Value, **named: Any) -> Any:
    if isinstance(named.get("other"), Value):
        return zeros.elementwise(ctx, node)
    dims = _dims(input, named.get("dim"))
    if target_name(node) == "max" and len(dims) == 1 and _uses_positions(node) and chooses(ctx, node, input, min(dims), 1):
        best, place = (_kept_axes(ctx, node, input, dims, bool(named.get("keepdim", False)), i) for i in range(2))
        return best, replace(place, picks=input.axes[min(dims)])
    _pin_used_index(ctx, node, input, dims)
    return _reduce(ctx, node, input, dims, bool(named.get("keepdim", False)), exact=False, place_free=True)


def _uses_positions(node: fx.Node) -> bool:
    """Whether something reads the second result, the positions of what was chosen."""
    values_only = ((operator.getitem, 0), (getattr, "values"))
    return any((user.target, user.args[1] if len(user.args) > 1 else None) not in values_only for user in node.users)


def _pin_used_index(ctx: LabelContext, node: fx.Node, x: Value, dims: set[int]) -> None:
    """Where something reads the second result, the position of an extreme, all channels that it was sought among stay."""
    if isinstance(node.meta["val"], torch.Tensor):
        return
    if _uses_positions(node):
        for axis in dims:
            ctx.pin(x.axes.get(axis), "the index of a maximum over it is used")


@named("argmax", "argmin", inplace=False)
def index_of(ctx: LabelContext, node: fx.Node, input: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    dims = _dims(input, dim)
    if target_name(node) == "argmax" and len(dims) == 1 and chooses(ctx, node, input, min(dims), 1):
        return replace(_kept_axes(ctx, node, input, dims, keepdim), picks=input.axes[min(dims)])
    for axis in dims:
        ctx.pin(input.axes.get(axis), "the index of a maximum over it is used")
    return _reduce(ctx, node, input, dims, keepdim, exact=False)


def _kept_axes(ctx: LabelContext, node: fx.Node, x: Value, dims: set[int], keepdim: bool, index: int | None = None) -> Value:
    """What is left of ``x`` where the axes ``dims`` go."""
    axes = {a if keepdim else a - sum(d < a for d in dims): v for a, v in x.axes.items() if a not in dims}
    return ctx.make(node, axes, (), x.why, index)


def _enough(slim: Rewriter, node: fx.Node) -> None:
    x = slim.value(slim.argument(node, "input"))
    check_choice(slim, node, slim.number(slim.argument(node, "dim", -1)) % max(x.ndim, 1), slim.number(slim.argument(node, "k")))


@named("topk", inplace=False, rewrite=_enough)
def topk(ctx: LabelContext, node: fx.Node, input: Value, k: Any, dim: int = -1, largest: bool = True, **_: Any) -> Any:
    """The ``k`` best along ``dim``, and their positions: channels may go as long as ``k`` stay, where what reads the positions follows."""
    axis = dim % input.ndim if input.ndim else 0
    counted = ctx.is_number(binding.form_of(node).arguments(node.args, node.kwargs)["k"])
    if largest is True and counted and chooses(ctx, node, input, axis, k):
        axes = {a: v for a, v in input.axes.items() if a != axis}
        best, place = (ctx.make(node, axes, (), input.why, i) for i in range(2))
        return best, replace(place, picks=input.axes[axis])
    return ordered(ctx, node, input, dim)


@named("sort", "argsort", "msort", inplace=False)
def ordered(ctx: LabelContext, node: fx.Node, input: Value, dim: int | None = None, **_: Any) -> Any:
    dim = (0 if target_name(node) == "msort" else -1) if dim is None else dim
    if isinstance(node.meta["val"], torch.Tensor):
        return ctx.through(node, input, mixed=(dim,), zero=False)
    return tuple(ctx.through(node, input, mixed=(dim,), zero=False, index=i) for i in range(len(node.meta["val"])))


def _shared(ctx: LabelContext, node: fx.Node, x: Value, dim: int | None, what: str, plain: bool = False) -> Value:
    """``plain``: a softmax of which minus infinity gets no share, and with which nothing else is done."""
    axis = (1 if x.ndim > 1 else 0) if dim is None else dim % x.ndim
    if plain and axis in x.axes and is_chosen_from(node):  # nobody chooses what went, so it gets no share, whatever the norms
        ctx.masked_softmax(node, axis, x.axes[axis], what, BOTH)
        return ctx.make(node, x.axes, (axis,), x.why)
    ctx.statistic(node, x, axis, what, plain)
    return ctx.make(node, x.axes, (), x.why)


@named("softmax", "log_softmax", "softmin", "gumbel_softmax", "_safe_softmax", inplace=False)
def softmax(ctx: LabelContext, node: fx.Node, input: Value, dim: int | None = None, **_: Any) -> Value:
    return _shared(ctx, node, input, dim, "softmax over channels", target_name(node) in ("softmax", "_safe_softmax"))


@modules(nn.Softmax, nn.LogSoftmax, nn.Softmin)
def softmax_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Value:
    return _shared(ctx, node, input, module.dim, "softmax over channels", type(module) is nn.Softmax)


@modules(nn.Softmax2d)
def softmax2d_module(ctx: LabelContext, node: fx.Node, module: Any, input: Value) -> Value:
    return _shared(ctx, node, input, -3, "softmax over channels")


@named("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def cumulative(ctx: LabelContext, node: fx.Node, input: Value, dim: int, **_: Any) -> Any:
    axis = dim % input.ndim if input.ndim else 0
    if isinstance(node.meta["val"], torch.Tensor):
        if not (target_name(node) == "cumsum" and axis in input.zero):  # a sum up to each channel that stays, without zeros
            ctx.inexact(input.axes.get(axis), "a running total over channels")
    else:
        ctx.pin(input.axes.get(axis), "the index of a maximum over it may be used")
    axes = {a: v for a, v in input.axes.items() if isinstance(node.meta["val"], torch.Tensor) or a != axis}
    zero = {a for a in input.zero if a != axis}
    kept = zeros.keeps_zero(node) if zero else ()
    if isinstance(node.meta["val"], torch.Tensor):
        return ctx.make(node, axes, zero if kept == (True,) else (), input.why)
    return tuple(ctx.make(node, axes, zero if kept[i : i + 1] == (True,) else (), input.why, i) for i in range(2))


@named("diff", inplace=False)
def difference(ctx: LabelContext, node: fx.Node, input: Value, n: int = 1, dim: int = -1, **more: Any) -> Any:
    """Neighbours along ``dim`` are subtracted."""
    if ends := values(more):
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
def loss(ctx: LabelContext, node: fx.Node, input: Value, target: Value, **rest: Any) -> Any:
    """Element by element, then the mean (or sum) of all: a network may compute a loss of its own (a codebook's)."""
    both = _together(ctx, input, target, *values(rest))
    shape = both.shape
    if node.meta["val"].ndim == len(shape):
        return ctx.make(node, both.axes, (), input.why)
    return _reduce(ctx, node, both, set(range(len(shape))), False, exact=False)
