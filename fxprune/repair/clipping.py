"""Fits of which only counts what a ReLU behind the layer lets through.

Where the original's response is below zero, any response below zero is as good (Zhang 2015, https://arxiv.org/abs/1505.06798, sec. 2.2, who
alternate between responses and weights). The squared error behind the clip is bounded from above by a plain one, with an aim that follows
the fit: the original's response where that passes, elsewhere the fit's own as far as it is clipped. So each round is a least-squares fit
with the products of the features that are known already, and no round makes what is fitted worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxprune.repair.least_squares import Fit, Moments
from fxprune.repair.splitting import JUDGE

Rows = tuple[int, Tensor, Tensor, Tensor, Tensor | None]
"""Their role; features x (groups, rows, features); what the layer gives p, what that lacks r, and what it is added to, as outputs."""

ROUNDS = 4  # more change little
FAINT = 1e-3  # a channel that its BatchNorm scales by less corrects no other branch


@dataclass(frozen=True)
class Clipped:
    """``bounds``: what passes. ``gain``, ``constant``: an output u of the layer comes to gain * u + constant there; each of shape
    (groups, 1, outputs) or a single number."""

    bounds: tuple[float, float]
    gain: Tensor
    constant: Tensor

    def fit(self, plain: Fit, folds: Sequence[Moments], rows: Callable[[], Iterable[Rows]]) -> Fit:
        """The best of ``plain``, a fit with a change and a constant, and of some rounds from there, on rows that were not fitted.

        Args:
            plain: The fit that begins.
            folds: Moments of the rows by role.
            rows: Gives the rows again, as often as they are asked for, features as in ``folds``.
        """
        assert plain.change is not None and plain.shift is not None
        whole = folds[0] + folds[1]
        judged = JUDGE if folds[JUDGE].rows else None
        best, lowest = plain, float("inf")
        change, shift = plain.change, plain.shift
        for number in range(ROUNDS + 1):
            found = self._pass(change, shift, rows(), judged)
            if found.after >= lowest:
                break
            lowest = found.after
            best = replace(plain, change=change, shift=shift, before=found.before, after=found.after, energy=found.energy, clipped=True)
            if number < ROUNDS:
                sums = whole.aimed(found.r, found.rx)
                change = sums.changes([plain.ridge or 0.0], centred=True)[0]
                shift = sums.shift(change)
        return best

    def _pass(self, change: Tensor, shift: Tensor, rows: Iterable[Rows], judged: int | None) -> _Sums:
        low, high = self.bounds
        strong = self.gain.abs() > FAINT
        sums = _Sums()
        moved: tuple[Tensor, Tensor] | None = None
        for role, x, p, r, beside in rows:
            if moved is None:
                moved = change.to(x).transpose(1, 2), shift.to(x).unsqueeze(1)
            still = self.constant if beside is None else self.constant + beside
            wanted = self.gain * (p + r) + still
            now = p + x @ moved[0] + moved[1]
            given = self.gain * now + still
            if judged is None or role == judged:
                passed = wanted.clamp(low, high)
                sums.judge((self.gain * p + still).clamp(low, high) - passed, given.clamp(low, high) - passed, passed)
            if role != JUDGE:
                aim = torch.where(wanted <= low, given.clamp(max=low), torch.where(wanted >= high, given.clamp(min=high), wanted))
                sums.fit(torch.where(strong, (aim - given) / self.gain + now - p, r), x)
        return sums


class _Sums:
    """Of one pass: squared errors behind the clip, as sliced and as fitted, the variance of what is wanted there, and the next aim."""

    def __init__(self) -> None:
        self.r, self.rx = torch.zeros(()), torch.zeros(())
        self.before = self.after = 0.0
        self._rows = 0
        self._square, self._mean = torch.zeros(()), torch.zeros(())

    def judge(self, sliced: Tensor, fitted: Tensor, wanted: Tensor) -> None:
        count = self._rows + wanted.shape[1]
        self.before += (float(sliced.double().square().sum()) - self.before * wanted.shape[1]) / count
        self.after += (float(fitted.double().square().sum()) - self.after * wanted.shape[1]) / count
        self._square = self._square + wanted.double().square().sum(1).cpu()
        self._mean = self._mean + wanted.double().sum(1).cpu()
        self._rows = count

    def fit(self, r: Tensor, x: Tensor) -> None:
        self.r = self.r + r.sum(1).cpu().double()
        self.rx = self.rx + (r.transpose(1, 2) @ x).cpu().double()

    @property
    def energy(self) -> float:
        rows = max(1, self._rows)
        return float((self._square / rows - (self._mean / rows).square()).sum())
