"""The counting run behind ``fxprune.costs.profiling``: one forward pass under a dispatch mode that sees every operation."""

from __future__ import annotations

import inspect
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from fxprune.evaluation.running import call, evaluating
from fxprune.passes.compat import TorchDispatchMode, tree_leaves

_aten = torch.ops.aten


@dataclass
class Counts:
    """``macs``: module name -> multiply-accumulates; ``peak_bytes``: most bytes of activations alive at once."""

    macs: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0


def count(model: nn.Module, inputs: Any) -> Counts:
    """Run ``model``, a copy that is thrown away, once on ``inputs`` in evaluation mode, and count."""
    running = [""]
    for name, module in model.named_modules():
        _announce(module, name, running)
        if isinstance(module, fx.GraphModule) and type(module.graph._codegen) is CodeGen:
            _run_by_node(module, name, running)
    mode = _CountingMode(model, inputs, running)
    with evaluating(model), _plain_kernels(), mode:
        call(model, inputs)
    return mode.counts


class _CountingMode(TorchDispatchMode):
    """``running``: the names of the modules that are being called, innermost last."""

    def __init__(self, model: nn.Module, inputs: Any, running: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self.running = running
        from torch.utils.flop_counter import FlopCounterMode  # imports triton, which takes a tenth of the time that torch does

        self.formulas: dict[Any, Callable[..., int]] = FlopCounterMode(display=False).flop_registry
        self.owners: dict[int, list[str]] = {}  # storage -> the modules that hold it as a parameter
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(id(parameter.untyped_storage()), []).append(name)
        # What was there before the first operation; held on to, so that no other storage can take the same id.
        held = [*model.parameters(), *model.buffers(), *(t for t in tree_leaves(inputs) if isinstance(t, Tensor))]
        self.held = [tensor.untyped_storage() for tensor in held]
        self.known = {id(storage) for storage in self.held}
        self.live_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in self.formulas and packet not in _MORE_MACS and torch.is_inference_mode_enabled():
            with self:  # only in inference mode do composite operations come here whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if packet in self.formulas:
            self.counts.macs[self._owner(args)] += self.formulas[packet](*args, **kwargs, out_val=out) // 2
        elif packet in _MORE_MACS:
            self.counts.macs[self._owner(args)] += _MORE_MACS[packet](*args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return out

    def _owner(self, args: Any) -> str:
        for tensor in tree_leaves(args):
            owners = self.owners.get(id(tensor.untyped_storage())) if isinstance(tensor, Tensor) else None
            if owners:
                return self.running[-1] if self.running[-1] in owners else owners[0]
        return self.running[-1]

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live_bytes += size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live_bytes -= size


# What torch has no formula for: products with vectors, and the recurrent layers that oneDNN and cuDNN run whole on real tensors.
# The arguments are those of the operation.
_MORE_MACS: dict[Any, Callable[..., int]] = {
    _aten.mv: lambda matrix, vector: matrix.numel(),
    _aten.addmv: lambda bias, matrix, vector: matrix.numel(),
    _aten.dot: lambda left, right: left.numel(),
    _aten.addbmm: lambda bias, left, right: left.numel() * right.shape[-1],
    _aten.mkldnn_rnn_layer: lambda x, w_input, w_hidden, *_: x.shape[:-1].numel() * (w_input.numel() + w_hidden.numel()),
    _aten._cudnn_rnn: lambda x, weights, *_: x.shape[:-1].numel() * sum(w.numel() for w in weights if w.ndim == 2),
    _aten._trilinear: lambda a, b, c, *axes: math.prod(max(sizes) for sizes in _trilinear_sizes((a, b, c), axes)) * 2,
}

if hasattr(_aten, "_grouped_mm"):  # each row meets the matrix of its group alone
    _MORE_MACS[_aten._grouped_mm] = lambda a, b, *_: b.numel() * a.shape[1] if a.ndim > b.ndim else a.numel() * b.shape[-1]


def _trilinear_sizes(factors: tuple[Tensor, ...], axes: tuple[Any, ...]) -> Iterator[tuple[int, ...]]:
    """nn.Bilinear's product, every size of its index space: each factor is expanded along axes of its own."""
    expanded = []
    for factor, new in zip(factors, axes, strict=False):
        for axis in sorted(new):
            factor = factor.unsqueeze(axis)
        expanded.append(factor.shape)
    return zip(*expanded, strict=True)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """nn.MultiheadAttention spelt out in operations that have a formula, rather than fused in one that has none."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _announce(module: nn.Module, name: str, running: list[str]) -> None:
    def enter(*_: Any) -> None:
        running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def _run_by_node(module: fx.GraphModule, name: str, running: list[str]) -> None:
    """Have the graph interpreted, so that what a function computes is known to belong to the module it was traced in."""
    signature = inspect.signature(module.forward)
    interpreter = _ByNode(module, name, running)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return interpreter.run(*bound.args, *bound.kwargs.values())

    module.forward = forward


class _ByNode(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, name: str, running: list[str]) -> None:
        super().__init__(module)
        self.prefix, self.running = name, running

    def run_node(self, n: fx.Node) -> Any:
        stack: dict[str, Any] = n.meta.get("nn_module_stack") or {"": ("", None)}
        path = list(stack.values())[-1][0]  # a pair of qualified name and class
        self.running.append(".".join(part for part in (self.prefix, path) if part))
        try:
            return super().run_node(n)
        finally:
            self.running.pop()
