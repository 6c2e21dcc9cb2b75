"""What was measured rather than counted: once in a search, and kept in its checkpoint, since a second measurement gives another number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fxprune.driver.budget import Budget
from fxprune.driver.problem import Clock, Cost, IntArray, Metrics

LATENCY = "latency"  # the only cost that is measured


class Measured:
    """The costs of a problem, with the latency of each removal vector measured once: when it is looked up, or by ``clock`` when asked for.

    ``wholes``: what the latencies are shares of, see ``Problem.measured``; the same mapping, which ``restore`` fills.
    """

    def __init__(self, cost: Cost, wholes: dict[str, float], clock: Clock | None = None) -> None:
        self.cost, self.wholes, self.clock = cost, wholes, clock
        self.shares: dict[tuple[int, ...], float] = {}

    def __call__(self, removed: IntArray) -> Metrics:
        return MeasuredCosts(self, removed, self.cost(removed))

    def share(self, removed: IntArray) -> float:
        """The latency of a removal vector, measured now where it has not been; what is predicted goes by it from now on."""
        assert self.clock is not None, "only a predicted latency is measured when it is asked for"
        key = tuple(removed.tolist())
        share = self.shares.pop(key) if key in self.shares else self.clock.share(removed)
        self.shares[key] = share  # the newest
        self.clock.correct(self._points())
        return share

    def confirm(self, removed: IntArray) -> float:
        """The latency of a vector that was measured, measured once more: the mean counts. One measurement may be lucky, and those that
        look right are the lucky ones."""
        assert self.clock is not None, "only a predicted latency is measured when it is asked for"
        key = tuple(removed.tolist())
        self.shares[key] = (self.shares[key] + self.clock.share(removed)) / 2
        self.clock.correct(self._points())
        return self.shares[key]

    def knows(self, removed: IntArray) -> bool:
        """Whether the latency of a removal vector was measured."""
        return tuple(removed.tolist()) in self.shares

    def around(self, budget: Budget) -> tuple[IntArray, IntArray] | None:
        """Of the vectors that were measured, and the original, those nearest to the targets of ``budget``: above them, and below."""
        known = {budget.excess(removed): removed for removed in (budget.space.zeros(), *(one for one, _ in self._points()))}
        above, below = [e for e in known if e > 0], [e for e in known if e <= 0]
        return (known[min(above)], known[max(below)]) if above and below else None

    def _points(self) -> list[tuple[IntArray, float]]:
        return [(np.array(key, dtype=np.int64), share) for key, share in self.shares.items()]

    def state(self) -> dict[str, Any]:
        """What was measured as JSON."""
        return {"wholes": dict(self.wholes), "shares": [[list(key), share] for key, share in self.shares.items()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state`` returned."""
        self.wholes.update(state["wholes"])
        self.shares = {tuple(key): share for key, share in state["shares"]}
        if self.clock is not None and self.shares:
            self.clock.correct(self._points())


class MeasuredCosts(Mapping[str, float]):
    def __init__(self, measured: Measured, removed: IntArray, costs: Metrics) -> None:
        self.measured, self.key, self.costs = measured, tuple(removed.tolist()), costs

    def __getitem__(self, name: str) -> float:
        if name != LATENCY:
            return self.costs[name]
        known = self.measured.shares
        if self.key not in known:
            if self.measured.clock is not None:
                return self.costs[name]
            known[self.key] = float(self.costs[name])
        return known[self.key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.costs)

    def __len__(self) -> int:
        return len(self.costs)
