"""The layers of a graph that can be mended: where a constant can be put, and which other branch their output is added to."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.repair.matrices import LAYERS

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_IDLE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)  # in evaluation


@dataclass(frozen=True)
class Consumer:
    """A convolution or linear layer, called once. ``path``: its qualified name below the graph's module.

    ``norm``: the BatchNorm that alone reads it, where there is one. ``other``: the node that its output, normalised, is added to, if that
    one runs first; it is of the same shape.
    """

    path: str
    node: fx.Node
    module: Any
    norm: Any
    other: fx.Node | None

    @property
    def source(self) -> fx.Node:
        """The node that the layer reads."""
        found: fx.Node = self.node.args[0] if self.node.args else self.node.kwargs["input"]  # type: ignore[assignment]
        return found

    @property
    def takes_shift(self) -> bool:
        """Whether a constant can be added to the output: there is a bias, or a BatchNorm whose mean takes it."""
        return self.module.bias is not None or self.norm is not None

    def add_shift(self, shift: Tensor) -> None:
        """Add ``shift`` (channels) to the output of the layer, without its bias if it has one, or of its BatchNorm's input."""
        with torch.no_grad():
            if self.module.bias is not None:
                self.module.bias.copy_(shift)
            elif self.norm is not None:
                self.norm.running_mean.sub_(shift.to(self.norm.running_mean))

    def gain(self) -> Tensor:
        """What one unit of the layer's output comes to where it is added to the other branch, by channel."""
        if self.norm is None:
            return torch.ones(())
        scale: Tensor = (self.norm.running_var + self.norm.eps).rsqrt()
        return scale if self.norm.weight is None else scale * self.norm.weight.detach()


def consumers(module: nn.Module, graph: fx.Graph) -> list[Consumer]:
    """The layers of ``graph`` in its order, except those called more than once or with a weight that is not theirs alone."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    shared = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    place = {node: i for i, node in enumerate(graph.nodes)}
    found = []
    for node in graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, LAYERS):
            continue
        path = str(node.target)
        own = layer._parameters.get("weight") is not None  # else it is computed, by a parametrization
        if not own or calls[path] > 1 or any(shared[id(p)] > 1 for p in layer.parameters()):
            continue
        norm, end = _normalised(module, node, calls)
        found.append(Consumer(path, node, layer, norm, _added_to(module, end, node, place)))
    return found


def _normalised(module: nn.Module, node: fx.Node, calls: Counter[str]) -> tuple[Any, fx.Node]:
    """The BatchNorm that alone reads ``node``, and the node whose value is the layer's, normalised."""
    reader = _only_reader(node)
    if reader is not None and reader.op == "call_module" and calls[str(reader.target)] == 1:
        norm = module.get_submodule(str(reader.target))
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            return norm, reader
    return None, node


def _added_to(module: nn.Module, end: fx.Node, node: fx.Node, place: dict[fx.Node, int]) -> fx.Node | None:
    reader = _only_reader(end)
    while reader is not None and reader.op == "call_module" and isinstance(module.get_submodule(str(reader.target)), _IDLE):
        end, reader = reader, _only_reader(reader)
    if reader is None or reader.target not in _ADD or len(reader.args) != 2 or reader.kwargs:
        return None
    others = [one for one in reader.args if one is not end]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    return others[0] if place[others[0]] < place[node] else None


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
