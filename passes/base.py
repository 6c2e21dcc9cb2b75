"""What every pass keeps: it never edits its input, says truly whether it changed anything, and leaves a graph that lints.

Passes are ``torch.fx.passes`` passes and run under its ``PassManager``. The base class keeps the contract, so a pass is only ``run``.
(The idea of a base class that owns the contract is that of onnx/ir-py's pass infrastructure; ours checks purity as well.)
"""

from __future__ import annotations

import abc
import time
import warnings
from collections.abc import Callable, Sequence

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from fxprune.errors import FxPruneError

Observer = Callable[["GraphPass", fx.GraphModule, float], None]


class GraphPass(PassBase):
    """One step from graph module to graph module. ``seconds`` is how long its last run took."""

    seconds = 0.0

    @abc.abstractmethod
    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        """Return ``module`` itself where there is nothing to do, else a new module; never edit ``module``."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        before = len(graph_module.graph.nodes)
        start = time.perf_counter()
        result = self.run(graph_module)
        self.seconds = time.perf_counter() - start
        if len(graph_module.graph.nodes) != before:
            raise AssertionError(f"{type(self).__name__} edited its input")
        if result is not graph_module:
            with warnings.catch_warnings():  # older versions of torch wonder about tensors that are plain attributes, as they were
                warnings.filterwarnings("ignore", ".*does not reference an nn.Module, nn.Parameter, or buffer", UserWarning)
                result.graph.lint()
        return PassResult(result, result is not graph_module)


def run_passes(module: fx.GraphModule, passes: Sequence[GraphPass], observe: Observer | None = None) -> fx.GraphModule:
    """Run ``passes`` in order under a ``PassManager``; an error of ours reaches the caller as it was raised."""
    steps = list(passes)
    try:
        result: fx.GraphModule = PassManager([*steps])(module).graph_module
    except FxPruneError:
        raise
    except Exception as error:  # the manager wraps whatever a pass raises in a bare Exception
        if error.__cause__ is None:
            raise
        raise error.__cause__ from error.__cause__.__cause__
    for step in steps:
        if observe is not None:
            observe(step, result, step.seconds)
    return result
