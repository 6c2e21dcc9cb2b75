"""Functions that fx keeps as one call although they hold structure: written out, so that the labels can see inside.

``torch.nn.functional.multi_head_attention_forward`` (and with it ``nn.MultiheadAttention`` and the Transformer layers) becomes
projections, views and products whose sizes are ordinary literals of the graph; the insistence of ``nn.MultiheadAttention`` that the
embedding is heads times head dimension is then gone, and so is the need for a module of its own. A class that is kept calls torch's
function, so the node of the heads side by side names the query that it must be as wide as (``AS_WIDE_AS``). Functions that a library
wrapped with ``torch.fx.wrap`` are traced into; where that fails they stay calls.

A product with a weight that is flat but for its first axis contracts the weight as it is (``contract_as_it_is``); the sizes of the
view that made it flat stand on, for a class that is kept reads them (``FLAT``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxprune.passes.ir.nodes import sources, target_name
from fxprune.passes.ir.writes import is_rewritten

AS_WIDE_AS = "as_wide_as"  # in a node's meta: the name of a node whose last axis torch wants as long as its own
FLAT = "flat"  # in a node's meta: the sizes of the view that a contraction does without, and the meta of that


def _width(x: Any) -> int:
    return int((x.node.meta["val"] if hasattr(x, "node") else x).shape[-1])


def _projected(
    query: Any, key: Any, value: Any, same: tuple[bool, bool], weight: Any, separate: tuple[Any, Any, Any], bias: Any, width: int
) -> tuple[Any, Any, Any]:
    """q, k and v by the packed weight (3 * width, width), in one product those that read one tensor, as torch has it bit for bit."""
    if weight is not None and all(same):
        q, k, v = F.linear(query, weight, bias).split([width, width, width], dim=-1)
        return q, k, v
    if weight is not None and same[1]:
        first, second = weight.split([width, 2 * width])
        before, after = bias.split([width, 2 * width]) if bias is not None else (None, None)
        k, v = F.linear(key, second, after).split([width, width], dim=-1)
        return F.linear(query, first, before), k, v
    weights = weight.split([width, width, width]) if weight is not None else separate
    biases = bias.split([width, width, width]) if bias is not None else (None, None, None)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _additive(mask: Any, like: Any) -> Any:
    """A boolean mask (True: leave out) as one to be added."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def attention_forward(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """What ``F.multi_head_attention_forward`` computes; query (L, N, E), key and value (S, N, E), or without N."""
    assert _width(query) == embed_dim_to_check, f"was expecting embedding dimension of {embed_dim_to_check}, but got {_width(query)}"
    batched, given = query.dim() == 3, query
    same = (
        query is key or getattr(query, "node", 0) is getattr(key, "node", 1),
        key is value or getattr(key, "node", 0) is getattr(value, "node", 1),
    )
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    head_dim = embed_dim_to_check // num_heads
    weight = None if use_separate_proj_weight else in_proj_weight
    q, k, v = _projected(query, key, value, same, weight, (q_proj_weight, k_proj_weight, v_proj_weight), in_proj_bias, embed_dim_to_check)
    if static_k is not None or static_v is not None:
        raise NotImplementedError("static keys and values")
    batch = query.shape[1]
    if bias_k is not None:
        k, v = torch.cat([k, bias_k.expand(1, batch, -1)]), torch.cat([v, bias_v.expand(1, batch, -1)])

    def heads(x: Any) -> Any:
        return x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)

    q, k, v = q.unflatten(-1, (num_heads, head_dim)).permute(1, 2, 0, 3), heads(k), heads(v)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _additive(attn_mask, q)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, num_heads))
    grown = int(bias_k is not None) + int(add_zero_attn)
    if mask is not None and grown:
        mask = F.pad(mask, (0, grown))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q)
        padding = (F.pad(padding, (0, grown)) if grown else padding).unsqueeze(1).unsqueeze(1)
        mask = padding if mask is None else mask + padding
    dropout = dropout_p if training else 0.0
    if need_weights:
        scores = (q * math.sqrt(1.0 / head_dim)) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout) if dropout > 0 else weights
        mixed = weights @ v
    else:
        weights = None
        causal = is_causal and mask is None
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    mixed = mixed.permute(2, 0, 1, 3).flatten(2)
    if hasattr(mixed, "node") and hasattr(given, "node"):
        mixed.node.meta[AS_WIDE_AS] = given.node.name
    out = F.linear(mixed, out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    if not batched:
        return out.squeeze(1), None if weights is None else weights.squeeze(0)
    return out, weights


def unrolled_vmap(
    length: Callable[[Any, int], int], func: Callable[..., Any], in_dims: Any, out_dims: Any, *args: Any, **kwargs: Any
) -> Any:
    """What ``torch.vmap(func, in_dims, out_dims)`` computes, call by call; ``length(x, axis)`` says how many there are."""
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
    mapped = [(x, d) for x, d in zip(args, dims, strict=True) if d is not None]
    if not all(isinstance(d, int) and isinstance(x, torch.Tensor) for x, d in mapped):
        raise NotImplementedError("torch.vmap over nested arguments")
    count = [length(x, d) for x, d in mapped][0]
    results = [func(*(x if d is None else x.select(d, i) for x, d in zip(args, dims, strict=True)), **kwargs) for i in range(count)]
    if not isinstance(results[0], tuple):
        return torch.stack(results, out_dims)
    places = out_dims if isinstance(out_dims, tuple) else (out_dims,) * len(results[0])
    return tuple(torch.stack(parts, place) for parts, place in zip(zip(*results, strict=True), places, strict=True))


OPENERS: dict[Any, Callable[..., Any]] = {F.multi_head_attention_forward: attention_forward}


_VIEWS = frozenset({"view", "reshape", "_unsafe_view"})


def contract_as_it_is(graph: fx.Graph) -> None:
    """``(a @ w.view(k, -1)).view(-1, i, 3, 3)``, kernels that are mixed for each sample, becomes the contraction of ``a`` with ``w``.

    Flat, all axes of ``w`` but the first are one, and channels could go along one of them alone. torch computes the same product for both.
    """
    for node in list(graph.nodes):
        weight = _flattened(node)
        if weight is None or not all(_is_viewed(node, user) for user in node.users):
            continue
        (given, flat), product = node.all_input_nodes, node.meta["val"]
        with graph.inserting_before(node):
            made = graph.call_function(torch.tensordot, (given, weight), {"dims": 1})
        shape = (*product.shape[:-1], *weight.meta["val"].shape[1:])
        made.meta = {**node.meta, "val": torch.empty(shape, dtype=product.dtype, device=product.device)}
        made.meta[FLAT] = flat.args[1:], {key: flat.meta[key] for key in ("owner", "where")}
        node.replace_all_uses_with(made)


def _flattened(node: fx.Node) -> fx.Node | None:
    """The weight that ``node`` multiplies something with, of which several axes are one there; None where it does no such thing."""
    operands = node.args
    if target_name(node) not in ("mm", "matmul") or node.kwargs or len(operands) != 2 or not all(isinstance(a, fx.Node) for a in operands):
        return None
    flat: Any = operands[1]
    source: Any = flat.args[0] if flat.args else None
    if operands[0] is flat or target_name(flat) not in (*_VIEWS, "flatten") or not isinstance(source, fx.Node):
        return None
    before, after = source.meta.get("val"), flat.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or after.ndim != 2:
        return None
    if is_rewritten(source):  # what is flat may be a copy from before
        return None
    folded = before.ndim > 2 and before.shape[0] == after.shape[0] and sum(n > 1 for n in before.shape[1:]) > 1
    # Of a tensor that the input enters the sizes are those of the example.
    return source if folded and not any(n.op == "placeholder" for n in sources(flat)) else None


def _is_viewed(node: fx.Node, user: fx.Node) -> bool:
    """Whether ``user`` sees ``node`` in a form of its own, or reads a size that a contraction leaves where it is."""
    if user.args[0] is not node or user.all_input_nodes.count(node) > 1:
        return False
    if target_name(user) == "size":
        # That of every axis is read where code reads one; those that nothing uses do not count.
        return not user.users or (isinstance(user.args[-1], int) and 0 <= user.args[-1] < node.meta["val"].ndim - 1)
    return target_name(user) in _VIEWS and not any(isinstance(a, torch.dtype) for a in (*user.args, *user.kwargs.values()))
