"""Writes in place: which tensor a node writes into, and which other nodes hold the same memory."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.passes.ir.nodes import AUGMENTED, target_name

_written: WeakKeyDictionary[fx.Graph, tuple[int, frozenset[int | None]]] = WeakKeyDictionary()


def written(node: fx.Node, module: Callable[[str], nn.Module] | None = None) -> fx.Node | None:
    """The node whose tensor ``node`` writes into, or None. ``module`` finds the modules that are called, which may work in place."""
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.op == "call_module":
        return first if module is not None and getattr(module(str(node.target)), "inplace", False) is True else None
    if node.op not in ("call_function", "call_method"):
        return None
    if "body" in node.meta:
        return _written_within(node)
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    if node.target is operator.setitem or node.target in AUGMENTED or node.kwargs.get("inplace") is True:
        return first
    name = target_name(node)
    return first if name.endswith("_") and not name.endswith("__") else None


_CHANGING = frozenset(
    {"append", "extend", "insert", "remove", "reverse", "sort", "clear", "pop", "popitem", "update", "setdefault", "__setitem__"}
)
_ITEMS = frozenset({operator.setitem, operator.delitem})


def changes_container(node: fx.Node) -> bool:
    """Whether a node changes a list or a dictionary that ``forward`` was given, or that a call gave."""
    if not node.args or not isinstance(node.args[0], fx.Node) or not isinstance(node.args[0].meta.get("val"), (list, dict)):
        return False
    return node.target in _CHANGING if node.op == "call_method" else node.target in _ITEMS or node.target in AUGMENTED


def _written_within(call: fx.Node) -> fx.Node | None:
    """The argument that the code of a call, which was traced aside, writes into."""
    nodes = call.meta["body"].nodes
    targets = {memory(target) for target in map(written, nodes) if target is not None} - {None}
    given: list[fx.Node] = []
    map_arg(call.args, given.append)
    inputs = [n for n in nodes if n.op == "placeholder"]
    return next((arg for arg, inner in zip(given, inputs, strict=True) if memory(inner) in targets), None)


def memory(node: fx.Node) -> int | None:
    """What tells one tensor's memory from another's: equal for a tensor and its views, None for what is no tensor."""
    value: Any = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def is_rewritten(node: fx.Node) -> bool:
    """Whether anything in the graph of ``node`` writes into its tensor, or into one that shares its memory."""
    graph = node.graph
    count, found = _written.get(graph, (-1, frozenset()))
    if count != len(graph.nodes):
        found = frozenset(memory(target) for target in map(written, graph.nodes) if target is not None)
        _written[graph] = (len(graph.nodes), found)
    own = memory(node)
    return own is not None and own in found


def sharing(node: fx.Node) -> list[fx.Node]:
    """The nodes that hold the memory of ``node``'s tensor, or write into it, in their order."""
    own = memory(node)
    targets = ((one, written(one)) for one in node.graph.nodes)
    return [one for one, target in targets if one is node or own in (memory(one), None if target is None else memory(target))]


def is_rewritten_later(node: fx.Node, module: Callable[[str], nn.Module]) -> bool:
    """Whether something after ``node`` writes into its tensor, or into one that shares its memory: a copy would miss it, or it the copy."""
    mine, later = memory(node), node.next
    while later.op != "root":
        target = written(later, module)
        if target is not None and memory(target) == mine:
            return True
        later = later.next
    return False
