"""From removal vectors to outcomes: score what is new, look costs up, compute rewards, count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from fxprune.driver.budget import Budget
from fxprune.driver.config import Reward
from fxprune.driver.executors.base import Executor
from fxprune.driver.levels import Levels, survivors
from fxprune.driver.memo import Memo
from fxprune.driver.problem import IntArray, Metrics, Problem
from fxprune.driver.strategies.base import Scored
from fxprune.errors import FAULTS, EvaluationError, SearchError, in_a_line, network_without


class Evaluator:
    """Scores each architecture once. ``count``: scorings made in all, over memo clearings and resumed runs.

    ``rough``: go by the problem's rough score, where there is one, for all but ``finals``.
    """

    def __init__(self, problem: Problem, reward: Reward, executor: Executor, *, rough: bool = False) -> None:
        self.problem = problem
        self.rough = problem.rough if rough else None
        self.score = self.rough or problem.score
        self.reward = reward
        self.executor = executor
        self.memo = Memo()
        self.count = 0
        self.levels = Levels([*problem.rungs, self.score]) if problem.rungs else None

    def new(self, vectors: Sequence[IntArray]) -> list[IntArray]:
        """Those of ``vectors`` that have yet to be scored, each once, in order."""
        unique = {tuple(v.tolist()): v for v in vectors if v not in self.memo}
        return list(unique.values())

    def __call__(self, vectors: Sequence[IntArray], budget: Budget) -> list[Scored]:
        """An outcome for every vector, in order. Raises ``EvaluationError`` for a score that is not a finite number."""
        new = self.new(vectors)
        for vector, scored in zip(new, self._scored(new), strict=True):
            self.memo[vector] = self._checked(vector, scored)
            self.count += 1
        return [self.outcome(vector, budget) for vector in vectors]

    def _scored(self, vectors: Sequence[IntArray]) -> list[Metrics]:
        if self.levels is None or self.score is not self.levels.scores[-1]:
            return self.executor.map(self.score, vectors)
        return self.levels.map(self.executor, len(self.levels.scores) - 1, vectors)

    def best_by_rungs(self, vectors: Sequence[IntArray], wanted: int, budget: Budget) -> list[int]:
        """The places of the ``wanted`` vectors that the cheaper scores let pass, in rising order; these scorings are not counted."""
        levels = self.levels
        if levels is None:
            return list(range(min(wanted, len(vectors))))

        def judged(level: int, given: Sequence[IntArray]) -> list[float]:
            metrics = levels.map(self.executor, level, given)
            return [self._rewarded(v, self._checked(v, m), budget).reward for v, m in zip(given, metrics, strict=True)]

        return survivors(vectors, wanted, len(levels.scores) - 1, judged)

    def finals(self, vectors: Sequence[IntArray], budget: Budget) -> list[Scored]:
        """The outcomes by the problem's own score, whatever the search goes by; they are not kept among the others."""
        if self.rough is None:
            return self(vectors, budget)
        memo, rough = self.memo, self.score
        self.memo, self.score = Memo(), self.problem.score
        self.executor.reset()
        outcomes = self(vectors, budget)
        self.memo, self.score = memo, rough
        self.executor.reset()
        return outcomes

    def outcome(self, vector: IntArray, budget: Budget) -> Scored:
        """The outcome of a vector that was scored."""
        return self._rewarded(vector, self.memo[vector], budget)

    def _rewarded(self, vector: IntArray, scored: Metrics, budget: Budget) -> Scored:
        metrics = _Lookup({**scored, **budget.costs(vector)}, budget, vector)
        try:
            value = self.reward(metrics)
        except KeyError as error:
            raise SearchError(f"the reward function asks for a metric that there is not: {error.args[0]}") from error
        except FAULTS as error:
            raise EvaluationError(f"the reward function raised {in_a_line(error)}") from error
        if not math.isfinite(value):
            raise EvaluationError(f"the reward of {network_without(int(vector.sum()))} is {value}; check the reward function")
        return Scored(vector, float(value), metrics.found)

    def forget(self) -> None:
        """The network's weights changed: earlier scores no longer hold."""
        self.memo.clear()
        self.executor.reset()

    @staticmethod
    def _checked(vector: IntArray, scored: Metrics) -> dict[str, float]:
        metrics = {str(name): float(value) for name, value in scored.items()}
        if "accuracy" not in metrics:
            raise EvaluationError(f"score returned {', '.join(metrics) or 'nothing'} but no 'accuracy', the figure that is searched for")
        wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
        if wrong:
            raise EvaluationError(
                f"the score {wrong[0]!r} of {network_without(int(vector.sum()))} is {metrics[wrong[0]]}; "
                "check the evaluation, and the network's outputs for overflow"
            )
        return metrics


class _Lookup(Mapping[str, float]):
    """The metrics a reward function sees: what is known, and any other cost the moment it is asked for (latency is measured)."""

    def __init__(self, found: dict[str, float], budget: Budget, vector: IntArray) -> None:
        self.found = found
        self._budget = budget
        self._vector = vector

    def __getitem__(self, name: str) -> float:
        if name not in self.found:
            try:
                self.found[name] = self._budget.remaining(self._vector, name)
            except SearchError as error:
                raise KeyError(str(error)) from error
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)
