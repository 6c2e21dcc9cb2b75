"""``norms="exact"``: operations that share a statistic over channels keep the divisor of the original, what is gone counting as zero.

In the zeroed original a removed channel is a zero that still counts: in the mean and variance of a layer norm, in the sum below a
softmax. Where that is known of the input (``LabelContext.statistic``), the slim graph puts the zeros back in front of the operation and
drops their places behind it, which is exact whatever the operation is, as long as it does not look at the order of channels. Where space
or a batch is folded in with the channels (``view(b, groups, -1)``) there are more zeros for larger inputs, and the graph counts them. A
mean and an RMS norm need no zeros, only a factor. (Squeeze-Release, arXiv 2606.14346, keeps the divisor of layer norms by a norm of its
own; these are plain operations.)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.passes.ir.nodes import target_name
from fxprune.passes.labels.values import Value
from fxprune.passes.rules.computing.norm import groups_left
from fxprune.passes.rules.protocols import Rewriter

Exact = Callable[[Rewriter, fx.Node, Any, Sequence[int]], fx.Node]
"""``rewrite(slim, node, module, axes) -> node``: ``axes`` of the input are pruned and share a statistic; what stands for the result."""


_VIEWS = frozenset({"view", "view_as", "_unsafe_view"})


def rewrite_exact(slim: Rewriter, node: fx.Node, module: nn.Module | None, axes: Sequence[int]) -> fx.Node:
    """Have ``node``, which has just been copied, compute the statistic of the original. ``module``: the original one, for a call of one."""
    if isinstance(module, nn.LayerNorm):
        kind = "layer_norm"
    elif isinstance(module, nn.GroupNorm):
        kind = "group_norm"
    elif is_rms(module):
        kind = "rms_norm"
    else:
        kind = target_name(node)
    return _KINDS.get(kind, _padded)(slim, node, module, axes)


def is_rms(module: Any) -> bool:
    """Whether a module is an RMS norm of torch's, whose weight and eps are rescaled instead of its graph."""
    return hasattr(nn, "RMSNorm") and isinstance(module, nn.RMSNorm)


def _padded(slim: Rewriter, node: fx.Node, module: Any, axes: Sequence[int]) -> fx.Node:
    x = _input(node)
    value, result = slim.value(x), slim.value(node)
    gone = _gone(slim, node, x, axes)
    node.replace_input_with(x, _zeros_back(slim, node, x, gone))
    single = result if isinstance(result, Value) else None
    if single is None or single.ndim != value.ndim or any(single.shape[a] != value.shape[a] for a in axes):
        return node  # the axes are reduced
    from_end = _from_end(slim, node, module, value.ndim)
    return _dropped(slim, node, node, x, {axis - value.ndim if axis in from_end else axis: amount for axis, amount in gone.items()})


def _from_end(slim: Rewriter, node: fx.Node, module: Any, ndim: int) -> set[int]:
    """The axes that the user counted from the end: they are others of a tensor with more axes."""
    if module is not None and not hasattr(module, "dim"):  # Softmax2d, whose channels have two axes behind them
        return set(range(ndim))
    given = slim.argument(node, "dim") if module is None else module.dim
    dims = given if isinstance(given, (tuple, list)) else () if given is None else (given,)
    return {ndim + int(d) for d in map(slim.number, dims) if d < 0}


def _layer_norm(slim: Rewriter, node: fx.Node, module: Any, axes: Sequence[int]) -> fx.Node:
    x = _input(node)
    value = slim.value(x)
    shape = module.normalized_shape if module is not None else slim.argument(node, "normalized_shape")
    eps = module.eps if module is not None else slim.argument(node, "eps", 1e-5)
    weight, bias = _affine(slim, node, module)
    gone = _gone(slim, node, x, axes, fixed=module is not None)
    # A size that the graph reads is still that of the original here.
    made = _call(slim, node, F.layer_norm, _zeros_back(slim, node, x, gone), list(shape), None, None, eps)
    dropped = _dropped(slim, node, made, x, {axis - value.ndim: amount for axis, amount in gone.items()})
    return _scaled(slim, node, dropped, weight, bias)


def _group_norm(slim: Rewriter, node: fx.Node, module: Any, axes: Sequence[int]) -> fx.Node:
    x = _input(node)
    value = slim.value(x)
    given = module.num_groups if module is not None else slim.argument(node, "num_groups")
    groups = slim.number(given)
    eps = module.eps if module is not None else slim.argument(node, "eps", 1e-5)
    weight, bias = _affine(slim, node, module)
    whole, left, now = value.shape[1] // groups, slim.count(value, 1), groups_left(slim, value, groups)
    each = left // now
    now = slim.rescaled(given, now)  # a batch may be folded in
    grouped = _call(slim, node, torch.unflatten, x, 1, (now, each))
    pads = [0, 0] * (value.ndim - 2) + [0, whole - each]
    full = _call(slim, node, torch.flatten, _call(slim, node, F.pad, grouped, pads), 1, 2)
    made = _call(slim, node, F.group_norm, full, now, None, None, eps)
    parts = _call(slim, node, torch.narrow, _call(slim, node, torch.unflatten, made, 1, (now, whole)), 2, 0, each)
    after = [1] * (value.ndim - 2)
    channels = left if isinstance(now, int) else -1
    columns = [None if t is None else _call(slim, node, torch.reshape, t, (channels, *after)) for t in (weight, bias)]
    return _scaled(slim, node, _call(slim, node, torch.flatten, parts, 1, 2), *columns)


def _rms_norm(slim: Rewriter, node: fx.Node, module: Any, axes: Sequence[int]) -> fx.Node:
    """With d of D left the mean square is D / d times too large: so are eps and, squared, the result's missing factor."""
    ratio = share(slim, slim.value(_input(node)), axes)
    if module is not None:
        return node if module.weight is not None else _call(slim, node, torch.mul, node, math.sqrt(ratio))
    eps = slim.argument(node, "eps")
    x = _input(node)
    value = slim.value(x)
    shape = slim.argument(node, "normalized_shape")
    with slim.new.inserting_before(node):
        slim.set_argument(node, "normalized_shape", slim.sizes(x, shape, value.ndim - len(shape)))
    example = node.meta["old"].meta["val"]
    slim.set_argument(node, "eps", (torch.finfo(example.dtype).eps if eps is None else eps) * ratio)
    return _call(slim, node, torch.mul, node, math.sqrt(ratio))


def _mean(slim: Rewriter, node: fx.Node, module: Any, axes: Sequence[int]) -> fx.Node:
    return _call(slim, node, torch.mul, node, 1.0 / share(slim, slim.value(_input(node)), axes))


def share(slim: Rewriter, value: Value, axes: Sequence[int]) -> float:
    """How many times as many positions the original has along ``axes``."""
    return math.prod(value.shape[a] for a in axes) / math.prod(slim.count(value, a) for a in axes)


def _gone(slim: Rewriter, node: fx.Node, x: fx.Node, axes: Sequence[int], fixed: bool = False) -> dict[int, Any]:
    """How many positions of ``x`` went along each axis: a number, or where the input decides how long the axis is the same share of that.
    ``fixed``: it decides none."""
    value, before = slim.value(x), _input(node.meta["old"])
    found: dict[int, Any] = {}
    for axis in axes:
        left = slim.count(value, axis)
        gone = value.shape[axis] - left
        if fixed or slim.is_fixed(before, axis):
            found[axis] = gone
            continue
        divisor = math.gcd(gone, left)
        with slim.new.inserting_before(node):
            amount = _size(slim, node, x, axis - value.ndim)
            if gone > divisor:
                amount = _call(slim, node, operator.mul, amount, gone // divisor)
            found[axis] = _call(slim, node, operator.floordiv, amount, left // divisor) if left > divisor else amount
    return found


def _zeros_back(slim: Rewriter, node: fx.Node, x: fx.Node, gone: Mapping[int, Any]) -> fx.Node:
    pads: list[Any] = []
    for axis in range(slim.value(x).ndim - 1, min(gone) - 1, -1):
        pads += [0, gone.get(axis, 0)]
    with slim.new.inserting_before(node):
        return _call(slim, node, F.pad, x, pads)


def _dropped(slim: Rewriter, node: fx.Node, made: fx.Node, x: fx.Node, gone: Mapping[int, Any]) -> fx.Node:
    """``made``, in place of ``node``, without the zeros that were put behind ``x``: as many as ``gone`` says by axis, which may count from
    the end."""
    value = slim.value(x)
    for axis, amount in gone.items():
        left = slim.count(value, axis % value.ndim) if isinstance(amount, int) else _size(slim, node, x, axis)
        made = _call(slim, node, torch.narrow, made, axis, 0, left)
    if not any(target_name(user) in _VIEWS for user in node.meta["old"].users):
        return made
    dense = slim.new.call_method("contiguous", (made,))  # a view takes no gaps where the zeros were
    dense.meta = _place(node)
    return dense


def _scaled(slim: Rewriter, node: fx.Node, made: fx.Node, weight: Any, bias: Any) -> fx.Node:
    if weight is not None:
        made = _call(slim, node, torch.mul, made, weight)
    return made if bias is None else _call(slim, node, torch.add, made, bias)


def _affine(slim: Rewriter, node: fx.Node, module: Any) -> tuple[Any, Any]:
    """The weight and bias that a norm multiplies and adds, as nodes; None where it has none."""
    if module is None:
        return slim.argument(node, "weight"), slim.argument(node, "bias")
    found: list[Any] = []
    for key in ("weight", "bias"):
        if getattr(module, key, None) is None:
            found.append(None)
            continue
        made = slim.new.get_attr(f"{node.target}.{key}" if node.target else key)
        made.meta = _place(node)
        found.append(made)
    return found[0], found[1]


def _call(slim: Rewriter, node: fx.Node, function: Any, *args: Any) -> fx.Node:
    made = slim.new.call_function(function, args)
    made.meta = _place(node)
    return made


def _size(slim: Rewriter, node: fx.Node, x: fx.Node, axis: int) -> fx.Node:
    made = slim.new.call_method("size", (x, axis))
    made.meta = _place(node)
    return made


def _place(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in ("where", "owner") if node.meta.get(key)}


def _input(node: fx.Node) -> fx.Node:
    found = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(found, fx.Node)
    return found


_KINDS: dict[str, Exact] = {"layer_norm": _layer_norm, "group_norm": _group_norm, "rms_norm": _rms_norm, "mean": _mean}
