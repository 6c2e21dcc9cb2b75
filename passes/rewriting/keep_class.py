"""A slim network that keeps the user's class: a copy of the model with slim tensors, whose own ``forward`` and other methods run.

It computes what the slim graph computes only if no number in the code has to change with the channels. That is not assumed: the
rewritten graph must be the traced one, and the copy, traced in turn, must give that graph again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.errors import TraceError, UnsupportedError
from fxprune.example_inputs import build
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.rules import is_known, registry
from fxprune.passes.tracing.modes import trace

_INSTEAD = "leave keep_class out for a graph module, or pass the layer to ignore="


def kept_class(slimmer: Slimmer) -> nn.Module:
    """The slim network of ``slimmer`` as an instance of the model's class, with modules of the user's classes all through.

    Plain numbers that modules keep (``self.channels``) stay those of the original, apart from the attributes of torch's own layers.
    Raises ``UnsupportedError`` naming the node and line where a number has to change.
    """
    traced, original = slimmer.walk.traced, slimmer.skeleton.original
    kind = type(original).__name__
    if isinstance(original, fx.GraphModule):
        raise UnsupportedError(f"keep_class: this model is a {kind} already and has no class of its own to keep; leave keep_class out")
    if traced.parts:
        raise UnsupportedError(f"keep_class: only parts of {kind} could be traced; it keeps its class without, and {_INSTEAD}")
    for mode, graph in traced.graphs.items():
        changed = _changed(graph, slimmer.copy(mode, graph))
        if changed is not None:
            raise UnsupportedError(f"{_place(changed)} holds a number that changes with the channels, so {kind} cannot stay; {_INSTEAD}")
    for name in sorted(traced.constants):
        if slimmer.kept_dims(name) and not _is_attribute(original, name):
            raise UnsupportedError(f"keep_class: forward makes a tensor ({name}) that loses channels, so {kind} cannot stay; {_INSTEAD}")
    made = slimmer.tree(own_classes=True)
    _unshare(original, made)
    _check_again(slimmer, made, kind)
    return made


def _changed(old: fx.Graph, new: fx.Graph) -> fx.Node | None:
    """The first node whose arguments the rewrite changed, or that it added; what it only left out was read by nobody."""
    before = {node.name: _shape(node) for node in old.nodes}
    lines = {node.name: node for node in old.nodes}
    return next((lines.get(node.name, node) for node in new.nodes if before.get(node.name) != _shape(node)), None)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, repr(map_arg((node.args, node.kwargs), lambda n: fx.Node.__str__(n)))


def _place(node: fx.Node) -> str:
    what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{node.meta.get('where') or 'forward'}: {what} (node {node.name})"


def _is_attribute(model: nn.Module, name: str) -> bool:
    path, _, key = name.rpartition(".")
    return isinstance(model.get_submodule(path).__dict__.get(key), torch.Tensor)


def _unshare(original: nn.Module, made: nn.Module) -> None:
    """Copies of the tensors that the user's modules hold as plain attributes and the graph does not read."""
    theirs = {id(value) for module in original.modules() for value in module.__dict__.values() if isinstance(value, torch.Tensor)}
    for module in made.modules():
        for key, value in module.__dict__.items():
            if isinstance(value, torch.Tensor) and id(value) in theirs:
                module.__dict__[key] = value.detach().clone()


def _check_again(slimmer: Slimmer, made: nn.Module, kind: str) -> None:
    """Code may branch on a channel count, or compute with one outside the graph: tracing the copy tells."""
    try:
        again = trace(made, build(slimmer.graph.inputs, device="meta"), is_known, registry.FUNCTIONS.__contains__).graphs
    except TraceError as error:
        raise UnsupportedError(f"with fewer channels {kind} does not run: {error}; {_INSTEAD}") from error
    for mode, graph in slimmer.walk.traced.graphs.items():
        if mode not in again:
            raise UnsupportedError(f"with fewer channels {kind} takes another path in {mode} mode; {_INSTEAD}")
        pairs = zip(graph.nodes, again[mode].nodes, strict=False)
        other = next((old for old, new in pairs if _shape(old) != _shape(new)), None)
        if other is not None or len(graph.nodes) != len(again[mode].nodes):
            where = _place(other) if other is not None else "forward"
            raise UnsupportedError(f"{where} depends on a number of channels, so {kind} cannot stay; {_INSTEAD}")
