"""One traced operation run on the meta device: what it gives on the example inputs, without the weights or the work."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg
from torch.nn.utils.rnn import PackedSequence

from fxprune.evaluation.copying import copied
from fxprune.passes.compat import OpOverload, tree_map
from fxprune.passes.ir.factories import FACTORIES, RANDOM_FACTORIES, takes_no_device
from fxprune.passes.ir.nested import packed
from fxprune.passes.ir.skeleton import Skeleton
from fxprune.passes.tracing import shapes

_isinstance = builtins.isinstance  # the real one: it is patched while tracing


def execute(node: fx.Node, args: Any, kwargs: Any, skeleton: Skeleton) -> Any:
    target: Any = node.target
    if node.op == "call_module":
        module = skeleton.module(target)
        found: Any = None if kwargs else _quickly(module, args)
        return module.forward(*args, **kwargs) if found is None else found
    if target is PackedSequence:
        return packed(*args)
    quick = shapes.quick_function(target, args, kwargs)
    if quick is not None:
        return quick
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs = {**kwargs, "device": "meta"}
    if node.op == "call_method":
        if target in ("cpu", "cuda"):
            return args[0]
        if target == "to":
            args = tuple("meta" if _is_device(a) else a for a in args)
        return getattr(args[0], target)(*args[1:], **kwargs)
    name = getattr(target, "__name__", "")
    made = name in FACTORIES + RANDOM_FACTORIES and getattr(torch, name, None) is not None
    if made and not takes_no_device(name, (*args, *kwargs.values())):
        kwargs = {**kwargs, "device": "meta"}
    return target(*args, **kwargs)


def _quickly(module: Any, args: Any) -> Any:
    found = shapes.quick(module, args)
    return shapes.recurrent(module, args) if found is None else found


def _is_device(a: Any) -> bool:
    return _isinstance(a, torch.device) or _isinstance(a, str)


def to_meta(value: Any) -> Any:
    if _isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if _isinstance(value, dict):
        return {k: to_meta(v) for k, v in value.items()}
    if _isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_meta(v) for v in value))
    if _isinstance(value, (tuple, list)):
        return type(value)(to_meta(v) for v in value)
    return value


def hides_structure(node: fx.Node, opaque: set[str], skeleton: Skeleton) -> bool:
    """A submodule kept whole, or a function of the user's: either may read values, or have no kernel without them."""
    if node.op == "call_module":
        return node.target in opaque or not type(skeleton.module(str(node.target))).__module__.startswith("torch.nn")
    home = getattr(node.target, "__module__", None) or "torch"
    return _isinstance(node.target, OpOverload) or not home.startswith(("torch", "_operator", "builtins", "math"))


def with_numbers(node: fx.Node, actual: Callable[[fx.Node], Any], skeleton: Skeleton) -> Any:
    """A call that reads a tensor of one element as a number (``full(size, tensor)``), run on those that ``actual`` knows; None else."""
    known = {n: actual(n) for n in node.all_input_nodes if _isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].numel() == 1}
    known = {n: v for n, v in known.items() if v is not None}
    if not known:
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: known.get(n, n.meta["val"]))
    try:
        return to_meta(execute(node, args, kwargs, skeleton))
    except (RuntimeError, TypeError, ValueError):
        return None


def run_for_real(node: fx.Node, args: Any, kwargs: Any, skeleton: Skeleton) -> Any:
    """Run a call on tensors of ones, on a copy of the user's module: for code that reads values or has no kernel without them."""

    def ones(value: Any) -> Any:
        if _isinstance(value, torch.Tensor):
            return torch.ones(value.shape, dtype=value.dtype)
        if type(value) is tuple or _isinstance(value, immutable_list):
            return (tuple if type(value) is tuple else list)(ones(v) for v in value)
        if _isinstance(value, immutable_dict):  # code may change a list or a dict that it is given, which the graph's own refuse
            return {k: ones(v) for k, v in value.items()}
        return value

    args, kwargs = tree_map(ones, ones(args)), tree_map(ones, ones(kwargs))
    if node.op == "call_module":
        module = copied(skeleton.original_module(str(node.target))).eval()
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):  # a model without values: any will do for shapes
            module.to_empty(device="cpu")
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data.zero_()
        return to_meta(module.forward(*args, **kwargs))
    if node.op == "call_method":
        return to_meta(getattr(args[0], str(node.target))(*args[1:], **kwargs))
    target: Any = node.target
    return to_meta(target(*args, **kwargs))
