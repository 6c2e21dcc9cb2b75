"""Where candidates are scored: in this process, in worker processes, or on a Ray cluster. The results never depend on which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fxprune.driver.problem import IntArray, Metrics, Score

ATTEMPTS = 3  # times that a batch is resumed after a worker died


class Executor(Protocol):
    """Scores batches of removal vectors, in order. ``score`` is a pure function, so who runs it and how often makes no difference."""

    def map(self, score: Score, candidates: Sequence[IntArray]) -> list[Metrics]:
        """The metrics of every candidate, in the order given."""

    def reset(self) -> None:
        """Forget copies of ``score``: what it computes has changed."""

    def close(self) -> None:
        """Stop the workers."""


class LocalExecutor:
    """Scores in this process."""

    def map(self, score: Score, candidates: Sequence[IntArray]) -> list[Metrics]:
        return [score(candidate) for candidate in candidates]

    def reset(self) -> None:
        """Nothing is copied here."""

    def close(self) -> None:
        """No workers here."""
