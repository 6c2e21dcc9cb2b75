"""The actual values of nodes that depend on buffers, parameters and literals alone: index tables, masks, positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxprune.passes.aliases import is_rewritten, written
from fxprune.passes.rules.values import has_tensor

_MADE = frozenset({"arange", "zeros", "ones", "full", "eye", "linspace", "tensor", "as_tensor", "tril_indices", "triu_indices"})


def evaluate(node: fx.Node, named: Callable[[str], torch.Tensor | None], memo: dict[fx.Node, Any]) -> Any:
    """What ``node`` stands for, a tensor or a tuple of them, or None where it depends on the inputs or is written into.

    ``named`` gives the tensor of a ``get_attr``.
    """
    if node not in memo:
        changes = written(node) is not None or is_rewritten(node)
        memo[node] = None if changes else _evaluate(node, named, memo)
    return memo[node]


def _evaluate(node: fx.Node, named: Callable[[str], torch.Tensor | None], memo: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return named(str(node.target))
    if node.op not in ("call_function", "call_method") or not has_tensor(node.meta.get("val")):
        return None
    known: dict[fx.Node, Any] = {}
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        known[source] = evaluate(source, named, memo) if has_tensor(value) else value
        if known[source] is None or source.op == "placeholder":
            return None
    target: Any = node.target
    if not node.all_input_nodes and getattr(target, "__name__", "") not in _MADE:
        return None
    args: Any = map_arg(node.args, known.__getitem__)
    kwargs: Any = {k: v for k, v in dict(map_arg(node.kwargs, known.__getitem__)).items() if k != "device"}
    with torch.no_grad():
        return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


def held(node: fx.Node) -> set[str]:
    """The names of the parameters, buffers and constants that a value is computed from."""
    seen, todo = {node}, [node]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return {str(n.target) for n in seen if n.op == "get_attr"}
