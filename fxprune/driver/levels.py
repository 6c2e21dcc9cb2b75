"""Scores by more and more data: successive halving (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943), round by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fxprune.driver.executors.base import Executor
from fxprune.driver.problem import IntArray, Metrics, Score


class Levels:
    """Several scores as one, so that workers get them together. A candidate comes with its level in front.

    ``scores``: the cheapest first, the full one last.
    """

    def __init__(self, scores: Sequence[Score]) -> None:
        self.scores = tuple(scores)

    def __call__(self, candidate: IntArray) -> Metrics:
        return self.scores[int(candidate[0])](candidate[1:])

    def map(self, executor: Executor, level: int, vectors: Sequence[IntArray]) -> list[Metrics]:
        """The metrics of ``vectors`` by the score of a level, in order."""
        return executor.map(self, [np.concatenate([[level], vector]) for vector in vectors])


def survivors(
    vectors: Sequence[IntArray], wanted: int, levels: int, judged: Callable[[int, Sequence[IntArray]], Sequence[float]]
) -> list[int]:
    """The places of the ``wanted`` vectors that are left when each of ``levels`` levels lets an equal fraction pass, in rising order.

    ``judged``: (level, vectors) -> their rewards. Equal vectors count once; among equal rewards the earlier one passes.
    """
    first = {vector.tobytes(): i for i, vector in reversed(list(enumerate(vectors)))}
    alive = sorted(first.values())
    start = len(alive)
    for level in range(levels):
        if len(alive) <= wanted:
            break
        pass_on = max(wanted, round(start * (wanted / start) ** ((level + 1) / levels)))
        rewards = judged(level, [vectors[i] for i in alive])
        best = sorted(range(len(alive)), key=lambda k: (-rewards[k], k))[:pass_on]
        alive = sorted(alive[k] for k in best)
    return alive[:wanted]
