"""Contractions: matrix products, einsum, linear layers, embeddings, attention. Summed axes are united; free axes keep their labels."""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.errors import UnsupportedError
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, values
from fxprune.passes.rules import binding
from fxprune.passes.rules.computing import zeros
from fxprune.passes.rules.computing.elementwise import CASTS
from fxprune.passes.rules.layer_specs import layers
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, modules, named

Operand = tuple[Value, str]


def contract(ctx: LabelContext, operands: Sequence[Operand], out: str, layer: str = "") -> tuple[dict[int, Any], set[int]]:
    """Unite labels letter by letter over ``operands`` and return (labels by axis, zero axes) of the result with letters ``out``.

    A letter of size one in an operand broadcasts. A letter that carries labels in one operand and has a full extent without labels in
    another is pinned. Summing over labels whose removed slices are zero in no operand puts them beyond the zeroing oracle.
    """
    axes: dict[int, Any] = {}
    zero: set[int] = set()
    letters = sorted({c for _, names in operands for c in names})
    extent = 1
    along = []
    for letter in letters:
        spanning = [(v, names.index(letter)) for v, names in operands if letter in names and v.shape[names.index(letter)] != 1]
        if not spanning:
            continue
        extent *= spanning[0][0].shape[spanning[0][1]]
        with_labels = [(v, a, v.axes[a]) for v, a in spanning if a in v.axes]
        if not with_labels:
            continue
        bare = next((v for v, a in spanning if a not in v.axes), None)
        if bare is not None:
            for _, _, vector in with_labels:
                ctx.clash(vector, bare)
                ctx.pin(vector, "it is multiplied with a tensor of fixed size", because=bare.why)
            continue
        vector = next((x for _, _, x in with_labels if not ctx.is_soft(x)), with_labels[0][2])
        for _, _, other in with_labels:
            ctx.unite(vector, other)
        along.append(vector)
        harmless = any(a in v.zero for v, a, _ in with_labels)
        if letter in out:
            axes[out.index(letter)] = vector
            if harmless:
                zero.add(out.index(letter))
        elif not harmless:
            ctx.inexact(vector, "two activations are multiplied and summed over it")
    if layer and len(operands) > 1:
        ctx.cost(layer, extent, *along)
    return axes, zero


def linear_value(ctx: LabelContext, node: fx.Node, x: Value, weight: Value, bias: Value | None, layer: str) -> Value:
    """``x (..., in)`` times ``weight (out, in)`` plus ``bias (out)``."""
    free = string.ascii_lowercase[: x.ndim - 1]
    if weight.ndim == 1:
        axes, zero = contract(ctx, [(x, free + "I"), (weight, "I")], free, layer)
        return ctx.make(node, axes, zero)
    _need_labels(ctx, x, x.ndim - 1, weight, 1)
    axes, zero = contract(ctx, [(x, free + "I"), (weight, "OI")], free + "O", layer)
    out = x.ndim - 1
    if bias is not None:
        zero -= set(range(out)) | ({out} if 0 not in bias.zero else set())  # the bias is added to removed slices along other axes too
        _bias(ctx, axes, out, bias)
    return ctx.make(node, axes, zero)


def _bias(ctx: LabelContext, axes: dict[int, Any], axis: int, bias: Value) -> None:
    if 0 in bias.axes and axis in axes:
        ctx.unite(axes[axis], bias.axes[0])
    elif 0 in bias.axes:
        ctx.pin(bias.axes[0], "the layer's output has a fixed size", ReasonKind.FIXED_SIZE)
    elif axis in axes and bias.shape[0] != 1:
        ctx.pin(axes.pop(axis), "its bias has a fixed size", because=bias.why)


def _need_labels(ctx: LabelContext, x: Value, axis: int, weight: Value, dim: int) -> None:
    """A layer that reads a fixed-size axis keeps all its inputs: say so in the layer's own words."""
    if axis not in x.axes and dim in weight.axes:
        ctx.pin(weight.axes[dim], "the layer reads channels of fixed size", because=x.why)


def _linear_shape(module: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
    x = args[0]
    return torch.empty((*x.shape[:-1], module.out_features), dtype=module.weight.dtype, device="meta") if x.ndim > 1 else None


layers(
    nn.Linear,
    outputs={"weight": 0, "bias": 0},
    inputs={"weight": 1},
    sizes={"out_features": ("weight", 0), "in_features": ("weight", 1)},
    shape=_linear_shape,
    function="linear",
)


@modules(nn.Linear)
def linear_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Value:
    ctx.bind(node, "weight", 1, input.axes.get(input.ndim - 1))
    weight = ctx.weight(node, "weight")
    assert weight is not None
    ctx.bind(node, "bias", 0, weight.axes.get(0))
    return linear_value(ctx, node, input, weight, ctx.weight(node, "bias"), str(node.target))


@functions(F.linear)
def linear(ctx: LabelContext, node: fx.Node, input: Value, weight: Value, bias: Value | None = None) -> Value:
    ctx.read_as_weight(weight)
    return linear_value(ctx, node, input, weight, bias, ctx.owner(node))


layers(
    nn.Bilinear,
    outputs={"weight": 0, "bias": 0},
    sizes={"out_features": ("weight", 0), "in1_features": ("weight", 1), "in2_features": ("weight", 2)},
    function="bilinear",
)


@modules(nn.Bilinear)
def bilinear_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input1: Value, input2: Value) -> Value:
    weight, bias = ctx.weight(node, "weight"), ctx.weight(node, "bias")
    assert weight is not None
    return _bilinear(ctx, node, input1, input2, weight, bias, str(node.target))


@functions(F.bilinear)
def bilinear(ctx: LabelContext, node: fx.Node, input1: Value, input2: Value, weight: Value, bias: Value | None = None) -> Value:
    ctx.read_as_weight(weight)
    return _bilinear(ctx, node, input1, input2, weight, bias, ctx.owner(node))


def _bilinear(ctx: LabelContext, node: fx.Node, input1: Value, input2: Value, weight: Value, bias: Value | None, layer: str) -> Value:
    """``input1 (..., I)`` and ``input2 (..., J)`` with ``weight (O, I, J)``."""
    free = string.ascii_lowercase[: input1.ndim - 1]
    _need_labels(ctx, input1, input1.ndim - 1, weight, 1)
    _need_labels(ctx, input2, input2.ndim - 1, weight, 2)
    axes, zero = contract(ctx, [(input1, free + "I"), (input2, free + "J"), (weight, "OIJ")], free + "O", layer)
    if bias is not None:
        zero -= set(range(input1.ndim - 1)) | ({input1.ndim - 1} if 0 not in bias.zero else set())
        _bias(ctx, axes, input1.ndim - 1, bias)
    return ctx.make(node, axes, zero)


# What torch's schemas call the operands, by place: each operation has names of its own.
_PRODUCT = (("input", "self"), ("other", "mat2", "vec", "tensor"))
_GROUPED = (("input", "self", "mat_a"), ("mat2", "mat_b"))
_ROW = 16  # bytes
_SUM = (("input", "self"), ("mat1", "batch1", "mat"), ("mat2", "batch2", "vec"))


def _operands(given: tuple[Any, ...], named: dict[str, Any], names: tuple[tuple[str, ...], ...]) -> list[Any]:
    """The operands in order, by place or by name."""
    rest = [next(named[n] for n in place if n in named) for place in names[len(given) :]]
    return [*given[: len(names)], *rest]


@named("matmul", "bmm", "mm", "mv", "dot", "vdot", inplace=False)
@functions(operator.matmul)
def matmul(ctx: LabelContext, node: fx.Node, *given: Value, **named: Any) -> Value:
    input, other = _operands(given, named, _PRODUCT)
    for value in (input, other):
        if ctx.is_weight(value) and value.ndim <= 3:
            ctx.read_as_weight(value)
    axes, zero = _matmul(ctx, input, other, ctx.owner(node))
    return ctx.make(node, axes, zero)


def _matmul(ctx: LabelContext, a: Value, b: Value, layer: str) -> tuple[dict[int, Any], set[int]]:
    if a.ndim == 1 and b.ndim == 1:
        return contract(ctx, [(a, "K"), (b, "K")], "", layer)
    batch = string.ascii_lowercase[: max(a.ndim, b.ndim) - 2]
    if b.ndim == 1:
        free = string.ascii_lowercase[: a.ndim - 1]
        return contract(ctx, [(a, free + "K"), (b, "K")], free, layer)
    first = batch[len(batch) - (a.ndim - 2) :] + "IK" if a.ndim > 1 else "K"
    second = batch[len(batch) - (b.ndim - 2) :] + "KJ"
    return contract(ctx, [(a, first), (b, second)], batch + ("I" if a.ndim > 1 else "") + "J", layer)


@named("baddbmm", "addmm", "addbmm", "addmv")
def addmm(ctx: LabelContext, node: fx.Node, *given: Value, **named: Any) -> Any:
    input, first, second = _operands(given, named, _SUM)
    if getattr(node.target, "__name__", node.target) == "addbmm":
        return ctx.opaque(node, [input, first, second])
    for value in (first, second):
        if ctx.is_weight(value) and value.ndim <= 3:
            ctx.read_as_weight(value)
    axes, zero = _matmul(ctx, first, second, ctx.owner(node))
    product = ctx.make(node, axes, zero)
    return ctx.pointwise(node, product, input, zero="all")


@named("outer", "ger", inplace=False)
def outer(ctx: LabelContext, node: fx.Node, input: Value, vec2: Value) -> Value:
    """``input`` (n) times ``vec2`` (m): (n, m)."""
    axes, zero = contract(ctx, [(input, "I"), (vec2, "J")], "IJ", ctx.owner(node))
    return ctx.make(node, axes, zero)


@named("inner", inplace=False)
def inner(ctx: LabelContext, node: fx.Node, input: Value, other: Value) -> Value:
    """The last axes meet; without one it is a product with a number."""
    if not input.ndim or not other.ndim:
        return zeros.elementwise(ctx, node)  # type: ignore[no-any-return]
    for value in (input, other):
        if ctx.is_weight(value):
            ctx.read_as_weight(value)
    first, second = string.ascii_lowercase[: input.ndim - 1], string.ascii_uppercase[: other.ndim - 1]
    axes, zero = contract(ctx, [(input, first + "Z"), (other, second + "Z")], first + second, ctx.owner(node))
    return ctx.make(node, axes, zero)


@named("multi_dot", "chain_matmul", inplace=False)
def multi_dot(ctx: LabelContext, node: fx.Node, tensors: Sequence[Value], **_: Any) -> Value:
    """A chain of matrices; the first and the last may be vectors."""
    operands = []
    for i, value in enumerate(tensors):
        letters = string.ascii_letters[i : i + 2]
        operands.append((value, letters if value.ndim == 2 else letters[1] if i == 0 else letters[0]))
        if ctx.is_weight(value):
            ctx.read_as_weight(value)
    out = "".join(c for c in string.ascii_letters[: len(operands) + 1] if sum(c in names for _, names in operands) == 1)
    axes, zero = contract(ctx, operands, out, ctx.owner(node))
    return ctx.make(node, axes, zero)


def _aligned(slim: Rewriter, node: fx.Node) -> None:
    """Torch takes rows of whole 16 bytes alone (``_grouped_mm`` in ATen's ``GroupedMMUtils.h``)."""
    input, weight = _operands(node.args[:2], node.kwargs, _GROUPED)
    rows = input.meta["old"].meta["val"], weight.meta["old"].meta["val"]
    for source, axis in [(input, 1)] + ([(weight, 2)] if rows[1].stride(-1) == 1 else []):
        value, bytes_each = slim.value(source), rows[0].element_size()
        old, left = value.shape[axis], slim.count(value, axis)
        if left * bytes_each % _ROW and not old * bytes_each % _ROW:
            raise UnsupportedError(
                f"{node.meta.get('where', node.name)}: grouped_mm takes rows of whole {_ROW} bytes, and {left} channels of {bytes_each} "
                f"bytes would be left; compress with round_to={_ROW // bytes_each}"
            )


@named("grouped_mm", "_grouped_mm", inplace=False, rewrite=_aligned)
def grouped(ctx: LabelContext, node: fx.Node, *given: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None, **named: Any) -> Any:
    """A mixture's experts: runs of rows of ``input`` (S, K), each times its matrix of ``mat2`` (E, K, N)."""
    input, weight = _operands(given[:2], named, _GROUPED)
    if input.ndim != 2 or weight.ndim != 3 or bias is not None:
        return ctx.opaque(node, list(values((input, weight, offs, bias))), "rows are not the groups")
    if ctx.is_weight(weight):
        ctx.read_as_weight(weight)
    if isinstance(offs, Value) and 0 in offs.axes and 0 in weight.axes and _end_of_chosen(ctx, node):
        ctx.unite(weight.axes[0], offs.axes[0])  # a group that went has no rows
    else:
        for one in values(offs):
            ctx.pin_all(one, "it says where the rows of a group end")
        ctx.pin(weight.axes.get(0), "each group of rows has a matrix of its own", ReasonKind.STRUCTURE)
    axes, zero = contract(ctx, [(input, "SK"), (weight, "EKN")], "SN")
    ctx.cost(ctx.owner(node), input.shape[0] * weight.shape[1] * weight.shape[2], input.axes.get(1), axes.get(1))
    return ctx.make(node, axes, zero)


def _end_of_chosen(ctx: LabelContext, node: fx.Node) -> bool:
    """Whether the ends of the groups are running totals of how often each channel was chosen, 0 for one that went."""
    source: Any = binding.form_of(node).arguments(node.args, node.kwargs).get("offs")
    while isinstance(source, fx.Node) and target_name(source) in CASTS:
        source = source.args[0] if source.args else None
    if not isinstance(source, fx.Node) or target_name(source) != "cumsum":
        return False
    arguments = binding.form_of(source).arguments(source.args, source.kwargs)
    counts = ctx.env[ctx.mode].get(arguments["input"])
    return isinstance(counts, Value) and counts.ndim == 1 and 0 in counts.zero


@functions(torch.einsum, torch.functional.einsum)
def einsum(ctx: LabelContext, node: fx.Node, equation: str, *operands: Any) -> Any:
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    terms, arrow, out = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if not arrow:  # what stands once, in the order of the alphabet, behind the axes of the dots
        out = "..." * ("..." in terms) + "".join(sorted(c for c in set(terms) - set(",.") if terms.count(c) == 1))
    spare = [c for c in string.ascii_letters if c not in equation]
    widest = max((v.ndim - len(t.replace("...", "")) for v, t in zip(tensors, names, strict=True) if "..." in t), default=0)
    dots = "".join(spare[:widest])
    full = [t.replace("...", dots[widest - (v.ndim - len(t.replace("...", ""))) :]) for v, t in zip(tensors, names, strict=True)]
    for value in tensors:
        if ctx.is_weight(value):
            ctx.read_as_weight(value)
    operands = tuple(_on_diagonals(ctx, value, letters) for value, letters in zip(tensors, full, strict=True))
    axes, zero = contract(ctx, operands, out.replace("...", dots), ctx.owner(node))
    return ctx.make(node, axes, zero)


def _on_diagonals(ctx: LabelContext, x: Value, letters: str) -> Operand:
    """A letter that stands twice takes a diagonal: channels that meet on it go together, and stay where only one axis has any."""
    while twice := next((c for c in letters if letters.count(c) > 1), ""):
        first, second = letters.index(twice), letters.rindex(twice)
        rows, columns = x.axes.get(first), x.axes.get(second)
        if rows is not None and columns is not None:
            ctx.unite(rows, columns)
        else:
            ctx.pin(columns if rows is None else rows, "a diagonal is taken")
        shape = x.shape[:second] + x.shape[second + 1 :]
        axes = {a - (a > second): v for a, v in x.axes.items() if a != second and (a != first or columns is not None)}
        zero = {a - (a > second) for a in x.zero if a != second} | ({first} if second in x.zero else set())
        x, letters = Value(shape, axes, frozenset(zero & set(axes)), x.why), letters[:second] + letters[second + 1 :]
    return x, letters


@named("tensordot", inplace=False)
@functions(torch.functional.tensordot)
def tensordot(ctx: LabelContext, node: fx.Node, a: Value, b: Value, dims: Any = 2, **_: Any) -> Any:
    """``dims``: how many last axes of ``a`` meet first axes of ``b``, or which of the one meet which of the other."""
    pairs = (range(a.ndim - dims, a.ndim), range(dims)) if isinstance(dims, int) else dims
    left, right = list(string.ascii_letters[: a.ndim]), list(string.ascii_letters[a.ndim : a.ndim + b.ndim])
    for mine, theirs in zip(*pairs, strict=True):
        right[theirs] = left[mine]
    out = "".join(c for c in (*left, *right) if (c in left) != (c in right))
    for value in (a, b):
        if ctx.is_weight(value):
            ctx.read_as_weight(value)
    axes, zero = contract(ctx, [(a, "".join(left)), (b, "".join(right))], out, ctx.owner(node))
    return ctx.make(node, axes, zero)


@named("cdist", inplace=False)
@functions(torch.functional.cdist)
def distance(ctx: LabelContext, node: fx.Node, x1: Value, x2: Value, **_: Any) -> Any:
    """Distances between rows ``x1`` (..., P, M) and ``x2`` (..., R, M): channels that hold zeros in both add nothing."""
    batch = string.ascii_lowercase[: max(x1.ndim, x2.ndim) - 2]
    first, second = (batch[len(batch) - (x.ndim - 2) :] for x in (x1, x2))
    axes, _zero = contract(ctx, [(x1, first + "PM"), (x2, second + "RM")], batch + "PR", ctx.owner(node))
    if not (x1.ndim - 1 in x1.zero and x2.ndim - 1 in x2.zero):
        ctx.inexact(x1.axes.get(x1.ndim - 1), "a distance over channels")
    made: Value = ctx.make(node, axes)
    return made


@named("kron", inplace=False)
def kron(ctx: LabelContext, node: fx.Node, input: Value, other: Value) -> Any:
    """Along every axis each index of ``input`` stands before all of ``other``: the one that has more channels there can lose some."""
    axes: dict[int, Any] = {}
    for axis in range(-max(input.ndim, other.ndim), 0):
        sizes = [x.shape[axis] if -axis <= x.ndim else 1 for x in (input, other)]
        outer, inner = (x.axes.get(axis + x.ndim) for x in (input, other))
        found = [np.repeat(outer, sizes[1])] if outer is not None else []
        found += [np.tile(inner, sizes[0])] if inner is not None else []
        if found:
            axes[axis + len(node.meta["val"].shape)] = found[0] if len(found) == 1 else ctx.same_axis(*found)
    return ctx.make(node, axes)


layers(nn.Embedding, nn.EmbeddingBag, outputs={"weight": 1}, sizes={"embedding_dim": ("weight", 1)}, function="embedding")


@modules(nn.Embedding)
def embedding_module(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value) -> Any:
    weight = ctx.weight(node, "weight")
    assert weight is not None
    return embedding(ctx, node, input, weight)


@functions(F.embedding)
def embedding(ctx: LabelContext, node: fx.Node, input: Value, weight: Value, **_: Any) -> Value:
    """``input`` (...) of indices into ``weight`` (vocabulary, channels): the channels are the last axis of the result."""
    ctx.read_as_weight(weight)
    ctx.pin(weight.axes.get(0), "a vocabulary is not pruned", ReasonKind.STRUCTURE)
    ctx.pin_all(input, "it is used as an index")
    axes = {input.ndim: weight.axes[1]} if 1 in weight.axes else {}
    return ctx.make(node, axes, axes if 1 in weight.zero else (), weight.why)


@modules(nn.EmbeddingBag)
def embedding_bag_module(
    ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value, offsets: Any = None, per_sample_weights: Any = None
) -> Value:
    weight = ctx.weight(node, "weight")
    assert weight is not None
    found: Value = embedding_bag(ctx, node, input, weight, offsets, per_sample_weights)
    return found


@functions(F.embedding_bag)
def embedding_bag(
    ctx: LabelContext,
    node: fx.Node,
    input: Value,
    weight: Value,
    offsets: Any = None,
    per_sample_weights: Any = None,
    **_: Any,
) -> Value:
    """``input`` (bags, length), or (entries) with ``offsets`` (bags), of indices into ``weight`` (vocabulary, channels)."""
    ctx.read_as_weight(weight)
    ctx.pin(weight.axes.get(0), "a vocabulary is not pruned", ReasonKind.STRUCTURE)
    for given in values((input, offsets, per_sample_weights)):
        ctx.pin_all(given, "it is used as an index")
    axes = {1: weight.axes[1]} if 1 in weight.axes else {}
    return ctx.make(node, axes, axes if 1 in weight.zero else (), weight.why)


def _keep_scale(slim: Rewriter, node: fx.Node) -> None:
    """Attention divides by sqrt(head_dim) of the original heads, whatever is left of them (design: the softmax scale stays)."""
    query = slim.argument(node, "query")
    if slim.argument(node, "scale") is not None or not slim.pruned(query, -1):
        return
    node.kwargs = {**node.kwargs, "scale": 1.0 / math.sqrt(slim.value(query).shape[-1])}


@functions(F.scaled_dot_product_attention, rewrite=_keep_scale)
def attention(
    ctx: LabelContext,
    node: fx.Node,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """softmax(query key^T * scale + mask) value; query (..., L, E), key (..., S, E), value (..., S, Ev)."""
    if max(key.ndim, value.ndim) > query.ndim:
        mask = [attn_mask] if isinstance(attn_mask, Value) else []
        return ctx.opaque(node, [query, key, value, *mask], "keys have more axes than queries")  # type: ignore[no-any-return]
    if enable_gqa:
        key, value = _repeated(ctx, query, key), _repeated(ctx, query, value)
    batch = string.ascii_lowercase[: query.ndim - 2]
    kb, vb = batch[len(batch) - (key.ndim - 2) :], batch[len(batch) - (value.ndim - 2) :]
    layer = ctx.owner(node)
    axes, _ = contract(ctx, [(query, batch + "LE"), (key, kb + "SE")], batch + "LS", layer)
    shape = (*query.shape[:-1], key.shape[-2])
    for axis in (len(batch), len(batch) + 1):
        ctx.inexact(axes.get(axis), "softmax over channels")
    weights = Value(shape, axes, frozenset(), ctx.origin(f"it is the weights of {ctx.op_name()}"))
    if isinstance(attn_mask, Value):
        axes, _spans = ctx.combine(shape, [weights, attn_mask])
        weights = Value(shape, axes, frozenset(), weights.why)
    axes, zero = contract(ctx, [(weights, batch + "LS"), (value, vb + "SV")], batch + "LV", layer)
    return ctx.make(node, axes, zero)


def _repeated(ctx: LabelContext, query: Value, other: Value) -> Value:
    """Grouped queries: each head of ``other`` serves several heads of ``query`` (axis -3)."""
    axis = other.ndim - 3
    times = query.shape[-3] // other.shape[-3]
    axes = dict(other.axes)
    if axis in axes:
        axes[axis] = np.repeat(axes[axis], times)
    shape = list(other.shape)
    shape[axis] *= times
    return Value(tuple(shape), axes, other.zero, other.why)
