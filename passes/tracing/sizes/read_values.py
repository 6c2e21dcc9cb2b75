"""Numbers that code reads from tensors of which a trace knows the form alone (``loss.item()``): the graph reads them at each call.

Such a number has two made-up values here. What is computed with it has to have one form under both, or it cannot be traced; whole numbers
and conditions may index, so that they enter arithmetic alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxprune.errors import TraceError
from fxprune.passes.ir.nodes import READING, target_name
from fxprune.passes.ir.writes import changes_container
from fxprune.passes.tracing.checks import OF_VALUES

OTHER = "other"  # in the meta of what is made of such numbers: its value under the second ones
TEXT = "nan"  # what a trace prints for one
_MADE_UP = {bool: (True, False), int: (3, 5), float: (0.375, 2.625)}
_ARITHMETIC = frozenset(
    {
        *("add", "sub", "mul", "div", "truediv", "pow", "neg", "abs", "eq", "ne", "gt", "lt", "ge", "le", "rsub", "multiply", "divide"),
        *("subtract", "true_divide", "iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_", "full", "full_like", "fill_"),
        *("new_full", "tensor", "as_tensor", "new_tensor", "masked_fill", "masked_fill_", "minimum", "maximum", "radd", "rmul", "rtruediv"),
    }
)


def number(node: fx.Node, known: torch.Tensor | None) -> Any:
    """What ``node`` reads from a tensor: from its values on the example, where these are ``known``."""
    source = node.all_input_nodes[0].meta["val"]
    reading = node.target in READING
    if known is not None and reading:
        return node.target(known) if callable(node.target) else known.item()
    if node.target in (int, float):
        kind: type = node.target
    else:
        kind = bool if not reading or source.dtype == torch.bool else float if source.is_floating_point() else int
    if reading and source.numel() != 1:
        raise TraceError(f"{node.meta['where']}: a tensor of {source.numel()} elements is read as one number")
    found, node.meta[OTHER] = _MADE_UP[kind]
    return found


def among(node: fx.Node) -> bool:
    """Whether such a number is among what ``node`` is computed of."""
    return any(OTHER in n.meta for n in node.all_input_nodes)


def computed(node: fx.Node, execute: Callable[[Any, Any], Any]) -> Any:
    """What ``node`` computes of such numbers. It is as large whatever they are, or cannot be traced."""
    refused = TraceError(f"{node.meta['where']}: {target_name(node)} {OF_VALUES}")
    try:
        found = execute(*map_arg((node.args, node.kwargs), lambda n: n.meta["val"]))
    except (TypeError, AttributeError):  # whatever the number is
        raise
    except Exception as error:  # a number that was not made up might fit
        raise refused from error
    whole = any(isinstance(n.meta["val"], int) for n in node.all_input_nodes if OTHER in n.meta)
    if whole and _has_tensor(found) and target_name(node) not in _ARITHMETIC:
        raise refused
    other = found
    if not changes_container(node) and node.target is not operator.setitem:
        try:
            other = execute(*map_arg((node.args, node.kwargs), lambda n: n.meta.get(OTHER, n.meta["val"])))
        except Exception:  # noqa: BLE001 - a probability is below one
            other = found
    if not _alike(found, other):
        raise refused
    if not isinstance(found, torch.Tensor):
        node.meta[OTHER] = other
    return found


def _has_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (tuple, list)) and any(map(_has_tensor, value)))


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and (one.shape, one.dtype) == (other.shape, other.dtype)
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return True
