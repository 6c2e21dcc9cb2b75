"""The actual values of nodes that depend on buffers, parameters and literals alone: index tables, masks, positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxprune.passes.aliases import is_rewritten, written

_MADE = frozenset({"arange", "zeros", "ones", "full", "eye", "linspace", "tensor", "as_tensor", "tril_indices", "triu_indices"})


def evaluate(node: fx.Node, named: Callable[[str], torch.Tensor | None], memo: dict[fx.Node, torch.Tensor | None]) -> torch.Tensor | None:
    """The tensor ``node`` stands for, or None where it depends on the inputs or is written into. ``named`` finds that of a ``get_attr``."""
    if node not in memo:
        changes = written(node) is not None or is_rewritten(node)
        memo[node] = None if changes else _evaluate(node, named, memo)
    return memo[node]


def _evaluate(node: fx.Node, named: Callable[[str], torch.Tensor | None], memo: dict[fx.Node, torch.Tensor | None]) -> torch.Tensor | None:
    if node.op == "get_attr":
        return named(str(node.target))
    if node.op not in ("call_function", "call_method") or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    known: dict[fx.Node, Any] = {}
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        known[source] = evaluate(source, named, memo) if isinstance(value, torch.Tensor) else value
        if known[source] is None or source.op == "placeholder":
            return None
    target: Any = node.target
    if not node.all_input_nodes and getattr(target, "__name__", "") not in _MADE:
        return None
    args: Any = map_arg(node.args, known.__getitem__)
    kwargs: Any = {k: v for k, v in dict(map_arg(node.kwargs, known.__getitem__)).items() if k != "device"}
    with torch.no_grad():
        result = getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else None
