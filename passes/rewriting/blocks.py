"""Blocks left out: the additions that end their branches give what the branches started from, and their tensors go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import fx

from fxprune.errors import UnsupportedError
from fxprune.passes.coupling.blocks import Block, Branch, lost_tensors, survivors
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.slim_module import SlimModule
from fxprune.passes.rewriting.assemble import drop
from fxprune.passes.rewriting.slimmer import Slimmer


def without_blocks(graph: CouplingGraph, blocks: Sequence[Block]) -> SlimModule:
    """The analysed network, all channels kept, without ``blocks``; the model itself is not touched.

    Raises ``UnsupportedError`` for a block that cannot be left out.
    """
    for block in blocks:
        if not block.removable:
            raise UnsupportedError(f"block {block.name!r} cannot be left out: {block.reason}; set its sparsity to 0 in the policy")
    slim = _whole(graph)
    alive_calls: set[str] = set()
    for mode, copied in slim.graphs.items():
        original = graph.traced.graphs[mode]
        branches = _branches(blocks, mode)
        alive = survivors(original, branches, graph.traced.skeleton.module)
        twins = _twins(original, copied)
        stand: dict[fx.Node, fx.Node] = {}  # for additions that are gone: where one branch follows another, its input is one
        for branch in branches:
            if branch.add in alive:  # else it lies within another block that goes
                add, skip = twins[branch.add], stand.get(branch.skip, twins[branch.skip])
                with copied.inserting_before(add):
                    stand[branch.add] = copied.call_method("clone", (skip,)) if branch.copied else skip
                add.replace_all_uses_with(stand[branch.add])
        for node in reversed(list(original.nodes)):
            if node not in alive and node in twins or any(branch.add is node for branch in branches):
                copied.erase_node(twins[node])
        copied.lint()
        alive_calls |= {str(node.target) for node in copied.nodes if node.op == "call_module"}
    skeleton = graph.traced.skeleton
    lost = lost_tensors(graph.traced, {mode: _branches(blocks, mode) for mode in slim.graphs})
    gone = {alias for name in lost for alias in skeleton.aliases[name]}
    drop(slim, gone, alive_calls)
    slim.recompile()
    return slim


def with_zeroed_blocks(graph: CouplingGraph, blocks: Sequence[Block]) -> SlimModule:
    """The analysed network, all channels kept, with the output of every branch of ``blocks`` multiplied by zero: the oracle's reference."""
    whole = _whole(graph)
    for mode, copied in whole.graphs.items():
        twins = _twins(graph.traced.graphs[mode], copied)
        stand: dict[fx.Node, fx.Node] = {}
        for branch in _branches(blocks, mode):
            add, skip = twins[branch.add], twins[branch.skip]
            end = next(n for n in add.all_input_nodes if n is not stand.get(branch.skip, skip))
            with copied.inserting_before(add):
                nothing = copied.call_function(torch.mul, (end, 0.0))
                stand[branch.add] = copied.call_function(torch.add, (stand.get(branch.skip, skip), nothing))
            add.replace_all_uses_with(stand[branch.add])
            copied.erase_node(add)
    whole.recompile()
    return whole


def _whole(graph: CouplingGraph) -> SlimModule:
    made = Slimmer(graph, np.ones(int(graph.starts[-1]) if len(graph.starts) else 0, dtype=bool), "plain").run()
    assert isinstance(made, SlimModule), "a network with blocks was traced whole"
    return made


def _branches(blocks: Iterable[Block], mode: str) -> list[Branch]:
    """The branches of ``blocks`` in one graph in its order, each once: a layer and its halves may all be named."""
    found = {branch.add: branch for block in blocks for branch in block.branches[mode]}
    return [found[node] for branch in list(found.values())[:1] for node in branch.add.graph.nodes if node in found]


def _twins(original: fx.Graph, copied: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The copy of every node that the copied graph still has."""
    by_name = {node.name: node for node in copied.nodes}
    return {node: by_name[node.name] for node in original.nodes if node.name in by_name}
