"""Graphs of which a policy changes nothing but numbers: written once with blanks, and filled in for each candidate of a search.

A view that names its sizes, or a functional layer norm, would otherwise have the whole graph copied, its code written and compiled, for
every candidate. Here the operations concerned alone are rewritten, in a draft of the graph that stays, and only their numbers are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx, nn

from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.slim_module import Blank, SlimModule


class Rewriting(Protocol):
    """What the blanks ask of one rewrite, a ``Slimmer``."""

    graph: CouplingGraph
    constants: dict[str, torch.Tensor]
    renumber: dict[str, torch.Tensor]

    def note(self, node: fx.Node, old: fx.Node, mode: str) -> None:
        """Let a copied node say what rewrites ask of it."""

    def may_change(self, old: fx.Node, mode: str) -> bool:
        """Whether there are policies for which an operation is another in the slim graph."""

    def only_arguments(self, old: fx.Node, mode: str) -> bool:
        """Whether it stays one operation of which nothing but the arguments is rewritten, by its rule."""

    def rewrite_in(self, graph: fx.Graph, node: fx.Node, mode: str) -> None:
        """Have its rule rewrite a copied node of ``graph`` where this policy asks for that."""

    def swept(self, graph: fx.Graph) -> fx.Graph:
        """``graph`` without what nobody reads any more, and without what was noted for the rewrite."""

    def holding(self, module: SlimModule) -> SlimModule:
        """``module`` with what the user's code holds in a mode of its own."""


class Blanks:
    """The shared module of an analysed model whose graphs have blanks.

    ``useless``: a rewrite adds operations or renumbers an index, so that every candidate needs graphs of its own.
    """

    def __init__(self, slimmer: Rewriting) -> None:
        self._module: SlimModule | None = None
        self._frames: list[Any] = []  # what the module's graphs have in place of the nodes that change, but for numbers
        self._drafts: dict[str, fx.Graph] = {}
        self._changing: list[tuple[str, fx.Node, tuple[Any, ...]]] = []  # mode, node of the draft, and what it was
        self.useless = False
        for mode, graph in slimmer.graph.traced.graphs.items():
            draft = self._drafts[mode] = fx.Graph()
            made: dict[fx.Node, fx.Node] = {}
            for old in graph.nodes:
                node = made[old] = draft.node_copy(old, made.__getitem__)
                slimmer.note(node, old, mode)
                if slimmer.may_change(old, mode):
                    self.useless = self.useless or not slimmer.only_arguments(old, mode)
                    self._changing.append((mode, node, (node.op, node.target, node.args, node.kwargs)))

    def filled(self, slimmer: Rewriting) -> tuple[SlimModule | None, list[int] | None]:
        """The module whose graphs a policy's network can share, and what stands in the blanks; (None, None) where there is none."""
        if self.useless:
            return None, None
        sizes = {mode: len(draft.nodes) for mode, draft in self._drafts.items()}
        found: list[int] = []
        frames = []
        for mode, node, original in self._changing:
            node.op, node.target, node.args, node.kwargs = original
            slimmer.rewrite_in(self._drafts[mode], node, mode)
            numbers, frame = _apart((node.args, node.kwargs))
            found += numbers
            frames.append((node.op, node.target, frame))
        if slimmer.constants or slimmer.renumber or any(len(draft.nodes) != sizes[mode] for mode, draft in self._drafts.items()):
            slimmer.constants.clear()
            slimmer.renumber.clear()
            self.useless = True
            return None, None
        if self._module is None or frames != self._frames:  # an argument that only some policies need
            self._module, self._frames = slimmer.holding(SlimModule(nn.Module(), self._written(slimmer))), frames
        return self._module, found

    def _written(self, slimmer: Rewriting) -> dict[str, fx.Graph]:
        """The drafts with blanks for the numbers of the nodes that change."""
        count = 0

        def blank(_: int) -> Blank:
            nonlocal count
            count += 1
            return Blank(count - 1)

        changing = {node for _, node, _ in self._changing}
        graphs = {}
        for mode, draft in self._drafts.items():
            written = fx.Graph()
            made: dict[fx.Node, fx.Node] = {}
            for node in draft.nodes:
                twin = made[node] = written.node_copy(node, made.__getitem__)
                if node in changing:
                    twin.args, twin.kwargs = _mapped((twin.args, twin.kwargs), blank)
            graphs[mode] = slimmer.swept(written)
        return graphs


def _apart(nested: Any) -> tuple[list[int], Any]:
    """The integers in arguments, in order, and what the arguments are beside them."""
    numbers: list[int] = []

    def taken(number: int) -> Any:
        numbers.append(number)
        return int

    frame = _mapped(nested, taken)
    return numbers, frame


def _mapped(nested: Any, number: Callable[[int], Any]) -> Any:
    """Arguments with ``number`` of every integer in them, in order."""
    if type(nested) is int:
        return number(nested)
    if isinstance(nested, (tuple, list)):
        parts = [_mapped(one, number) for one in nested]
        return type(nested)(*parts) if hasattr(nested, "_fields") else tuple(parts) if isinstance(nested, tuple) else parts
    if isinstance(nested, dict):
        return {key: _mapped(one, number) for key, one in nested.items()}
    if isinstance(nested, slice):
        return slice(*(_mapped(one, number) for one in (nested.start, nested.stop, nested.step)))
    return nested
