"""Sparse training: a penalty on whole units of the coupling graph, so that training itself drives channels to zero."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import InputError, shown
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.zeros import check_graph


class Regularizer:
    """Group lasso over the units of a coupling graph.

    That is ``strength`` times the sum, over all prunable units, of sqrt(d) times the Euclidean norm of the d weights that go with the unit
    (Yuan and Lin 2006; Wen 2016 for channels; here over producer, norms and consumers at once).

    Call it for the penalty, a scalar tensor to add to the loss; or call ``shrink`` after each optimiser step, which reaches zero exactly.
    """

    def __init__(self, graph: CouplingGraph, strength: float) -> None:
        self.graph, self.strength = graph, strength
        count = int(graph.starts[-1]) if len(graph.starts) else 0
        self._prunable = torch.from_numpy(graph.prunable_unit.copy())
        sizes = torch.zeros(count)
        for _, tensor, dims in self._members():
            for dim, units in dims:
                sizes.index_add_(0, units, torch.full((len(units),), tensor.numel() / max(tensor.shape[dim], 1)))
        self._weights = sizes.sqrt() * self._prunable

    def __call__(self) -> Tensor:
        """The penalty of the weights as they are, a scalar that can be differentiated."""
        squares = self._squares()
        chosen = self._prunable.to(squares.device) & (squares.detach() > 0)  # the root of zero has no gradient
        return self.strength * (self._weights.to(squares.device)[chosen] * squares[chosen].sqrt()).sum()

    @torch.no_grad()
    def shrink(self, step: float) -> int:
        """Make every unit's weights smaller by ``step`` times the penalty's slope, in place, those that reach zero exactly zero.

        It is the proximal step of the group lasso, unit by unit; a weight that two units share is scaled by both.

        Args:
            step: the learning rate of the optimiser step before it.

        Returns:
            How many prunable units are zero now.
        """
        norms = self._squares().sqrt()
        weights, prunable = self._weights.to(norms.device), self._prunable.to(norms.device)
        factors = (1 - step * self.strength * weights / norms.clamp_min(1e-12)).clamp_min(0)
        factors = torch.where(prunable, factors, torch.ones_like(factors))
        for _, tensor, dims in self._members():
            for dim, units in dims:
                shape = [len(units) if d == dim else 1 for d in range(tensor.ndim)]
                tensor.mul_(factors[units.to(factors.device)].to(tensor).view(shape))
        return int(((factors == 0) & prunable).sum())

    def _squares(self) -> Tensor:
        """The sum of squares of the weights that go with each unit, (units,)."""
        parts: list[Tensor] = []
        index: list[Tensor] = []
        for _, tensor, dims in self._members():
            squared = tensor.abs().float().square()
            for dim, units in dims:
                rest = [d for d in range(tensor.ndim) if d != dim]
                parts.append(squared.sum(rest) if rest else squared)
                index.append(units.to(tensor.device))
        total = torch.zeros(len(self._prunable), device=parts[0].device if parts else None)
        return total.index_add(0, torch.cat(index), torch.cat([p.to(total) for p in parts])) if parts else total

    def _members(self) -> Iterator[tuple[str, Tensor, list[tuple[int, Tensor]]]]:
        """The parameters that lie in prunable units: name, the tensor as it is now, and its dimensions with the unit of each index."""
        skeleton = self.graph.traced.skeleton
        for name, dims in self.graph.dims_of.items():
            chosen = [(dim, torch.from_numpy(units)) for dim, units in dims if self.graph.prunable_unit[units].any()]
            if chosen and name in skeleton.parameter_names:
                yield name, skeleton.real(name), chosen


def regularize(graph: CouplingGraph, strength: float = 1e-4) -> Regularizer:
    """A penalty that drives whole channels to zero while the network trains; ``Policy.from_zeros`` then takes them out.

    Args:
        graph: what ``analyze`` returned for the network that trains; its weights are read, and by ``shrink`` changed, as they are.
        strength: of the penalty, against a loss of about 1. Too small removes nothing, too large everything; the number that ``shrink``
            returns shows which.

    Returns:
        A ``Regularizer``: ``loss + penalty()`` in the loop, or ``penalty.shrink(lr)`` after each optimiser step, whose zeros are exact.

    Raises:
        InputError: ``graph`` is none, ``strength`` is not above 0, or no group can be pruned.
    """
    check_graph(graph, "graph")
    given: Any = strength
    if isinstance(given, bool) or not isinstance(given, Real) or not float(given) > 0:
        raise InputError(f"strength is {shown(strength)}; it must be a number above 0")
    if not any(group.prunable for group in graph.groups):
        raise InputError("there is no prunable group to regularise; fxprune.explain(model, inputs) says why each is locked")
    return Regularizer(graph, strength)
