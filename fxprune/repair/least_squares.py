"""Sums over calibration rows, added up batch by batch, and the weights that fit them best in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # features: narrower blocks of a product would be slower than what they save
RIDGE = 1e-2  # of the mean variance of the features: how strongly a re-fitted weight is held to what it was


class Moments:
    """First and second moments of inputs x and wanted outputs y, both as (groups, rows, ...); their memory does not grow with the rows."""

    def __init__(self) -> None:
        self.rows = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor, *, products: bool = True) -> None:
        """Take in rows ``x`` (groups, rows, features) and ``y`` (groups, rows, outputs); without ``products`` only their means."""
        self.rows += x.shape[1]
        found = {"x": x.sum(1), "y": y.sum(1)}
        if products:
            found |= {"xx": _gram(x), "yx": y.transpose(1, 2) @ x}
        for name, value in found.items():
            exact = value.cpu().double()  # not every accelerator has doubles
            self._sums[name] = self._sums[name] + exact if name in self._sums else exact

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Means of x (groups, features) and of y (groups, outputs)."""
        return self._sums["x"] / self.rows, self._sums["y"] / self.rows

    def covariance(self) -> Tensor:
        """Covariance of x, (groups, features, features)."""
        mean = self.means[0]
        return self._sums["xx"] / self.rows - mean.unsqueeze(2) * mean.unsqueeze(1)

    def fitted(self, weights: Tensor, *, centred: bool) -> Tensor:
        """The weights (groups, outputs, features) that predict y from x best, by least squares held to ``weights`` by a ridge.

        ``centred``: a constant is fitted along with them (``shift`` gives it), else y is predicted by the products alone.
        """
        xx, yx = self._sums["xx"] / self.rows, self._sums["yx"] / self.rows
        mean_x, mean_y = self.means
        ridge = RIDGE * self.covariance().diagonal(dim1=1, dim2=2).mean(1)
        if centred:
            xx, yx = self.covariance(), yx - mean_y.unsqueeze(2) * mean_x.unsqueeze(1)
        start = weights.cpu().double()
        # A feature that never varies has no say: the floor keeps it solvable, and its weight where it was.
        held = xx + ridge.clamp_min(1e-12)[:, None, None] * torch.eye(xx.shape[1], dtype=xx.dtype)
        change: Tensor = torch.linalg.solve(held, (yx - start @ xx).transpose(1, 2)).transpose(1, 2)
        return start + change

    def shift(self, weights: Tensor) -> Tensor:
        """The constant (groups x outputs) by which the mean prediction of ``weights``, without a bias, misses the mean of y."""
        mean_x, mean_y = self.means
        return (mean_y - (weights.cpu().double() @ mean_x.unsqueeze(2)).squeeze(2)).flatten()


def _gram(x: Tensor) -> Tensor:
    """The products of all features with each other, (groups, features, features), of rows (groups, rows, features).

    Only blocks on and above the diagonal are multiplied, the others are their mirror: little more than half of the work.
    """
    features = x.shape[2]
    step = max(BLOCK, -(-features // 8))
    found = x.new_empty(x.shape[0], features, features)
    for start in range(0, features, step):
        end = start + step
        found[:, start:end, start:] = x[:, :, start:end].transpose(1, 2) @ x[:, :, start:]
        found[:, end:, start:end] = found[:, start:end, end:].transpose(1, 2)
    return found
