"""Blocks left out of the user's own class: the module of each becomes ``nn.Identity``, where that is what is left of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.errors import UnsupportedError
from fxprune.evaluation.copying import copied
from fxprune.passes.coupling.blocks import Block, survivors
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.skeleton import at_or_below
from fxprune.passes.ir.writes import memory, written

_RELUS = frozenset({F.relu, torch.relu, torch.relu_, "relu", "relu_"})
_INSTEAD = "leave out keep_class for a graph module"


def class_without_blocks(graph: CouplingGraph, blocks: Sequence[Block]) -> nn.Module:
    """A copy of the analysed model, of its own class, all channels kept, in which the modules of ``blocks`` are ``nn.Identity``.

    Raises ``UnsupportedError`` for a block that cannot be left out, or whose module does more than its branches, so that the user's code
    would have to be another.
    """
    model = graph.model
    if isinstance(model, fx.GraphModule) or graph.traced.in_parts:
        kind = type(model).__name__
        raise UnsupportedError(f"keep_class cannot leave out blocks of a {kind}, whose forward is no class's own; {_INSTEAD}")
    made = copied(model)
    for block in blocks:
        if not block.removable:
            raise UnsupportedError(f"block {block.name!r} cannot be left out: {block.reason}; set its sparsity to 0 in the policy")
        why = next(_more(graph, block), None)
        if why is not None:
            raise UnsupportedError(f"keep_class cannot leave out block {block.name!r}: {why}; {_INSTEAD}")
        made.set_submodule(_home(block), nn.Identity().train(made.get_submodule(_home(block)).training))
    return made


def _more(graph: CouplingGraph, block: Block) -> Iterator[str]:
    """Why the module of a block is no identity once its branches are gone."""
    path = _home(block)
    if not path or path not in dict(graph.model.named_modules(remove_duplicate=False)):
        yield "it is no module of its own"
        return
    module = graph.model.get_submodule(path)
    if sum(one is module for _, one in graph.model.named_modules(remove_duplicate=False)) > 1:
        yield "its module is in several places"
    for mode, branches in block.branches.items():
        nodes = list(graph.traced.graphs[mode].nodes)
        order = {node: i for i, node in enumerate(nodes)}
        alive = survivors(graph.traced.graphs[mode], branches, graph.traced.skeleton.module)
        inside = {node for node in nodes if _within(node, path)}
        adds = {branch.add: branch.skip for branch in branches}
        first = min(adds, key=order.__getitem__)
        same = {adds[first]}  # nodes that hold what goes in
        if not set(adds) <= inside or adds[first] in inside:
            yield "its additions lie outside its module"
            return
        for node in nodes:
            if node in adds and adds[node] in same:
                same.add(node)
            elif node in inside and node in alive and node.args and node.args[0] in same and _keeps(graph, node, adds[first]):
                same.add(node)
            elif node in inside and node in alive:
                yield f"beside its branches it computes something ({node.meta.get('where') or node.name})"
        for node in nodes:
            if node in inside or node not in alive:
                continue
            if any(read in inside and read not in same for read in node.all_input_nodes):
                yield f"what it computes is read outside it ({node.meta.get('where') or node.name})"
            target = written(node, graph.traced.skeleton.module)
            if target is not None and order[node] > order[first] and memory(target) in {memory(one) for one in same}:
                yield f"what it gives is written into later ({node.meta.get('where') or node.name})"


def _home(block: Block) -> str:
    """The module whose code adds what the block's first branch computes."""
    return str(next(iter(block.branches.values()))[0].add.meta.get("owner") or "")


def _within(node: fx.Node, path: str) -> bool:
    """Whether the code of a module, or of one in it, makes a node."""
    return at_or_below(str(node.meta.get("owner") or ""), path)


def _relu(graph: CouplingGraph, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(graph.traced.skeleton.module(str(node.target))) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in _RELUS


def _keeps(graph: CouplingGraph, node: fx.Node, source: fx.Node) -> bool:
    """Whether a node gives what it is given, which has the values of ``source``."""
    if node.op == "call_module" and type(graph.traced.skeleton.module(str(node.target))) is nn.Identity:
        return True
    return _relu(graph, node) and _not_negative(graph, source)


def _not_negative(graph: CouplingGraph, node: fx.Node) -> bool:
    """Whether a tensor has been through a ReLU, and at most pooled since."""
    while not _relu(graph, node):
        pools = node.op == "call_module" and isinstance(graph.traced.skeleton.module(str(node.target)), (nn.MaxPool1d, nn.MaxPool2d))
        if not pools or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True
