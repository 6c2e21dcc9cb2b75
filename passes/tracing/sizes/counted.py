"""Rows that a mask picks, and positions of what is not zero: how many there are, only values say.

Mixtures of experts hand each expert the tokens that chose it. On the meta device such a result has as many rows as there can be, and its
other axes are what they are, so that a graph through it holds. Code that asks for the number of rows is refused.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxprune.passes.ir.masks import as_positions, is_mask, most_rows
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.tracing.sizes.axis_origin import arguments, number
from fxprune.passes.tracing.sizes.fixed_sizes import Modules, from_inputs_on, is_fixed

_POSITIONS = frozenset({"nonzero", "argwhere", "where", "masked_select"})
_PARTS = frozenset({"unbind", "split", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split"})
# The result is as large as the first argument.
_INTO = frozenset({"index_add", "index_copy", "index_reduce", "index_fill", "index_put", "scatter", "scatter_add", "scatter_reduce"})


def picked(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int] | None:
    """What a call on meta tensors gives whose number of rows depends on values, and that number; None for any other call."""
    name = target_name(node)
    if node.target is operator.getitem:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        masks = [entry for entry in index if is_mask(entry)] if isinstance(args[0], torch.Tensor) else []
        positions = (one for entry in index for one in (as_positions(entry) if is_mask(entry) else [entry]))
        return (args[0][tuple(positions)], most_rows(masks[0].shape)) if masks else None
    if name not in _POSITIONS:
        return None
    given, *rest = *args, *(v for k, v in kwargs.items() if k != "as_tuple")
    if not isinstance(given, torch.Tensor):
        return None
    if name == "masked_select":
        rows = most_rows(torch.broadcast_shapes(given.shape, rest[0].shape))
        return given.new_empty(rows), rows
    if name == "where" and rest:
        return None
    rows = most_rows(given.shape)
    found = given.new_empty((rows, given.ndim), dtype=torch.int64)
    return (tuple(found.unbind(1)) if name == "where" or kwargs.get("as_tuple") else found), rows


def mark(node: fx.Node, rows: int) -> None:
    """Remember that values decide how many ``rows`` the result of ``node`` has."""
    node.meta["rows"] = rows
    if isinstance(node.meta["val"], torch.Tensor):
        node.meta["fixed"] = (False,) * node.meta["val"].ndim


def by_values(node: fx.Node, module: Modules) -> bool:
    """Whether a number depends on how many rows were picked somewhere."""
    return _counted(node, module) is None


def sized(node: fx.Node, module: Modules) -> bool:
    """Whether values say how long an axis of a tensor is, as that of the tokens that chose an expert."""
    return _counted(node, module) not in (None, frozenset())


def in_parts_by_values(node: fx.Node, module: Modules) -> bool:
    """Whether values say how many parts ``node`` gives, a tensor that is looped over or a tuple of parts of one."""
    if isinstance(node.meta["val"], torch.Tensor):
        return 0 in (_counted(node, module) or ())
    if target_name(node) not in _PARTS:
        return False
    (dim,) = arguments(node.args[1 if target_name(node) == "unbind" else 2 :], node, dim=0)
    source: Any = node.args[0]
    return number(dim) % source.meta["val"].ndim in (_counted(source, module) or ())


def _counted(node: fx.Node, module: Modules) -> frozenset[int] | None:
    """The axes of a tensor whose sizes may depend on values; None for a number that may, and no axes for one that does not."""
    known: frozenset[int] | None = from_inputs_on(node, "counted", lambda found: _counted_axes(found, module))
    return known


def _counted_axes(node: fx.Node, module: Modules) -> frozenset[int] | None:
    value, first = node.meta.get("val"), node.args[0] if node.args else None
    sources = [n for n in node.all_input_nodes if n.meta["counted"] != frozenset()]
    if (not sources and "rows" not in node.meta) or isinstance(value, (torch.device, torch.dtype, str)):
        return frozenset()
    if node.op == "call_method" and node.target == "size":
        return None if node.args[1] in sources[0].meta["counted"] else frozenset()
    if not isinstance(value, torch.Tensor):
        return None
    name = target_name(node)
    if (name.endswith("_") or name in _INTO) and isinstance(first, fx.Node) and isinstance(first.meta["val"], torch.Tensor):
        known: frozenset[int] | None = first.meta["counted"]
        return known
    # Every axis may, but for those that are one size whatever the input is, and those that are as long as one on which values have no say.
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    sizes = [(n.meta["val"].shape[a], a in n.meta["counted"]) for n in tensors for a in range(n.meta["val"].ndim)]
    rows = {size for size, counted in sizes if counted} | {node.meta.get("rows")}
    plain = {size for size, _ in sizes} - rows
    return frozenset(a for a in range(value.ndim) if value.shape[a] not in plain and not is_fixed(node, a, module))
