"""Widths under a budget from an error table: a greedy knapsack with exact marginal costs, improved by giving back and taking elsewhere.

What a step saves depends on how wide its neighbours are (a convolution's cost is a product of two widths), and what it breaks on what
is broken already (effects of several groups add up or cancel out), so both are computed again after every step. Steps of several sizes
are compared, since most of a group can be as cheap to lose as half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Shares = Callable[[str, IntArray], FloatArray]
"""(metric, removals (allocations, groups)) -> what is left of it, as a share of the original, (allocations,)."""

STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # how many allowed widths further a step may go
ROUNDS = 4  # rounds of improvement at most; more find nothing


class Knapsack:
    """Chooses widths that change the output least.

    ``effects``: for each group, what removing 0, 1, ... units changes, (its units, samples); see ``ErrorTable.along``.
    ``allowed``: for each group the removals that may be chosen, rising, the first of them 0.
    """

    def __init__(self, effects: Sequence[FloatArray], allowed: Sequence[IntArray], shares: Shares) -> None:
        self.effects, self.allowed, self.shares = effects, allowed, shares
        width = max((len(one) for one in allowed), default=0)
        self._padded = np.array([np.pad(one, (0, width - len(one))) for one in allowed], dtype=np.int64).reshape(len(allowed), width)

    def allocate(self, bounds: Mapping[str, float], start: IntArray | None = None) -> IntArray:
        """Units to remove from each group so that at most these shares of the metrics are left, (groups,); where that cannot be, all that
        may go. ``start``: removals from which it is improved; left out, it begins with the whole network."""
        begun = np.zeros(len(self.effects), dtype=np.int64)
        if start is not None:
            begun[:] = self._places(start)
        at = self._taken(begun, bounds, frozenset())
        best = self.error(at)
        for _ in range(ROUNDS):
            found = [self._without(at, i, steps, bounds) for i in np.flatnonzero(at).tolist() for steps in (1, 4, len(self.allowed[i]))]
            errors = [self.error(one) if self._over(one[None], bounds)[0] <= 0 else np.inf for one in found]
            if not found or min(errors) >= best * (1 - 1e-6):
                break
            at = found[int(np.argmin(errors))]
            best = self.error(at)
        return self._counts(at)

    def moved(self, removed: IntArray, group: int, wanted: int, bounds: Mapping[str, float]) -> IntArray:
        """Another allocation near ``removed``, (groups,): ``group`` loses about ``wanted`` units, and what that takes or leaves of the
        bounds is made up for by the others where least is broken. ``removed`` itself, where that is not possible."""
        at = self._places(removed)
        at[group] = int(np.abs(self.allowed[group] - wanted).argmin())
        alone = frozenset([group])
        at = self._taken(at, bounds, alone, alone)
        return self._counts(at) if float(self._over(at[None], bounds)[0]) <= 0 else removed

    def error(self, at: IntArray) -> float:
        """The mean squared change of the output; ``at``: places in ``allowed``."""
        return float((self._effect(at) ** 2).mean())

    def _without(self, at: IntArray, group: int, steps: int, bounds: Mapping[str, float]) -> IntArray:
        """``at`` with some of what the group lost given back and taken elsewhere instead."""
        back = at.copy()
        back[group] = max(0, back[group] - steps)
        return self._taken(back, bounds, frozenset([group]))

    def _taken(self, at: IntArray, bounds: Mapping[str, float], spared: frozenset[int], held: frozenset[int] = frozenset()) -> IntArray:
        """Take more until the bounds are met, each time where least is broken for what is saved; then give back what need not go.

        ``spared``: groups of which no more is taken. ``held``: groups to which nothing is given back.
        """
        at = at.copy()
        effect = self._effect(at)
        over = float(self._over(at[None], bounds)[0])
        while over > 0:
            moves, changed = self._moves(at, effect, spared)
            if not len(moves):
                break
            left = self._over(moves, bounds)
            saved = over - left
            broken = (changed**2).mean(1) - (effect**2).mean()
            useful = saved > 1e-12
            if not useful.any():
                break
            # What repairs while it saves comes first, and then what breaks least for what it saves.
            price = np.where(useful, broken / np.maximum(saved, 1e-12), np.inf)
            chosen = int(np.argmin(price))
            at, effect, over = moves[chosen], changed[chosen], float(left[chosen])
        return at if over > 0 else self._returned(at, bounds, held)

    def _returned(self, at: IntArray, bounds: Mapping[str, float], held: frozenset[int]) -> IntArray:
        """Give back, step by step, what repairs most while the bounds stay met."""
        effect = self._effect(at)
        while True:
            groups = np.array([i for i in np.flatnonzero(at).tolist() if i not in held], dtype=np.int64)
            moves = np.repeat(at[None], len(groups), 0)
            moves[np.arange(len(groups)), groups] -= 1
            fits = self._over(moves, bounds) <= 0 if len(moves) else np.zeros(0, dtype=bool)
            if not fits.any():
                return at
            moves, groups = moves[fits], groups[fits]
            changed = np.stack([effect + self._step_back(i, int(at[i])) for i in groups.tolist()])
            errors = (changed**2).mean(1)
            chosen = int(np.argmin(errors))
            if errors[chosen] > (effect**2).mean() * (1 + 1e-9) + 1e-12:
                return at
            at, effect = moves[chosen], changed[chosen]

    def _moves(self, at: IntArray, effect: FloatArray, spared: frozenset[int]) -> tuple[IntArray, FloatArray]:
        """Every step that may be taken, as allocations (steps, groups), and their effects (steps, samples)."""
        moves, changed = [], []
        for i, allowed in enumerate(self.allowed):
            left = len(allowed) - 1 - int(at[i])
            if not left or i in spared:
                continue
            rest = effect - self.effects[i][allowed[at[i]]]
            for step in [s for s in STEPS if s < left] + [left]:
                move = at.copy()
                move[i] += step
                moves.append(move)
                changed.append(rest + self.effects[i][allowed[move[i]]])
        return np.array(moves, dtype=np.int64).reshape(-1, len(at)), np.array(changed).reshape(-1, len(effect))

    def _step_back(self, group: int, place: int) -> FloatArray:
        """What it changes to give one step of a group back."""
        effect, allowed = self.effects[group], self.allowed[group]
        found: FloatArray = effect[allowed[place - 1]] - effect[allowed[place]]
        return found

    def _effect(self, at: IntArray) -> FloatArray:
        found: FloatArray = np.sum([e[a[i]] for e, a, i in zip(self.effects, self.allowed, at, strict=True)], axis=0)
        return found

    def _places(self, removed: IntArray) -> IntArray:
        found = [np.searchsorted(allowed, n, side="right") - 1 for allowed, n in zip(self.allowed, removed, strict=True)]
        return np.array(found, dtype=np.int64)

    def _counts(self, at: IntArray) -> IntArray:
        return np.array([allowed[i] for allowed, i in zip(self.allowed, at, strict=True)], dtype=np.int64)

    def _over(self, at: IntArray, bounds: Mapping[str, float]) -> FloatArray:
        """How far allocations are above the bounds, in shares of the way to them, summed over the metrics that are; 0 where all are met."""
        removed = self._padded[np.arange(len(self.allowed)), at]
        found = np.zeros(len(at))
        for metric, bound in bounds.items():
            found += np.maximum(self.shares(metric, removed) - bound, 0) / max(1 - bound, 1e-9)
        return found
