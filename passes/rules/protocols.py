"""What a rewrite may ask of the slim graph under construction."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import fx

from fxprune.passes.labels.values import Value, Vector


class Rewriter(Protocol):
    """``rewrite(slim: Rewriter, node: fx.Node) -> None`` edits the arguments of ``node``, a copy in the graph under construction.

    Positions are those of the original: ``kept`` answers which of them are left.
    """

    new: fx.Graph
    """The graph under construction: a rewrite may add nodes in front of the one that it is given."""

    exact: bool
    """Whether statistics over channels keep the divisor of the original (``norms="exact"``)."""

    def value(self, node: Any) -> Any:
        """What the analysis knows of a node's tensor: a ``Value``, or nested ones where the node gives several."""

    def kept_of(self, vector: Vector) -> Vector | None:
        """The positions along labels that are left; None where all are."""

    def kept(self, value: Value, axis: int) -> Vector | None:
        """The positions along ``axis`` that are left, shape ``(kept,)``; None where all are."""

    def count(self, value: Value, axis: int) -> int:
        """How many positions along ``axis`` are left."""

    def size(self, node: Any, axis: int) -> int:
        """``count`` of a node's tensor."""

    def pruned(self, node: Any, axis: int) -> bool:
        """Whether a node's tensor loses positions along ``axis``, which may be negative."""

    def pruned_axis(self, value: Value, axis: int) -> bool:
        """Whether a tensor loses positions along ``axis``."""

    def sizes(self, node: Any, sizes: Any, first: int = 0) -> list[Any]:
        """Size arguments, one per axis of the node's tensor from axis ``first``: those of pruned axes replaced by what is left."""

    def number(self, value: Any) -> int:
        """The number that a literal or an integer node stands for on the example."""

    def argument(self, node: fx.Node, name: str, default: Any = None) -> Any:
        """The argument that the operation's schema calls ``name``, however it was written; ``input`` is what a method is called on."""

    def set_argument(self, node: fx.Node, name: str, value: Any) -> None:
        """Replace an argument where it stands, or add it by its name."""

    def is_fixed(self, node: Any, axis: int) -> bool:
        """Whether a node's tensor has one size along ``axis`` whatever the input; False where that is not plain to see."""

    def rescaled(self, given: Any, left: int) -> Any:
        """What a number of the graph becomes of which ``left`` are left on the example: ``left``, or for a number that the input decides
        the same share of it."""

    def renumbered(self, node: fx.Node, index: Any, kept: Vector, size: int) -> Any:
        """An index tensor along an axis of ``size`` positions of which ``kept`` are left: entries of removed ones dropped, the others
        renumbered."""

    def original(self, node: fx.Node) -> Any:
        """The user's module that a node calls."""

    def actual_weight(self, node: Any) -> torch.Tensor | None:
        """The user's values of the parameter or buffer that ``node`` reads; None where it reads none, or one without values (on meta)."""

    def set_values(self, name: str, values: torch.Tensor) -> None:
        """The slim module's tensor ``name`` is cut from ``values``, of the original's shape, in place of the user's."""
