"""Choices among channels (a router's top-k): who chooses, and what becomes of the positions of what was chosen.

The numbers in a tensor of such positions name channels. When channels go the graph computes other numbers, so whatever reads them has to
go with the channels, or the channels stay: an operation that is not known to follow pins them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxprune.passes.ir.nodes import target_name
from fxprune.passes.labels.values import Value, Vector, values

BOTH = frozenset({"plain", "exact"})

# Operations that give the numbers of their first operand in another form or place; of a sort the first result holds them.
_PASSING = frozenset(
    {
        *("view", "reshape", "_unsafe_view", "flatten", "ravel", "unsqueeze", "squeeze", "transpose", "permute", "t", "movedim"),
        *("expand", "expand_as", "view_as", "reshape_as", "repeat", "repeat_interleave", "clone", "contiguous", "detach", "to", "long"),
        *("int", "float", "double", "type_as", "unbind", "chunk", "split", "select", "narrow", "index_select", "flip", "getattr", "sort"),
        *("getitem", "__getitem__"),
    }
)
# Operations that read the form of an operand alone: of every one, or of all but the first.
_OF_FORM = frozenset({"size", "numel", "nelement", "dim", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones"})
_FORM_OF_OTHERS = frozenset({"expand_as", "view_as", "reshape_as", "type_as", "to"})
JOINING = frozenset({"cat", "concat", "concatenate", "stack"})  # positions of several choices, side by side
_WHOLE = frozenset({torch.int32, torch.int64, torch.float32, torch.float64})  # that hold every position


@dataclass(frozen=True, eq=False)
class Choice:
    """``node`` of the graph ``mode`` chooses ``count`` of the channels along ``axis`` of its first input, whose labels are ``vector``.

    ``count`` 0: no choice, but a softmax, of which channels that count as minus infinity get no share. ``norms``: those for which the
    oracle masks what went there.
    """

    mode: str
    node: fx.Node
    axis: int
    vector: Vector
    count: int
    norms: frozenset[str] = BOTH


@dataclass(frozen=True, eq=False)
class Gate:
    """``node`` of the graph ``mode`` reads what one channel, ``label``, is alone: a router's share for one expert."""

    mode: str
    node: fx.Node
    label: int


@dataclass(frozen=True, eq=False)
class Sum:
    """``node`` of the graph ``mode`` adds, or stacks, tensors of which the one at ``place`` is left out where all of ``labels`` go.

    ``place`` -1: it writes into its first operand, and nothing where they go.
    """

    mode: str
    node: fx.Node
    place: int
    labels: frozenset[int]


def carried(node: fx.Node, first: Any, result: Any) -> Any:
    """``result``, which holds positions where ``node`` hands on those of ``first``, its first operand."""
    if target_name(node) in JOINING and isinstance(result, Value) and isinstance(first, (list, tuple)):
        picks = [v.picks for v in first if isinstance(v, Value)]
        return replace(result, picks=picks[0]) if all(p is not None for p in picks) else result
    if not isinstance(first, Value) or first.picks is None or not _passes(node):
        return result
    if target_name(node) == "sort":
        return (replace(result[0], picks=first.picks), *result[1:])
    if isinstance(result, Value):
        return replace(result, picks=first.picks)
    return tuple(replace(v, picks=first.picks) for v in result) if isinstance(result, tuple) else result


def _passes(node: fx.Node) -> bool:
    made = [v for v in _tensors(node.meta.get("val")) if v.dtype not in _WHOLE]
    return target_name(node) in _PASSING and not (made and target_name(node) != "sort")


def _tensors(meta: Any) -> list[torch.Tensor]:
    return [meta] if isinstance(meta, torch.Tensor) else [t for t in meta if isinstance(t, torch.Tensor)] if isinstance(meta, tuple) else []


def left_behind(node: fx.Node, first: Any, inputs: list[Value], result: Any) -> list[Value]:
    """The operands with positions that ``node`` neither hands on nor reads the form of."""
    name = target_name(node)
    if name in _OF_FORM or (node.target is getattr and not values(result)):
        return []
    return [
        v for v in inputs if v.picks is not None and not (v is first and _passes(node)) and not (v is not first and name in _FORM_OF_OTHERS)
    ]
