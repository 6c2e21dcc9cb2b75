"""The budget: how far a removal vector is from the targets, and its projection onto them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fxprune.driver.problem import FloatArray, IntArray, Metrics, Space
from fxprune.driver.simplex import spread
from fxprune.driver.targets import Point
from fxprune.errors import SearchError

FINE = 0.25  # projections are refined until the slack is within this share of the tolerance
UNFIT = 1e6  # what is worse than any slack
FAINT = 1e-9  # a share so small that units go there when there are no others
WAY = 66  # points looked at between two vectors, both ends included
DEPTH, WIDTH = 8, 32  # how far, and from how many vectors at a time, one that meets the targets is looked for; coarse networks need it


class Budget:
    """The targets of one search over ``space``, all to be met at once.

    ``start``: where the way to the targets begins (the original network, or the previous point of a Pareto run).
    """

    def __init__(self, space: Space, targets: Point, tolerance: float = 0.01, start: IntArray | None = None) -> None:
        self.space = space
        self.targets = targets
        self.tolerance = tolerance
        self._known: dict[bytes, tuple[Metrics, dict[str, float]]] = {}
        self.start = space.zeros() if start is None else start
        self._from = {target.metric: self.remaining(self.start, target.metric) for target in targets}

    def remaining(self, removed: IntArray, metric: str) -> float:
        """What is left of ``metric``, as a share of the original; looked up once a vector, so a measured cost stays what it was."""
        key = removed.tobytes()
        if key not in self._known:
            self._known[key] = (self.space.cost(removed.copy()), {})
        cost, found = self._known[key]
        if metric not in found:
            found[metric] = 1 - self.space.sparsity(removed) if metric == "sparsity" else self._looked_up(cost, metric)
        return found[metric]

    def forget(self) -> None:
        """What costs are predicted to be has changed."""
        self._known.clear()

    def _looked_up(self, cost: Metrics, metric: str) -> float:
        try:
            value = float(cost[metric])
        except KeyError:
            raise SearchError(f"this problem has no cost named {metric!r}; it has {', '.join(sorted(cost)) or 'none'}") from None
        if not np.isfinite(value):
            raise SearchError(f"the cost {metric!r} came out as {value}; it must be a finite share of the original")
        return value

    def costs(self, removed: IntArray) -> dict[str, float]:
        """The costs that every record holds: MACs, parameters and what the targets name (remaining shares), and the channel sparsity."""
        names = dict.fromkeys(["macs", "params", *(target.metric for target in self.targets)])
        shares = {name: self.remaining(removed, name) for name in names if name != "sparsity"}
        return {**shares, "sparsity": self.space.sparsity(removed)}

    def excess(self, removed: IntArray, progress: float = 1.0) -> float:
        """How far ``removed`` is above its bounds after ``progress`` (0 to 1) of the way; negative below.

        The largest over the targets, in shares of the number that the user gave: at ``progress`` 1 and within ``tolerance`` of 0 every
        target is met, and the one that binds is met exactly enough. A cost with more slack than that counts by so much less.
        """
        worst = -np.inf
        for target in self.targets:
            begun = self._from[target.metric]
            bound = begun + progress * (min(target.remaining, begun) - begun)
            wider = max(1.0, self.space.slack.get(target.metric, 0.0) / self.tolerance)
            worst = max(worst, (self.remaining(removed, target.metric) - bound) / target.value / wider)
        return float(worst)

    def progress(self, removed: IntArray) -> float:
        """How much of the way from the start to the targets ``removed`` has come, 0 to 1."""
        ways = [(self._from[t.metric], self.remaining(removed, t.metric), t.remaining) for t in self.targets]
        return min(1.0, max(0.0, min((begun - now) / (begun - bound) if begun > bound else 1.0 for begun, now, bound in ways)))

    def __str__(self) -> str:
        return " ".join(str(target) for target in self.targets)

    def shown(self, removed: IntArray) -> str:
        """Where ``removed`` stands, in the terms of the targets."""
        return " ".join(f"{t.metric}={t.shown(self.remaining(removed, t.metric)):.4g}" for t in self.targets)

    def met(self, removed: IntArray) -> bool:
        """Whether ``removed`` meets the targets within the tolerance: not above, and not needlessly below."""
        return abs(self.excess(removed)) <= self.tolerance

    def fits(self, removed: IntArray) -> bool:
        """Whether nothing more has to go."""
        return self.excess(removed) <= self.tolerance

    def project(self, base: IntArray, action: FloatArray, progress: float = 1.0) -> IntArray:
        """Remove as many units from ``base``, spread by ``action``, as bring it just within the bounds; exactly so at ``progress`` 1.

        Where even the last unit would not do, all but one unit of every group go.
        """
        if self.excess(base, progress) <= 0:
            return base
        room = self.space.room - base
        low, high = 0, int(room.sum())
        while high - low > 1:  # costs fall as units go, so the boundary is found by bisection on their number
            middle = (low + high) // 2
            if self.excess(base + spread(action, middle, room), progress) <= 0:
                high = middle
            else:
                low = middle
        within = base + spread(action, high, room)
        return self.refined(within, base) if progress >= 1 else within

    def fitted(self, removed: IntArray) -> IntArray:
        """The vector on the budget that has the proportions of ``removed`` (of the group sizes where nothing is removed)."""
        widths, base = self.space.widths > 0, self.space.zeros()
        weights = np.where(widths, removed, 0) if removed[widths].any() else self.space.widths
        base[~widths] = removed[~widths]
        return self.project(base, np.maximum(weights / weights.sum(), FAINT))

    def uniform(self) -> IntArray:
        """The largest allocation on the budget with the same share of units removed from every group, to the unit."""
        return self.project(self.space.zeros(), np.maximum(self.space.widths / self.space.widths.sum(), FAINT))

    def refined(self, removed: IntArray, base: IntArray) -> IntArray:
        """Give units back until the slack is small; where that is not fine enough, look further around. By single units, or by as many as
        make a difference where channels are kept in multiples."""
        best = self.space.rounded(removed)
        badness = self._badness(best)
        while badness > FINE * self.tolerance:
            better = min(self._returns(best, base), key=self._badness, default=best)
            if self._badness(better) >= badness:
                break
            best, badness = better, self._badness(better)
        return best if badness <= self.tolerance else self._around(best, base)

    def _around(self, removed: IntArray, base: IntArray) -> IntArray:
        """What meets the targets at a few moves' distance, each of them a unit given back or taken; else what comes closest there."""
        best, beam, seen = removed, [removed], {removed.tobytes()}
        for _ in range(DEPTH):
            found = []
            for moved in (moved for one in beam for moved in (*self._returns(one, base), *self._takes(one))):
                if moved.tobytes() not in seen:
                    seen.add(moved.tobytes())
                    found.append(moved)
            beam = sorted(found, key=lambda one: abs(self.excess(one)))[:WIDTH]
            best = min([best, *beam], key=self._badness)
            if self._badness(best) <= self.tolerance:
                break
        return best

    def between(
        self, above: IntArray, below: IntArray, known: Callable[[IntArray], bool] = lambda removed: False, *, halfway: bool = False
    ) -> IntArray | None:
        """A vector on the way from one that does not fit to one that does, the groups moving one after the other by single steps.

        The one as far along, by what is predicted for those between, as the bounds are between the two ends; with ``halfway`` the one in
        the middle. None where nothing lies between but what is ``known``.
        """
        way = below - above
        moving = np.flatnonzero(way)
        ahead = np.zeros(len(way))
        ahead[moving] = (np.arange(len(moving)) + 0.5) / max(len(moving), 1)
        passed = {self.space.rounded(end).tobytes() for end in (above, below)}
        found: list[IntArray] = []
        for share in np.linspace(0, 1, WAY)[1:-1].tolist():
            moved = above + np.sign(way) * np.floor(np.abs(way) * share + ahead).astype(np.int64)
            stop = self.space.rounded(moved)
            if stop.tobytes() not in passed and not known(stop):
                passed.add(stop.tobytes())
                found.append(stop)
        if not found:
            return None
        if halfway:
            return found[len(found) // 2]
        predicted = np.array([self.excess(one) for one in found])
        high, low = self.excess(above), self.excess(below)
        wanted = predicted[0] + (predicted[-1] - predicted[0]) * high / (high - low)
        return found[int(np.argmin(np.abs(predicted - wanted)))]

    def _badness(self, removed: IntArray) -> float:
        """Slack below the bounds; then what is above them within the tolerance; then, worst, all that does not fit."""
        excess = self.excess(removed)
        return -excess if excess <= 0 else excess + (self.tolerance if excess <= self.tolerance else UNFIT)

    def _returns(self, removed: IntArray, base: IntArray) -> Iterator[IntArray]:
        for i in np.flatnonzero(removed > base):
            moved = removed.copy()
            moved[i] -= 1
            yield self.space.rounded(moved)

    def _takes(self, removed: IntArray) -> Iterator[IntArray]:
        for i in np.flatnonzero(removed < self.space.room):
            yield self._with_more(removed, int(i))

    def _with_more(self, removed: IntArray, group: int) -> IntArray:
        """The next larger removal from ``group``: one unit more, or as many as make a difference."""
        room = int(self.space.room[group] - removed[group])
        for count in range(1, min(self.space.grain, room) + 1):
            moved = removed.copy()
            moved[group] += count
            found = self.space.rounded(moved)
            if found[group] > removed[group]:
                return found
        return removed
