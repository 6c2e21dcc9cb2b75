"""Whether a size is the same for every input: a literal, or a layer's number of channels. What else code branches on is reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.passes.rules.registry import target_name

_VIEWS = frozenset({"view", "reshape"})
_SWAPS = frozenset({"transpose", "swapaxes", "swapdims"})
_LAST = (nn.Linear, nn.Embedding, nn.LSTM, nn.GRU, nn.RNN)


def is_fixed(node: fx.Node, axis: int, module: Callable[[str], nn.Module]) -> bool:
    """Whether the tensor of ``node`` has one size along ``axis`` whatever the input is; False where that is not plain to see."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return False
    axis %= value.ndim
    known: dict[int, bool] = node.meta.setdefault("fixed", {})  # sizes are read of sizes: each is looked at once
    if axis not in known:
        known[axis] = _is_fixed(node, value, axis, module)
    return known[axis]


def _is_fixed(node: fx.Node, value: torch.Tensor, axis: int, module: Callable[[str], nn.Module]) -> bool:
    if node.op == "get_attr" or (node.target is F.linear and axis == value.ndim - 1):
        return True
    if node.op == "call_module":
        layer = module(str(node.target))
        if isinstance(layer, _LAST) and axis == value.ndim - 1:
            return True
        if isinstance(layer, nn.modules.conv._ConvNd) and axis == value.ndim - layer.weight.ndim + 1:
            return True
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None or node.op == "placeholder":
        return False
    name = target_name(node)
    given = _listed(node.args[1:])
    if name in _VIEWS and len(given) == value.ndim:
        return given[axis] != -1 and _is_number(given[axis], module)
    before = source.meta.get("val")
    if not isinstance(before, torch.Tensor):
        return False
    if name == "getitem" and before.ndim == value.ndim:
        return _is_whole(node.args[1], axis, value.ndim) and is_fixed(source, axis, module)
    if name == "permute" and len(given) == value.ndim:
        return is_fixed(source, given[axis], module)
    if name in _SWAPS and len(given) == 2:
        first, second = (a % value.ndim for a in given)
        return is_fixed(source, {first: second, second: first}.get(axis, axis), module)
    return before.shape == value.shape and name not in _VIEWS and is_fixed(source, axis, module)


def _listed(args: tuple[Any, ...]) -> list[Any]:
    return list(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else list(args)


def _is_whole(index: Any, axis: int, ndim: int) -> bool:
    """Whether an index of slices takes all of an axis."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        entries[place : place + 1] = [slice(None)] * (ndim - len(entries) + 1)
    return all(isinstance(e, slice) for e in entries) and (axis >= len(entries) or entries[axis] == slice(None))


def _is_number(size: Any, module: Callable[[str], nn.Module]) -> bool:
    return not isinstance(size, fx.Node) or depends(size, module) is None


def depends(node: fx.Node, module: Callable[[str], nn.Module]) -> fx.Node | None:
    """The read of a size that ``node`` was computed from and that the input decides, or None."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        found = todo.pop()
        if found in seen:
            continue
        seen.add(found)
        if found.op == "call_method" and found.target == "size":
            source, axis = found.args
            if not is_fixed(source, axis, module):  # type: ignore[arg-type]
                return found
            continue
        todo.extend(found.all_input_nodes)
    return None


def loop(node: fx.Node, module: Callable[[str], nn.Module]) -> int | None:
    """How many parts ``node`` gives, a tensor or a tuple of parts of one, where the input decides that; None where it does not."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return None if is_fixed(node, 0, module) else int(value.shape[0])
    name = target_name(node)
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    given = _listed(node.args[1:])
    if source is None or name not in ("unbind", "split"):
        return None
    if name == "split" and (len(node.args) < 2 or isinstance(node.args[1], (tuple, list))):
        return None  # the sizes of the parts are listed
    dim = node.kwargs.get("dim", given[0] if name == "unbind" and given else given[1] if len(given) > 1 else 0)
    return None if is_fixed(source, int(dim), module) else len(value)  # type: ignore[arg-type]
