"""Importance by reconstruction: which units the others can stand in for, once the layers that read them are fitted again.

Backward elimination on the covariance of each reading layer's inputs: the unit goes whose loss raises the least-squares error of the
original responses least, the remaining weights being refitted in closed form (Hassibi 1993, Optimal Brain Surgeon, with the layer-wise
error in place of the loss). So the choice of units and the repair "lstsq" aim at the same thing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.errors import EvaluationError
from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.repair.moments import InputMoments, collect

RIDGE = 1e-2  # of the mean variance of the features
ROUNDS = 64  # a group is thinned out in at most so many rounds


def reconstruction(graph: CouplingGraph, batches: Iterable[Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Scores of the groups that some convolution or linear layer reads: group name -> array (units).

    A score is the relative error that its unit's removal adds when its turn has come, made to grow along the order of removal. Groups
    that no suitable layer reads (ungrouped, called once, not too wide) are left out. ``batches`` as for a repair.
    """
    moments = {name: one for name, one in collect(graph, batches).items() if len(one.weights) == 1}
    found = {}
    for group in graph.groups:
        if group.prunable:
            layers = [_Layer.of(moments[p], i, u) for p, i, u in _reading(group, moments)]
            if layers:
                found[group.name] = _eliminated(group.size, layers)
    return found


def _reading(group: Group, moments: Mapping[str, InputMoments]) -> list[tuple[str, Tensor, Tensor]]:
    """(weight, input channels, the unit of each) of what reads the group."""
    members = zip(group.members, group.units, strict=True)
    return [(n, idx, units) for (n, dim, idx), units in members if n in moments and moments[n].axis == dim]


@dataclass
class _Layer:
    """A layer while inputs are taken from it: weights (outputs, features) and the inverse covariance of the features that are left.

    ``channels``, ``units``: its input channels in the group, and the unit of each. ``width``: features a channel has.
    """

    weights: Tensor
    inverse: Tensor
    energy: float
    width: int
    channels: Tensor
    units: Tensor

    @classmethod
    def of(cls, one: InputMoments, channels: Tensor, units: Tensor) -> _Layer:
        weights, gain, covariance = one.weights[0], one.gain, one.covariance[0]
        if not bool(torch.isfinite(covariance).all()):
            raise EvaluationError("layers read values that are not finite on the calibration data; check the data and the model's weights")
        weights = weights * (gain.unsqueeze(1) if gain.ndim else gain)  # as its BatchNorm scales the responses
        ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-12)
        inverse = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype))
        energy = float((weights @ covariance * weights).sum().clamp_min(1e-30))
        return cls(weights, inverse, energy, one.width, channels, units)

    def costs(self, alive: Tensor) -> Tensor:
        """By unit, the relative error that its removal adds; infinite for those that are gone."""
        count = len(self.inverse) // self.width
        blocks = self.inverse.reshape(count, self.width, count, self.width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[self.channels].clone()
        blocks[~alive[self.units]] = torch.eye(self.width, dtype=blocks.dtype)
        own = self.weights.reshape(len(self.weights), count, self.width)[:, self.channels].permute(1, 2, 0)
        each = (torch.linalg.solve(blocks, own) * own).sum((1, 2)) / self.energy
        return torch.zeros(len(alive), dtype=each.dtype).index_add_(0, self.units, each)

    def remove(self, gone: Tensor) -> None:
        """Take the units ``gone`` out: the weights are refitted, the inverse is that of what is left."""
        chosen = self.channels[torch.isin(self.units, gone)]
        columns = (chosen.unsqueeze(1) * self.width + torch.arange(self.width)).flatten()
        step = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])
        self.weights = self.weights - self.weights[:, columns] @ step
        self.inverse = self.inverse - self.inverse[:, columns] @ step
        self.weights[:, columns] = 0
        self.inverse[columns], self.inverse[:, columns] = 0, 0


def _eliminated(size: int, layers: list[_Layer]) -> npt.NDArray[np.float64]:
    alive = torch.ones(size, dtype=torch.bool)
    scores = torch.full((size,), np.inf, dtype=torch.float64)
    reached, each = 0.0, -(-size // ROUNDS)
    while int(alive.sum()) > 1:
        costs = torch.stack([layer.costs(alive) for layer in layers]).sum(0)
        costs[~alive] = np.inf
        gone = torch.argsort(costs, stable=True)[: min(each, int(alive.sum()) - 1)]
        # Later ones never count for less: equal scores would be told apart by their place, so each is a little above the last.
        rising = torch.cummax(torch.cat([torch.tensor([reached], dtype=torch.float64), costs[gone].clamp_min(0)]), 0).values[1:]
        scores[gone] = rising * (1 + 1e-9 * torch.arange(1, len(gone) + 1)) + 1e-15
        reached = float(scores[gone[-1]])
        alive[gone] = False
        for layer in layers:
            layer.remove(gone)
    scores[alive] = reached * 2 + 1e-12
    return scores.numpy()
