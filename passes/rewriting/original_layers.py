"""Layers of the original in place of calls with their weights.

After ``torch.export`` a graph calls ``F.linear`` on a weight, and what looks for layers (adapters, quantisation) finds none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.errors import InputError
from fxprune.passes.base import GraphPass
from fxprune.passes.ir.slim_module import SlimModule

Tensors = dict[str, torch.Tensor]
_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
# What each function calls its arguments, and their defaults; those up to None are tensors.
_FORMS: dict[Any, dict[str, Any]] = {
    # The built-in forms of the norms have one argument more.
    F.linear: {"input": None, "weight": None, "bias": None},
    F.embedding: {
        "input": None, "weight": None, "padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False,
        "sparse": False,
    },
    F.layer_norm: {"input": None, "normalized_shape": None, "weight": None, "bias": None, "eps": 1e-5, "cudnn_enable": True},
    F.group_norm: {"input": None, "num_groups": None, "weight": None, "bias": None, "eps": 1e-5, "cudnn_enable": True},
    **{
        function: {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        for function in _CONVOLUTIONS.values()
    },
}  # fmt: skip


def _linear(layer: Any, held: Tensors, given: dict[str, Any]) -> bool:
    layer.out_features, layer.in_features = held["weight"].shape
    return True


def _convolution(layer: Any, held: Tensors, given: dict[str, Any]) -> bool:
    space, weight = held["weight"].ndim - 2, held["weight"]
    layer.groups = given["groups"]
    layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1] * layer.groups
    same = all(_wide(getattr(layer, key), space) == _wide(given[key], space) for key in ("stride", "padding", "dilation"))
    return same and layer.padding_mode == "zeros"


def _embedding(layer: Any, held: Tensors, given: dict[str, Any]) -> bool:
    layer.num_embeddings, layer.embedding_dim = held["weight"].shape
    if layer.max_norm is not None:
        return False
    return all(getattr(layer, key) == given[key] for key in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"))


def _layer_norm(layer: Any, held: Tensors, given: dict[str, Any]) -> bool:
    shape = tuple(given["normalized_shape"])
    layer.normalized_shape = shape
    return layer.eps == given["eps"] and all(isinstance(size, int) for size in shape)


def _group_norm(layer: Any, held: Tensors, given: dict[str, Any]) -> bool:
    layer.num_groups, layer.num_channels = given["num_groups"], held["weight"].shape[0] if "weight" in held else layer.num_channels
    return layer.eps == given["eps"] and isinstance(layer.num_groups, int) and "weight" in held


# Layers that compute the same in both modes; ``fits(layer, tensors, arguments)`` sets the sizes and says whether the call is theirs.
_LAYERS: dict[Any, tuple[type[nn.Module], Callable[[Any, Tensors, dict[str, Any]], bool]]] = {
    F.linear: (nn.Linear, _linear),
    F.embedding: (nn.Embedding, _embedding),
    F.layer_norm: (nn.LayerNorm, _layer_norm),
    F.group_norm: (nn.GroupNorm, _group_norm),
    **{function: (kind, _convolution) for kind, function in _CONVOLUTIONS.items()},
}


_ALIKE: dict[Any, Any] = {torch.layer_norm: F.layer_norm, torch.group_norm: F.group_norm}


class OriginalLayers(GraphPass):
    """Calls of functions on the parameters of one layer become calls of that layer, with the slim parameters, as in ``original``.

    Linear layers, convolutions, embeddings, layer and group norms; those whose arguments in the graph are not the layer's own stay calls,
    and so do batch norms and dropout, which have the mode of the export.
    """

    def __init__(self, original: nn.Module) -> None:
        self.layers = {
            path: module
            for path, module in original.named_modules(remove_duplicate=False)
            if not module._modules and not module._forward_hooks and not module._forward_pre_hooks
        }

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        if not isinstance(module, SlimModule):
            raise InputError(f"original= needs the graph of the whole network; this {type(module).__name__} has none")
        twin = copy.deepcopy(module)
        placed: dict[str, nn.Module] = {}
        changed = False
        for graph in twin.graphs.values():
            for node in list(graph.nodes):
                found = self._layer(twin, node, placed)
                if found is not None:
                    path, given = found
                    with graph.inserting_before(node):
                        call = graph.call_module(path, (given,))
                    call.meta = dict(node.meta)
                    node.replace_all_uses_with(call)
                    graph.erase_node(node)
                    changed = True
            for node in reversed(list(graph.nodes)):
                if node.op == "get_attr" and not node.users:
                    graph.erase_node(node)
        if not changed:
            return module
        twin.recompile()
        return twin

    def _layer(self, root: nn.Module, node: fx.Node, placed: dict[str, nn.Module]) -> tuple[str, Any] | None:
        """The path of the layer that a node computes, which now stands in ``root``, and what it is called on."""
        target: Any = _ALIKE.get(node.target, node.target)
        if node.op != "call_function" or target not in _LAYERS:
            return None
        form = _FORMS[target]
        if len(node.args) > len(form) or node.kwargs.keys() - form.keys():
            return None
        given = {**form, **dict(zip(form, node.args, strict=False)), **node.kwargs}
        read = {key: given[key] for key in ("weight", "bias") if given.get(key) is not None}
        if not all(isinstance(one, fx.Node) and one.op == "get_attr" for one in read.values()) or not isinstance(given["input"], fx.Node):
            return None
        held = {key: _tensor(root, str(one.target)) for key, one in read.items()}
        kind, fits = _LAYERS[target]
        for path, layer in self.layers.items():
            if type(layer) is not kind or {k for k, p in layer._parameters.items() if p is not None} != set(held):
                continue
            owner = _module(root, path)
            if owner is None or any(owner._parameters.get(key) is not tensor for key, tensor in held.items()):
                continue  # a tied weight has several owners
            made = copy.copy(layer)
            made.__dict__ = {**layer.__dict__, "_parameters": {**layer._parameters, **owner._parameters}, "training": root.training}
            if not fits(made, held, given):
                return None
            if path not in placed:
                placed[path] = made
                parent, _, key = path.rpartition(".")
                root.get_submodule(parent)._modules[key] = made
            return path, given["input"]
        return None


def _tensor(root: nn.Module, name: str) -> Any:
    owner, _, key = name.rpartition(".")
    return root.get_submodule(owner)._parameters.get(key)


def _module(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _wide(value: Any, space: int) -> Any:
    """A number for every axis, as convolutions hold them; words ("same") stay."""
    if isinstance(value, str):
        return value
    found = (value,) * space if isinstance(value, int) else tuple(value)
    return found * space if len(found) == 1 else found
