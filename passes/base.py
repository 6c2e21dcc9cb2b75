"""What every pass keeps: it never edits its input, says truly whether it changed anything, and leaves a graph that lints.

Passes are ``torch.fx.passes`` passes and run under its ``PassManager``. The base class keeps the contract, so a pass is only ``run``.
(The idea of a base class that owns the contract is that of onnx/ir-py's pass infrastructure; ours checks purity as well.)
"""

from __future__ import annotations

import abc
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from fxprune.errors import FxPruneError, InputError, kind_of

Observer = Callable[[str, Any, float], None]
"""``observe(step, result, seconds)``: the name of a step that has run, what it gave, and how long it took."""


class GraphPass(PassBase):
    """One step from graph module to graph module. ``seconds`` is how long its last run took."""

    seconds = 0.0

    @property
    def name(self) -> str:
        """What an observer is told; the name of the class."""
        return type(self).__name__

    @abc.abstractmethod
    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        """Return ``module`` itself where there is nothing to do, else a new module; never edit ``module``."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        before = _Fingerprint(graph_module)
        start = time.perf_counter()
        result = self.run(graph_module)
        self.seconds = time.perf_counter() - start
        if edited := before.edited():
            raise AssertionError(f"{self.name} edited its input: {edited}")
        if not isinstance(result, fx.GraphModule):
            raise InputError(f"pass {self.name} returned {kind_of(result)}; a pass returns a torch.fx.GraphModule")
        if result is not graph_module:
            with warnings.catch_warnings():  # older versions of torch wonder about tensors that are plain attributes, as they were
                warnings.filterwarnings("ignore", ".*does not reference an nn.Module, nn.Parameter, or buffer", UserWarning)
                result.graph.lint()
        return PassResult(result, result is not graph_module)


class UserPass(GraphPass):
    """A pass of the user's: a function from graph module to graph module, or any ``PassBase``, which may work on what it is given.

    It gets a copy, so that it may edit it in place as passes of ``torch.fx`` do.
    """

    def __init__(self, function: Any) -> None:
        if not callable(function):
            raise InputError(f"passes= takes functions from graph module to graph module, or PassBase objects; not {function!r}")
        self.function = function

    @property
    def name(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        twin = copy.deepcopy(module)
        found = self.function(twin)
        if isinstance(found, PassResult):
            found = found.graph_module
        made: fx.GraphModule = twin if found is None else found  # a function that edits in place may return nothing
        if isinstance(made, fx.GraphModule):
            made.recompile()
        return made


class _Fingerprint:
    """What a graph module holds: its nodes with all they name, and its tensors with their values."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes, self.tensors = self._nodes(), self._tensors()

    def _nodes(self) -> list[tuple[Any, ...]]:
        return [(node, node.op, node.target, node.args, node.kwargs) for node in self.module.graph.nodes]

    def _tensors(self) -> dict[str, tuple[Any, ...]]:
        named = [*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers(remove_duplicate=False)]
        return {name: (id(tensor), None if tensor.is_inference() else tensor._version, _sum(tensor)) for name, tensor in named}

    def edited(self) -> str:
        """What differs from when the fingerprint was taken, empty where nothing does."""
        now = self._nodes()
        if len(now) != len(self.nodes):
            return f"the graph has {len(now)} nodes and had {len(self.nodes)}"
        for before, after in zip(self.nodes, now, strict=True):
            if before != after:
                return f"node {before[0].name!r} was changed"
        tensors = self._tensors()
        changed = sorted(name for name in {*tensors, *self.tensors} if tensors.get(name) != self.tensors.get(name))
        return f"tensor {changed[0]!r} was written" if changed else ""


def _sum(tensor: torch.Tensor) -> bytes:
    """A checksum of the values: writes through ``.data`` leave no other trace. As bytes, so that what is not a number equals itself."""
    if tensor.device.type == "meta" or tensor.is_complex() or tensor.is_quantized:
        return b""
    found = tensor.detach().to(torch.float64)
    return torch.stack([found.sum(), found.abs().sum()]).cpu().numpy().tobytes()


def run_passes(module: fx.GraphModule, passes: Sequence[GraphPass], observe: Observer | None = None) -> fx.GraphModule:
    """Run ``passes`` in order under a ``PassManager``; an error of ours reaches the caller as it was raised.

    Args:
        module: What the first pass gets.
        passes: The passes; each gets what the one before returned.
        observe: Told of every pass right after it has run.

    Returns:
        What the last pass returned, ``module`` itself where none changed anything.
    """
    steps: list[Any] = [_observed(step, observe) for step in passes]
    try:
        result: fx.GraphModule = PassManager(steps)(module).graph_module
    except FxPruneError:
        raise
    except Exception as error:  # the manager wraps whatever a pass raises in a bare Exception
        if error.__cause__ is None:
            raise
        raise error.__cause__ from error.__cause__.__cause__
    return result


def _observed(step: GraphPass, observe: Observer | None) -> Callable[[fx.GraphModule], PassResult | None]:
    if observe is None:
        return step

    def run(module: fx.GraphModule) -> PassResult | None:
        result = step(module)
        observe(step.name, module if result is None else result.graph_module, step.seconds)
        return result

    run.__name__ = step.name  # the manager's own errors name it
    return run
