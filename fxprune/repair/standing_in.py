"""What stands in for blocks that were left out: layers that are there already, fitted to what the network gave with its blocks.

A branch that is gone had added something to a tensor. The layer that writes that tensor is fitted to the tensor with the addition, which is
the least-squares linear map of what the layer reads, folded into its weights (ReplaceMe, https://arxiv.org/abs/2505.02819, has a map of
its own there): no layer more, and nothing to compute. What that leaves, the layers behind correct, since they aim at their responses in
the network with the blocks. Between the layer and the branch there may be a ReLU; whatever else reads the tensor would get what it
should not, and then nothing stands in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from fxprune.passes.coupling.blocks import Block, Branch, survivors
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.nested import has_tensor
from fxprune.repair.attention import contractions
from fxprune.repair.layers import Layer, Reading, key_of

MODE = "eval"  # networks with blocks are traced whole, and repaired as they are in evaluation


@dataclass(frozen=True)
class Aim:
    """What a layer is fitted to: ``end`` is what comes of its output, ``node`` what that was once ``blocks`` had added to it."""

    end: fx.Node
    node: fx.Node
    blocks: tuple[str, ...]


class LeftOut:
    """An analysed network whose ``blocks`` were left out, seen by what repairs the rest: nodes are those of its graph with them."""

    def __init__(self, graph: CouplingGraph, blocks: Iterable[Block]) -> None:
        self._reading = Reading(graph.traced.skeleton.original, graph.traced.graphs[MODE])
        self._nodes = list(self._reading.graph.nodes)
        module = graph.traced.skeleton.module
        names: dict[Branch, tuple[str, ...]] = {}
        for block in blocks:
            for branch in block.branches[MODE]:
                same = next((one for one in names if one.add is branch.add), branch)  # a layer and its halves may all be named
                names[same] = (*names.get(same, ()), block.name)
        self.alive = survivors(self._reading.graph, names, module)
        self._branches = {branch.skip: (branch, named) for branch, named in names.items() if branch.add in self.alive}

    @property
    def gone(self) -> set[str]:
        """Names of the nodes that are no longer computed."""
        return {node.name for node in self._nodes if node not in self.alive}

    @cached_property
    def moved(self) -> set[str]:
        """Keys (``layers.key_of``) of what is computed from other tensors than with the blocks, and of what stands in for them."""
        behind = {branch.add for branch, _ in self._branches.values()}
        for node in self._nodes:
            if node in self.alive and any(one in behind for one in node.all_input_nodes):
                behind.add(node)
        standing = [one.node for one in self._reading.layers() if one.name in self.aims]
        return {key_of(node) for node in (*behind, *standing)} - {""}

    @cached_property
    def aims(self) -> dict[str, Aim]:
        """Name of the layer -> what it is fitted to, for the layers that can stand in for blocks."""
        found = {}
        layers = self._reading.layers()
        stops = {one.node for one in layers} | {one.node for one in self._reading.norms()} | self._reading.recurrent().keys()
        stops |= {one.node for one in contractions(self._reading.graph)}
        for one in layers:
            aim = self._aim(one) if one.node in self.alive else None
            if aim is not None and not any(n in stops for n in self._between(one, aim)):
                found[one.name] = aim
        return found

    def _aim(self, layer: Layer) -> Aim | None:
        """Along what comes of the output: through ReLUs, and over the additions that are gone, as long as nothing else reads it."""
        here, aim = layer.end, None
        blocks: list[str] = []
        while True:
            readers = {user for user in here.users if "val" not in user.meta or has_tensor(user.meta["val"])}  # of values, not of sizes
            branch, named = self._branches.get(here, (None, ()))
            if branch is not None and not any(one in self.alive for one in readers - {branch.add}):
                here = aim = branch.add
                blocks += named
            elif len(readers) == 1 and self._reading.passes(reader := readers.pop()):
                here = reader
            else:
                return None if aim is None else Aim(layer.end, aim, tuple(blocks))

    def _between(self, layer: Layer, aim: Aim) -> Iterator[fx.Node]:
        """What is still computed between a layer and the tensor it aims at, but for its own BatchNorm."""
        place = self._reading.place
        for node in self._nodes[place[layer.node] + 1 : place[aim.node]]:
            if node in self.alive and (layer.norm is None or node is not layer.norm.node):
                yield node
