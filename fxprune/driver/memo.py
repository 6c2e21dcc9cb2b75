"""The metrics of what was scored so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fxprune.driver.problem import IntArray


class Memo:
    """Metrics of the architectures scored so far, by their unit counts; in the order of scoring."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], dict[str, float]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, removed: IntArray) -> bool:
        return tuple(removed.tolist()) in self._known

    def __getitem__(self, removed: IntArray) -> dict[str, float]:
        return self._known[tuple(removed.tolist())]

    def __setitem__(self, removed: IntArray, metrics: dict[str, float]) -> None:
        self._known[tuple(removed.tolist())] = metrics

    def __iter__(self) -> Iterator[IntArray]:
        return (np.array(key, dtype=np.int64) for key in self._known)

    def clear(self) -> None:
        """Forget everything: the weights changed."""
        self._known.clear()

    def state(self) -> list[Any]:
        """The memo as JSON."""
        return [[list(key), metrics] for key, metrics in self._known.items()]

    def restore(self, state: list[Any]) -> None:
        """Resume from what ``state`` returned."""
        self._known = {tuple(key): dict(metrics) for key, metrics in state}
