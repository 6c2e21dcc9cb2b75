"""A layer's rows gathered by what they are for, and the layer repaired by what fits them best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fxprune.records import LayerRepair
from fxprune.repair.clipping import Clipped, Rows
from fxprune.repair.layers import Layer
from fxprune.repair.least_squares import Moments, fitted
from fxprune.repair.matrices import set_matrices
from fxprune.repair.splitting import FIT

WIDE = 2304  # features beyond which a change is looked for among the ``RANK`` main directions of the inputs alone
RANK = 1024


class Folds:
    """The moments of a layer by role. Of many features only the main directions of the inputs are kept.

    ``refit``: whether the layer's weights may change, or its constant alone. ``features``: how many the layer has, by group.
    """

    def __init__(self, refit: bool, features: int) -> None:
        self.refit = refit
        self.sums = [Moments(products=refit) for _ in range(3)]
        self.basis: Tensor | None = None
        self._waiting: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._wide = refit and features > WIDE

    def add(self, role: int, x: Tensor, p: Tensor, r: Tensor) -> None:
        """Take in rows of what the layer reads, of what it gives and of what that lacks, as ``Moments.add`` does."""
        if not self._wide:
            self.sums[role].add(x, p, r)
            return
        self._waiting.append((role, x, p, r))
        if self.basis is not None or sum(one.shape[1] for at, one, _, _ in self._waiting if at == FIT) >= 2 * RANK:
            self._flush()

    def repair(self, one: Layer, weights: Tensor, again: Callable[[], Iterable[Rows]] | None = None) -> LayerRepair:
        """Give ``one``, whose weights are ``weights``, what serves the rows that were not fitted best: new weights, a constant, or nothing.

        Errors count as much as they are after the BatchNorm behind it; where ``again`` gives the rows once more, behind its ReLU.
        """
        self._flush()
        if not any(sums.rows for sums in self.sums):  # code that looks at values called it on no batch
            return LayerRepair("sliced", None, 0.0, 0.0)
        gain = one.gain().float()
        counts = gain.square().cpu().double().unflatten(0, (len(weights), -1)) if gain.ndim else 1.0
        fit = fitted(self.sums, counts, takes_shift=one.takes_shift, refit=self.refit)
        if again is not None and one.clip is not None and fit.change is not None and fit.shift is not None:
            scales = (t.float().unflatten(0, (len(weights), 1, -1)) if t.ndim else t for t in (gain, one.constant()))
            fit = Clipped(one.clip, *scales).fit(fit, self.sums, lambda: self._in_basis(again()))
        if fit.change is not None:
            change = fit.change if self.basis is None else fit.change @ self.basis.cpu().double().mT
            set_matrices(one.form, one.weight, (weights.cpu().double() + change).to(one.weight))
        if fit.shift is not None:
            one.add_shift(fit.shift.flatten())
        if one.norm is not None and not fit.clipped:
            got, wanted = (v.flatten().to(one.norm.var) for v in fit.variances)
            # A fit varies less than what it is fitted to. Half way back, as deviations go, keeps most: measured on EfficientNet-Lite0.
            one.norm.var.mul_(torch.where(wanted > 0, got / wanted.clamp_min(1e-30), 1.0).sqrt().clamp(1e-2, 1e2))
        done = "fitted" if fit.change is not None else "shifted" if fit.shift is not None else "sliced"
        energy = max(fit.energy, 1e-30)
        return LayerRepair(done, fit.ridge, fit.before / energy, fit.after / energy)

    def _in_basis(self, rows: Iterable[Rows]) -> Iterator[Rows]:
        for role, x, p, r, beside in rows:
            yield role, x if self.basis is None else x @ self.basis, p, r, beside

    def _flush(self) -> None:
        if self.basis is None and self._waiting:
            rows = torch.cat([x for role, x, _, _ in self._waiting if role == FIT], 1)
            rank = min(RANK, *rows.shape[1:])
            torch_state = torch.random.get_rng_state()
            try:
                torch.manual_seed(0)
                self.basis = torch.stack([torch.svd_lowrank(group, q=rank, niter=1)[2] for group in rows])
            finally:
                torch.random.set_rng_state(torch_state)
        for role, x, p, r in self._waiting:
            assert self.basis is not None
            self.sums[role].add(x @ self.basis, p, r)
        self._waiting = []
