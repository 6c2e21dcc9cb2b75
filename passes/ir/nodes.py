"""What a node of a graph is, by its target: names, and the targets that write or reshape in place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
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


def sources(node: fx.Node, through: Callable[[fx.Node], bool] | None = None) -> Iterator[fx.Node]:
    """The node and all that it is computed from, the nearest first; with ``through``, only by way of those for which it holds."""
    seen, todo = {node}, [node]
    for one in todo:  # it grows
        yield one
        new = [n for n in one.all_input_nodes if n not in seen and (through is None or through(n))]
        seen.update(new)
        todo += new


def is_no_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), torch.Tensor)


def computed_from(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    return set(sources(node))


READING = (int, float, "item")  # what takes the number out of a tensor of one
_COMPARING = frozenset({"allclose", "equal", "is_nonzero"})  # which give no tensor, but an answer


def _compares(node: fx.Node) -> bool:
    return target_name(node) in _COMPARING and (node.op == "call_method" or getattr(torch, str(target_name(node))) is node.target)


CHANGING = "changing"  # in the meta of a buffer that forward writes and code reads: the next call finds another value


def changes(node: fx.Node) -> bool:
    """Whether a node has other values at another call: it is an input, or a buffer that is known to change."""
    return node.op == "placeholder" or CHANGING in node.meta


def is_read(node: fx.Node) -> bool:
    """Whether a number is the value of a tensor that is computed from the inputs (``int(lengths.max())``), or
    from a buffer that changes."""
    source = node.args[0] if node.args and (node.target in READING or _compares(node)) else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return False
    return any(changes(n) for one in node.all_input_nodes for n in computed_from(one))


def reads(node: fx.Node) -> bool:
    """Whether a number is made of one that ``is_read``; the sizes of tensors are sizes, whatever they were made of."""
    return any(map(is_read, sources(node, is_no_tensor)))


def leads_to(node: fx.Node, found: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool]) -> bool:
    """Whether a node that is ``found`` reads what ``node`` gives, or what those make of it that the walk goes ``through``."""
    seen, todo = {node}, [node]
    while todo:
        new = [user for user in todo.pop().users if user not in seen]
        if any(found(user) for user in new):
            return True
        seen.update(new)
        todo += [user for user in new if through(user)]
    return False


_ARITHMETIC = frozenset(
    {
        *("add", "sub", "mul", "div", "truediv", "true_divide", "pow", "neg", "abs", "sign", "rsub", "multiply", "subtract", "divide"),
        *("eq", "ne", "gt", "lt", "ge", "le", "minimum", "maximum", "clamp", "clamp_min", "clamp_max", "where", "masked_fill", "addcmul"),
        *("iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_", "square", "lerp"),
    }
)
_MOVES = frozenset(
    {
        *("view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "permute", "transpose", "t", "flatten", "unflatten"),
        *("contiguous", "clone", "detach", "repeat", "movedim", "roll", "flip"),
        *("to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long"),
    }
)


def is_computed_with(node: fx.Node) -> bool:
    """Whether all that becomes of an integer tensor are numbers that others are multiplied with, added to or compared to, by the traced
    values: nothing picks by them."""
    todo, seen = [node], {node}
    found = False
    while todo:
        given = todo.pop()
        for user in given.users:
            name = target_name(user)
            if user.op == "output" or user.target is getattr or user.op == "call_method" and name == "size":
                if user.op == "output":
                    return False
                continue
            picked = name == "getitem" and user.args[0] is given and user.args[1] is not given
            if not picked and name not in _ARITHMETIC and name not in _MOVES:
                return False
            dtype = getattr(user.meta.get("val"), "dtype", None)
            if dtype is None:
                return False
            if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
                found = True
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return found
