"""One traced operation run on the meta device: what it gives on the example inputs, without the weights or the work."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import torch
from torch import fx
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from fxprune.passes import shapes
from fxprune.passes.patching import FACTORIES, RANDOM_FACTORIES
from fxprune.passes.rules.values import packed
from fxprune.passes.skeleton import Skeleton

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
    if getattr(target, "__name__", "") in FACTORIES + RANDOM_FACTORIES and getattr(torch, target.__name__, None) is not None:
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


def run_for_real(node: fx.Node, args: Any, kwargs: Any, skeleton: Skeleton) -> Any:
    """Run a call on tensors of ones, on a copy of the user's module: for code that reads values or has no kernel without them."""

    def ones(value: Any) -> Any:
        return torch.ones(value.shape, dtype=value.dtype) if _isinstance(value, torch.Tensor) else value

    args, kwargs = tree_map(ones, (args, kwargs))
    if node.op == "call_module":
        module = copy.deepcopy(skeleton.original_module(str(node.target))).eval()
        return to_meta(module.forward(*args, **kwargs))
    if node.op == "call_method":
        return to_meta(getattr(args[0], str(node.target))(*args[1:], **kwargs))
    target: Any = node.target
    return to_meta(target(*args, **kwargs))
