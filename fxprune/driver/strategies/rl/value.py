"""The value model: what the architectures scored so far say about one that was not (ours; it lets sampled actions be screened)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fxprune.driver.problem import FloatArray, IntArray

RIDGES = 10.0 ** np.arange(-6.0, 3.0)  # tried; the one whose left-out predictions err least is taken
MOST = 1000  # scored architectures that are fitted, the latest ones


class ValueModel:
    """Predicts rewards from unit counts: a ridge regression on the groups' sparsities, their squares and all products of two of these.

    In its dual form, so the products are never written out and the cost goes by the number of scored architectures. How strongly it is
    held to the mean is chosen by the errors on left-out architectures, so where it knows nothing it says the mean.
    """

    def __init__(self, units: IntArray) -> None:
        self.units = units
        self._known: dict[tuple[int, ...], float] = {}
        self._fitted: tuple[FloatArray, FloatArray, float] | None = None

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, removed: IntArray) -> bool:
        return tuple(removed.tolist()) in self._known

    def add(self, removed: IntArray, reward: float) -> None:
        """Take in a scored architecture."""
        self._known[tuple(removed.tolist())] = reward
        self._fitted = None

    def clear(self) -> None:
        """Forget all: the network's weights changed."""
        self._known, self._fitted = {}, None

    def state(self) -> list[Any]:
        """What is known, as JSON."""
        return [[list(removed), reward] for removed, reward in self._known.items()]

    def restore(self, state: list[Any]) -> None:
        """Resume from what ``state`` returned."""
        self._known, self._fitted = {tuple(removed): reward for removed, reward in state}, None

    def predict(self, candidates: Sequence[IntArray]) -> FloatArray:
        """The rewards expected of ``candidates``, shape ``(candidates,)``; needs two scored architectures at least."""
        if self._fitted is None:
            self._fitted = self._fit()
        features, weights, mean = self._fitted
        return mean + _products(self._features(candidates), features) @ weights

    def _features(self, removed: Sequence[Any]) -> FloatArray:
        shares = np.asarray(removed, dtype=np.float64) / self.units
        return np.concatenate([shares, shares**2], axis=1)

    def _fit(self) -> tuple[FloatArray, FloatArray, float]:
        latest = list(self._known.items())[-MOST:]
        features = self._features([removed for removed, _ in latest])
        rewards = np.array([reward for _, reward in latest])
        mean = float(rewards.mean())
        values, vectors = np.linalg.eigh(_products(features, features))
        along = vectors.T @ (rewards - mean)
        tried = [self._left_out(values, vectors, along, ridge * len(rewards)) for ridge in RIDGES]
        weights, _ = min(tried, key=lambda one: one[1])
        return features, weights, mean

    @staticmethod
    def _left_out(values: FloatArray, vectors: FloatArray, along: FloatArray, ridge: float) -> tuple[FloatArray, float]:
        """The dual weights at a ridge, and the mean squared error of each prediction without its own architecture (in closed form)."""
        shrunk = 1 / (np.maximum(values, 0) + ridge)
        weights: FloatArray = vectors @ (shrunk * along)
        inverse = (vectors**2) @ shrunk
        return weights, float(np.mean((weights / inverse) ** 2))


def _products(first: FloatArray, second: FloatArray) -> FloatArray:
    """The kernel (1 + x.y / features)^2 for all pairs of rows."""
    found: FloatArray = (1 + first @ second.T / first.shape[1]) ** 2
    return found
