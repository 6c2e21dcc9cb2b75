"""What a node of a graph is, by its target: names, and the targets that write or reshape in place."""

from __future__ import annotations

import operator

from torch import fx

from fxprune.passes.ir.traced import TracedModel

AUGMENTED = frozenset(
    {
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
)

# Methods after which the tensor itself has another shape.
RESHAPING = frozenset({"unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_"})

# Operations that give something quite different for inputs that are next to equal: what they choose is compared by what they chose from.
CHOOSING = frozenset(
    {
        *("topk", "sort", "argsort", "msort", "argmax", "argmin", "max", "min", "kthvalue", "median", "mode", "unique", "nonzero"),
        *("gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "greater_equal", "less_equal", "round", "floor", "ceil", "trunc", "sign"),
        *("floor_divide", "floordiv", "searchsorted", "bucketize", "nms", "batched_nms"),
    }
)


def target_name(node: fx.Node) -> str:
    """The name of the method or function that a node calls, empty where it has none."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def op_name(node: fx.Node, traced: TracedModel) -> str:
    """A readable name of what a node does: the module's path and type, or the function's name."""
    if node.op == "call_module":
        return f"{node.target} ({type(traced.skeleton.module(str(node.target))).__name__})"
    name = target_name(node) or str(node.target)
    return name[1:] if node.target in AUGMENTED else name  # ``x += y`` is an addition to its readers
