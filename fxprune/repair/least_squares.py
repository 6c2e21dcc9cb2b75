"""Changes of a layer's weights by ridge least squares: sums over calibration rows, and the strength that serves rows that were not fitted.

What is fitted is the *change* of the sliced weights, to what the sliced layer lacks, so that the ridge (Hoerl and Kennard 1970,
https://doi.org/10.1080/00401706.1970.10488634) pulls towards the slice and not to zero. Its strength is chosen on rows of other batches
than those fitted: rows of one image are no independent samples, so leaving out single rows, as the closed form for leave-one-out does,
would choose it far too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64  # features: narrower blocks of a product would be slower than what they save
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the mean variance of the features
FLOOR = 1e-12  # of the same: a feature that never varies has no say, and its weight stays where it was


class Moments:
    """Sums over rows of features x, of what their layer gives p, and of what that lacks r, as (groups, rows, ...).

    Their memory does not grow with the rows. ``products``: whether the features' products are summed, or only the means.
    """

    def __init__(self, *, products: bool = True) -> None:
        self.rows, self.products = 0, products
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, p: Tensor, r: Tensor) -> None:
        """Take in rows ``x`` (groups, rows, features), ``p`` and ``r`` (groups, rows, outputs)."""
        self.rows += r.shape[1]
        y = p + r
        found = {"p": p.sum(1), "r": r.sum(1), "pp": p.square().sum(1), "rr": r.square().sum(1), "yy": y.square().sum(1)}
        if self.products:
            found |= {"x": x.sum(1), "xx": gram(x), "rx": r.transpose(1, 2) @ x, "px": p.transpose(1, 2) @ x}
        for name, value in found.items():
            exact = value.cpu().double()  # not every accelerator has doubles
            self._sums[name] = self._sums[name].add_(exact) if name in self._sums else exact

    def mean(self, name: str) -> Tensor:
        """The mean of "x", "p", "r", of squares "pp", "rr", "yy", or of products "xx", "rx", "px"."""
        return self._sums[name] / max(1, self.rows)

    def __add__(self, more: Moments) -> Moments:
        both = Moments(products=self.products)
        both.rows = self.rows + more.rows
        names = {**self._sums, **more._sums}
        both._sums = {n: sum((m._sums[n] for m in (self, more) if n in m._sums), torch.zeros(())) for n in names}
        return both

    def covariance(self) -> Tensor:
        """Of x, (groups, features, features)."""
        mean = self.mean("x")
        return self.mean("xx") - mean.unsqueeze(2) * mean.unsqueeze(1)

    def changes(self, ridges: Sequence[float], *, centred: bool) -> list[Tensor]:
        """For each strength the change of the weights, (groups, outputs, features), that makes up best for r.

        ``centred``: a constant goes along with it (``shift`` gives it), else r is predicted by the products alone.
        """
        xx, rx = self.mean("xx"), self.mean("rx")
        spread = self.covariance().diagonal(dim1=1, dim2=2)
        if centred:
            xx, rx = self.covariance(), rx - self.mean("r").unsqueeze(2) * self.mean("x").unsqueeze(1)
        else:
            spread = xx.diagonal(dim1=1, dim2=2)
        scale = spread.mean(1).clamp_min(1e-30)[:, None, None]
        eye = torch.eye(xx.shape[1], dtype=xx.dtype)
        found = []
        for ridge in ridges:
            factor, failed = torch.linalg.cholesky_ex(xx + scale * max(ridge, FLOOR) * eye)
            bad = bool(failed.any())
            found.append(torch.zeros_like(rx) if bad else torch.cholesky_solve(rx.transpose(1, 2), factor).transpose(1, 2))
        return found

    def aimed(self, r: Tensor, rx: Tensor) -> Moments:
        """The same rows with another aim: ``r`` (groups, outputs), ``rx`` (groups, outputs, features), summed over them."""
        found = Moments(products=self.products)
        found.rows, found._sums = self.rows, {**self._sums, "r": r, "rx": rx}
        return found

    def shift(self, change: Tensor | None) -> Tensor:
        """The constant (groups, outputs) by which the mean of r misses what ``change`` predicts."""
        mean = self.mean("r")
        return mean if change is None else mean - (change @ self.mean("x").unsqueeze(2)).squeeze(2)

    def errors(self, change: Tensor | None, shift: Tensor | float) -> Tensor:
        """Mean squares (groups, outputs) of what is still lacking once the weights change and ``shift`` is added."""
        found, rest = self.mean("rr"), self.mean("r")
        if change is not None:
            found = found + ((change @ self.mean("xx") - 2 * self.mean("rx")) * change).sum(2)
            rest = rest - (change @ self.mean("x").unsqueeze(2)).squeeze(2)
        error: Tensor = found - 2 * shift * rest + shift * shift
        return error.clamp_min(0)

    def variances(self, change: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of what the layer gives once its weights change, and of what is wanted of it: p + r; each (groups, outputs)."""
        square, mean = self.mean("pp"), self.mean("p")
        if change is not None:
            square = square + ((change @ self.mean("xx") + 2 * self.mean("px")) * change).sum(2)
            mean = mean + (change @ self.mean("x").unsqueeze(2)).squeeze(2)
        wanted = self.mean("yy") - (self.mean("p") + self.mean("r")).square()
        return (square - mean.square()).clamp_min(0), wanted.clamp_min(0)


@dataclass(frozen=True)
class Fit:
    """What is to be done to a layer, and the errors of left-out rows, weighted and summed over outputs.

    ``change``: of the weights as matrices, or None. ``shift``: the constant (groups, outputs), or None where it stays as sliced.
    ``ridge``: the strength chosen. ``before``, ``after``: mean squared error on left-out rows, as sliced and as fitted. ``energy``: the
    variance of what is wanted there. ``variances``: by output (groups, outputs), of what the layer then gives and of what is wanted.
    ``clipped``: whether errors are those behind a ReLU (``fxprune.repair.clipping``).
    """

    change: Tensor | None
    shift: Tensor | None
    ridge: float | None
    before: float
    after: float
    energy: float
    variances: tuple[Tensor, Tensor]
    clipped: bool = False


def fitted(folds: Sequence[Moments], weight: Tensor | float, *, takes_shift: bool, refit: bool) -> Fit:
    """The best of leaving a layer as sliced, moving its constant, and changing its weights, on rows that were not fitted.

    Args:
        folds: Moments of three sets of batches: to fit, to choose the strength by, and to decide by. Empty ones are done without.
        weight: What a squared error of each output counts, (groups, outputs).
        takes_shift: Whether the layer can be given a constant.
        refit: Whether its weights may change.
    """
    train, tune, judge = folds
    judge = judge if judge.rows else tune if tune.rows else train
    whole = train + tune if tune.rows else train

    def cost(sums: Moments, change: Tensor | None, shift: Tensor | float) -> float:
        return float((sums.errors(change, shift) * weight).sum())

    energy = float((judge.variances(None)[1] * weight).sum())
    before = cost(judge, None, 0.0)
    plain = whole.variances(None)
    options = [(before, Fit(None, None, None, before, before, energy, plain))]
    if takes_shift:
        shift = whole.shift(None)
        after = cost(judge, None, shift)
        options.append((after, Fit(None, shift, None, before, after, energy, plain)))
    if refit:
        ridge = RIDGES[1]
        if tune.rows:
            tried = zip(RIDGES, train.changes(RIDGES, centred=takes_shift), strict=True)
            ridge = min((cost(tune, change, train.shift(change) if takes_shift else 0.0), ridge) for ridge, change in tried)[1]
        change = whole.changes([ridge], centred=takes_shift)[0]
        moved = whole.shift(change) if takes_shift else None
        after = cost(judge, change, 0.0 if moved is None else moved)
        options.append((after, Fit(change, moved, ridge, before, after, energy, whole.variances(change))))
    return min(options, key=lambda option: option[0])[1]


def gram(x: Tensor) -> Tensor:
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
