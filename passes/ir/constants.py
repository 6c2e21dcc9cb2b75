"""The actual values of nodes that depend on buffers, parameters and literals alone: index tables, masks, positions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxprune.passes.ir.factories import DETERMINED
from fxprune.passes.ir.nested import has_tensor
from fxprune.passes.ir.nodes import sources
from fxprune.passes.ir.writes import is_rewritten, memory, sharing, written

_FORM = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride"})


def evaluate(node: fx.Node, named: Callable[[str], torch.Tensor | None], memo: dict[fx.Node, Any]) -> Any:
    """What ``node`` stands for, a tensor or a tuple of them, or None where it depends on the inputs or is written into afterwards.

    ``named`` gives the tensor of a ``get_attr``; ``memo`` what is known, inputs as well where they are to count.
    """
    if node not in memo:
        changes = written(node) is not None or is_rewritten(node)
        memo[node] = _replayed(node, named, memo) if changes else _evaluate(node, named, memo)
    return memo[node]


def _replayed(node: fx.Node, named: Callable[[str], torch.Tensor | None], memo: dict[fx.Node, Any]) -> Any:
    """What ``node`` holds once all that writes into its memory has run, on a copy; None where something writes after it.

    What is written must not depend on a state in between: that of an earlier node of the same memory is not known.
    """
    if memory(node) is None:
        return None
    group = sharing(node)
    if any(written(later) is not None for later in group[group.index(node) + 1 :]):
        return None
    values: dict[fx.Node, Any] = {}
    for one in group[: group.index(node) + 1]:
        if one.op not in ("call_function", "call_method") or "body" in one.meta:
            return None
        known = _known(one, lambda source: values[source] if source in values else evaluate(source, named, memo))
        if known is None:
            return None
        result = _run(one, known)
        if result is None and one.target is not operator.setitem:
            return None
        values[one] = result if values else result.clone()  # it may be a buffer of the model, whatever its copy was called
    return values[node]


def _evaluate(node: fx.Node, named: Callable[[str], torch.Tensor | None], memo: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return named(str(node.target))
    if node.op not in ("call_function", "call_method") or not has_tensor(node.meta.get("val")):
        return None
    known = _known(node, lambda source: evaluate(source, named, memo))
    return None if known is None else _run(node, known)


def _known(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> dict[fx.Node, Any] | None:
    """The values of a node's inputs, or None where one of them is not known."""
    known: dict[fx.Node, Any] = {}
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        known[source] = value_of(source) if has_tensor(value) else value
        if known[source] is None or (source.op == "placeholder" and not has_tensor(value)):
            return None
    return known if known or getattr(node.target, "__name__", "") in DETERMINED else None


def _run(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What the operation gives, or None where it draws random numbers: the next call draws others."""
    target: Any = node.target
    args: Any = map_arg(node.args, known.__getitem__)
    kwargs: Any = {k: v for k, v in dict(map_arg(node.kwargs, known.__getitem__)).items() if k != "device"}
    before = torch.get_rng_state()
    with torch.no_grad():
        found = getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
    if torch.equal(before, torch.get_rng_state()):
        return found
    torch.set_rng_state(before)
    return None


def held(node: fx.Node) -> set[str]:
    """The names of the parameters, buffers and constants that a value is computed from. Who asks one for its form reads no value of it."""
    return {str(n.target) for n in sources(node, lambda n: not _is_form(n)) if n.op == "get_attr"}


def _is_form(node: fx.Node) -> bool:
    """Whether it asks a tensor for a size, a dtype or a device."""
    return (node.target is getattr or (node.op == "call_method" and node.target in _FORM)) and not has_tensor(node.meta.get("val"))
