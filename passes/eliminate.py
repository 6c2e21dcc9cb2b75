"""Dead code: nodes whose result nothing uses and that write nowhere."""

from __future__ import annotations

import operator

import torch
from torch import fx

INPLACE = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
}


def impure(node: fx.Node) -> bool:
    """Whether a node must stay though nothing uses its result: it writes into a tensor, checks something, or is an edge."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_module":
        return True
    name = getattr(node.target, "__name__", "")
    if node.target is operator.setitem or name in ("_assert", "_assert_async") or node.kwargs.get("out") is not None:
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    return node.kwargs.get("inplace") is True or (node.target in INPLACE and bool(node.args) and isinstance(node.args[0], fx.Node))


def eliminate(graph: fx.Graph) -> bool:
    """Remove nodes nothing uses. In-place writes stay; those on plain numbers (``n += 1``) do not count as writes."""
    changed = False
    for node in reversed(list(graph.nodes)):
        if node.users:
            continue
        if impure(node) and not (node.target in INPLACE and not isinstance(node.args[0].meta.get("val"), torch.Tensor)):
            continue
        graph.erase_node(node)
        changed = True
    return changed
