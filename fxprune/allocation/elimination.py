"""A group thinned out unit by unit: in which order units go, and what the weights that read them then are.

Backward elimination on the covariance of each reader's inputs: the unit goes whose loss, the other weights being refitted in closed form,
raises the weighted least-squares error of the original responses least (Hassibi 1993, Optimal Brain Surgeon, layer by layer; the weights of
the errors are those of the output channels). One inverse is updated along the way, so all widths of a group cost one factorisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-2  # of the mean variance of the features: how strongly a refitted weight is held to what it was


@dataclass
class Thinning:
    """A reader's weights while inputs are taken from them.

    ``weights``: (outputs, features), as refitted so far. ``inverse``: of the covariance of the features that are left; None where nothing
    is refitted, and then ``covariance`` is used. ``stakes``: (outputs,), what a squared error of each output channel counts.
    ``channels``, ``units``: its input channels in the group, and the unit of each. ``width``: features a channel has.
    """

    weights: Tensor
    inverse: Tensor | None
    covariance: Tensor
    stakes: Tensor
    width: int
    channels: Tensor
    units: Tensor

    @classmethod
    def of(
        cls, weights: Tensor, covariance: Tensor, stakes: Tensor, width: int, channels: Tensor, units: Tensor, rows: int, *, refitted: bool
    ) -> Thinning:
        """A reader with all its inputs. ``covariance``: (features, features); with ``refitted`` a ridge holds weights to what they were.

        The fewer ``rows`` a feature the covariance comes from, the more: what fits few rows to the letter would seem to cost nothing.
        """
        inverse = None
        if refitted:
            ridge = (RIDGE + len(covariance) / max(rows, 1)) * covariance.diagonal().mean().clamp_min(1e-12)
            inverse = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype))
        return cls(weights.clone(), inverse, covariance, stakes, width, channels, units)

    def costs(self, alive: Tensor) -> Tensor:
        """By unit, the error that its removal adds; of no meaning for those that are gone."""
        matrix = self.covariance if self.inverse is None else self.inverse
        count = len(matrix) // self.width
        blocks = matrix.reshape(count, self.width, count, self.width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)[self.channels].clone()
        own = self.weights.reshape(len(self.weights), count, self.width)[:, self.channels].permute(1, 2, 0)
        if self.inverse is None:
            through = blocks @ own
        else:
            blocks[~alive[self.units]] = torch.eye(self.width, dtype=blocks.dtype)
            through = torch.linalg.solve(blocks, own)
        each = ((through * own).sum(1) * self.stakes).sum(1)
        return torch.zeros(len(alive), dtype=each.dtype).index_add_(0, self.units, each)

    def remove(self, gone: Tensor) -> None:
        """Take the units ``gone`` out; the inverse is then that of what is left."""
        chosen = self.channels[torch.isin(self.units, gone)]
        columns = (chosen.unsqueeze(1) * self.width + torch.arange(self.width)).flatten()
        if self.inverse is not None:
            step = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])
            self.weights = self.weights - self.weights[:, columns] @ step
            self.inverse = self.inverse - self.inverse[:, columns] @ step
            self.inverse[columns], self.inverse[:, columns] = 0, 0
        self.weights[:, columns] = 0


def eliminated(size: int, readers: Sequence[Thinning], order: Tensor | None, each: int) -> Iterator[Tensor]:
    """Thin a group of ``size`` units out, ``each`` at a time; yields what went in every round, and all that is left of it last.

    ``order``: units in the order in which they are to go; None: by what they cost. ``readers`` are thinned out between rounds.
    """
    alive = torch.ones(size, dtype=torch.bool)
    done = 0
    while done < size - 1:
        count = min(each, size - 1 - done)
        if order is None:
            costs = torch.stack([reader.costs(alive) for reader in readers]).sum(0)
            costs[~alive] = torch.inf
            gone = torch.argsort(costs, stable=True)[:count]
        else:
            gone = order[done : done + count]
        for reader in readers:
            reader.remove(gone)
        alive[gone] = False
        done += count
        yield gone
