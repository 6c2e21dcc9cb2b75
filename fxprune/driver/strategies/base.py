"""The contract of a strategy: ask for removal vectors, be told what they scored, hand out its state. It sees numbers, not networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from fxprune.driver.budget import Budget
from fxprune.driver.config import SearchConfig
from fxprune.driver.problem import IntArray
from fxprune.errors import SearchError


@dataclass(frozen=True)
class Scored:
    """What one architecture scored. ``metrics`` holds "accuracy", the user's other figures, and the remaining shares of the costs."""

    removed: IntArray
    reward: float
    metrics: dict[str, float]

    @property
    def accuracy(self) -> float:
        return self.metrics["accuracy"]


class Strategy(ABC):
    """A search strategy. Subclasses write ``propose`` and ``learn``, and ``memory`` and ``recall`` if they remember anything.

    Whoever drives it calls ``ask``, scores the vectors, and calls ``tell`` with one outcome each, in order; ``ask`` returns an empty list
    when the strategy is done. Randomness comes from ``self.rng`` alone, which the state holds.
    """

    def __init__(self, budget: Budget, config: SearchConfig) -> None:
        self.budget = budget
        self.space = budget.space
        self.config = config
        self.rng = np.random.Generator(np.random.PCG64(config.seed))
        self.step = 0
        self._asked: list[IntArray] | None = None
        self.start()

    @abstractmethod
    def propose(self) -> list[IntArray]:
        """The next removal vectors to score; none when the strategy is done."""

    @abstractmethod
    def learn(self, outcomes: Sequence[Scored]) -> None:
        """Take in the outcomes of what ``propose`` returned, in its order."""

    def start(self) -> None:  # noqa: B027 - an optional hook
        """Set up what the strategy remembers; called once, before anything else."""

    def step_done(self) -> bool:
        """Whether the outcomes just learned closed a step (one record of the history). Each round is a step unless this says else."""
        return True

    def steps(self) -> int:
        """How many steps there will be, as far as is known."""
        return self.step + 1

    def progress(self) -> float:
        """How much of its work is done, 0 to 1."""
        return min(1.0, self.step / self.steps())

    def wanted(self, asked: int) -> int:
        """How many of the ``asked`` vectors are to be scored in full, where cheaper scores can choose among them."""
        return asked

    def narrowed(self, chosen: Sequence[int]) -> None:  # noqa: B027 - an optional hook
        """Only the vectors at these places of those proposed are scored in full and told."""

    def current(self) -> IntArray | None:
        """The architecture that the strategy stands on, from which it goes on and which ``recover`` trains; None if it has none."""
        return None

    def weights_changed(self) -> None:  # noqa: B027 - an optional hook
        """Called after recovery: earlier scores no longer hold."""

    def result(self) -> IntArray | None:
        """The vector that the strategy would end with now, on the budget; None to take the best that was scored."""
        return None

    def again(self) -> IntArray | None:
        """What it would propose first, now that costs are predicted otherwise; None to keep the proportions of what was found."""
        return None

    def notes(self) -> dict[str, Any]:
        """What the history's record of a step should say of the strategy; JSON."""
        return {}

    def figures(self) -> dict[str, float]:
        """Numbers that tell how the strategy is doing, for those who watch it round by round."""
        return {}

    def memory(self) -> dict[str, Any]:
        """What the strategy remembers between rounds, as JSON."""
        return {}

    def recall(self, memory: dict[str, Any]) -> None:  # noqa: B027 - an optional hook
        """Resume from what ``memory`` returned."""

    @final
    def ask(self) -> list[IntArray]:
        """The next vectors, checked. Raises ``SearchError`` when the last ones have not been told yet."""
        if self._asked is not None:
            raise SearchError(f"{type(self).__name__}.ask was called again before tell; tell the outcomes of the last ask first")
        vectors = [self.space.checked(v, f"{type(self).__name__}.propose, vector {i}") for i, v in enumerate(self.propose())]
        self._asked = [v.copy() for v in vectors] or None
        return vectors

    @final
    def narrow(self, chosen: Sequence[int]) -> list[IntArray]:
        """Only these of the vectors asked for will be told; returns them."""
        if self._asked is None:
            raise SearchError(f"{type(self).__name__}.narrow was called without ask")
        self._asked = [self._asked[i] for i in chosen]
        self.narrowed(chosen)
        return [vector.copy() for vector in self._asked]

    @final
    def tell(self, outcomes: Sequence[Scored]) -> bool:
        """Hand over the outcomes of the last ``ask``, in its order. Returns whether that closed a step."""
        if self._asked is None:
            raise SearchError(f"{type(self).__name__}.tell was called without ask")
        if len(outcomes) != len(self._asked):
            raise SearchError(f"{type(self).__name__}.tell got {len(outcomes)} outcomes for {len(self._asked)} vectors")
        for i, (outcome, asked) in enumerate(zip(outcomes, self._asked, strict=True)):
            if not np.array_equal(outcome.removed, asked):
                raise SearchError(f"{type(self).__name__}.tell: outcome {i} is not that of vector {i}; keep the order of ask")
            if not np.isfinite(outcome.reward):
                raise SearchError(f"{type(self).__name__}.tell: the reward of vector {i} is {outcome.reward}; it must be finite")
        self._asked = None
        self.learn(outcomes)
        done = self.step_done()
        self.step += int(done)
        return done

    @final
    def state(self) -> dict[str, Any]:
        """Everything that the strategy needs to go on, as JSON. Raises ``SearchError`` between ``ask`` and ``tell``."""
        if self._asked is not None:
            raise SearchError(f"{type(self).__name__}.state was called between ask and tell; tell the outcomes first")
        return {"step": self.step, "generator": self.rng.bit_generator.state, "memory": self.memory()}

    @final
    def restore(self, state: dict[str, Any]) -> None:
        """Resume from what ``state`` returned; the strategy then goes on as the other one would have."""
        self.step = int(state["step"])
        self.rng.bit_generator.state = state["generator"]
        self.recall(state["memory"])
