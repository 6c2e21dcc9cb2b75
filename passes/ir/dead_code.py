"""Dead code: nodes whose result nothing uses and that write nowhere, and empty tensors that are joined to others."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxprune.passes.ir.nodes import AUGMENTED
from fxprune.passes.ir.writes import changes_container, written


def impure(node: fx.Node) -> bool:
    """Whether a node must stay though nothing uses its result: it writes into a tensor or a list, checks something, or is an edge."""
    if node.op in ("placeholder", "output", "call_module") or changes_container(node):
        return True
    return written(node) is not None or getattr(node.target, "__name__", "") in ("_assert", "_assert_async")


def eliminate(graph: fx.Graph) -> bool:
    """Remove nodes nothing uses. In-place writes stay; those on plain numbers (``n += 1``) do not count as writes."""
    changed = _drop_empty_parts(graph)
    for node in reversed(list(graph.nodes)):
        if node.users:
            continue
        if impure(node) and not (node.target in AUGMENTED and not isinstance(node.args[0].meta.get("val"), (torch.Tensor, list, dict))):
            continue
        graph.erase_node(node)
        changed = True
    return changed


def _drop_empty_parts(graph: fx.Graph) -> bool:
    """``cat([q[:, :0], r])`` is ``r``: a slice that is empty whatever the input is carries no channel that could be followed."""
    changed = False
    for node in graph.nodes:
        parts = node.args[0] if node.args and node.target is torch.cat else None
        if not isinstance(parts, (list, tuple)):
            continue
        left = [p for p in parts if not _always_empty(p)]
        if left and len(left) < len(parts) and len({_dtype(p) for p in parts}) == 1:
            node.args = (left, *node.args[1:])
            changed = True
    return changed


def _always_empty(part: Any) -> bool:
    if not isinstance(part, fx.Node) or part.target is not operator.getitem:
        return False
    index = part.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    return any(isinstance(e, slice) and isinstance(e.stop, int) and (e.stop == 0 or e.stop == e.start) for e in entries)


def _dtype(part: Any) -> Any:
    value = part.meta.get("val") if isinstance(part, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
