"""Which of the candidates a search ends with."""

from __future__ import annotations

from fxprune.driver.scoring import Evaluator
from fxprune.driver.strategies.base import Scored, Strategy


def best_of(strategy: Strategy, evaluator: Evaluator, most: int, *, keep_best: bool) -> list[Scored]:
    """The candidates that a search may end with, the best first, at most ``most``; at least one: with ``keep_best`` those on target.

    Without ``keep_best`` it is the architecture that the strategy ends on, as in the paper. Where nothing is on target it is what comes
    closest to it, and never the unpruned original if any other candidate was scored.
    """
    budget = strategy.budget
    own = strategy.result()
    ended = [] if own is None else evaluator([own], budget)
    if ended and not keep_best:
        return ended
    scored = [evaluator.outcome(vector, budget) for vector in evaluator.memo]
    on_target = [outcome for outcome in scored if budget.met(outcome.removed)]
    if on_target:
        return sorted(on_target, key=lambda outcome: -outcome.reward)[:most]
    pruned = [outcome for outcome in scored if budget.space.rounded(outcome.removed).any()]
    return [min(pruned or scored, key=lambda outcome: abs(budget.excess(outcome.removed)))]
