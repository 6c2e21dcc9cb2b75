"""Table: the allocation that an error table reads off, brought onto the budget; no network is scored to find it."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.driver.budget import Budget
from fxprune.driver.problem import IntArray
from fxprune.driver.strategies.base import Scored, Strategy
from fxprune.errors import SearchError

HALVINGS = 10  # of the range in which the multiply-accumulates are looked for that meet a bound on another cost


class Table(Strategy):
    """One candidate: the error table's allocation on the budget."""

    def propose(self) -> list[IntArray]:
        return [from_table(self.budget)] if self.step == 0 else []

    def again(self) -> IntArray:
        return from_table(self.budget)

    def learn(self, outcomes: Sequence[Scored]) -> None:
        """Nothing to learn from a single candidate."""


def from_table(budget: Budget) -> IntArray:
    """The removal vector that the problem's error table comes to. Raises ``SearchError`` where it has none.

    A cost that the table cannot bound, as a measured latency, is met by as many multiply-accumulates as it takes.
    """
    table = budget.space.table
    if table is None:
        raise SearchError('strategy "table" reads errors off calibration data; pass calibration=[inputs, ...], or choose another strategy')
    bounds = {target.metric: target.remaining for target in budget.targets if target.metric in table.metrics}
    found = budget.space.rounded(table.allocate(bounds)) if bounds else budget.space.zeros()
    if len(bounds) < len(budget.targets) and not budget.fits(found):
        low, high = 0.0, budget.remaining(found, "macs")
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            tried = budget.space.rounded(table.allocate({**bounds, "macs": middle}))
            if budget.excess(tried) <= 0:
                low, found = middle, tried
            else:
                high = middle
        if not budget.fits(found):
            found = budget.space.rounded(table.allocate({**bounds, "macs": 0.0}))
    return budget.refined(found, budget.space.zeros())


def from_trials(budget: Budget) -> IntArray | None:
    """The removal vector of the best allocation that was tried out, the table's own among them; None where none could be."""
    if budget.space.tried is None:
        return None
    found = budget.space.tried({target.metric: target.remaining for target in budget.targets})
    return None if found is None else budget.refined(budget.space.rounded(found), budget.space.zeros())
