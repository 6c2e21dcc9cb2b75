"""Replay buffer: the best actions found from the current architecture (Wang 2024, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxprune.driver.problem import FloatArray, IntArray


@dataclass(frozen=True)
class Entry:
    """An action with its Q-value, the architecture it led to, and that architecture's accuracy."""

    q: float
    action: FloatArray
    removed: IntArray
    accuracy: float

    def state(self) -> list[Any]:
        return [self.q, self.action.tolist(), self.removed.tolist(), self.accuracy]

    @classmethod
    def of(cls, state: list[Any]) -> Entry:
        q, action, removed, accuracy = state
        return cls(q, np.array(action, dtype=np.float64), np.array(removed, dtype=np.int64), accuracy)


class ReplayBuffer:
    """Keeps the ``capacity`` entries of highest Q, best first; of equal ones those that came first, of one architecture one entry."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __getitem__(self, index: int) -> Entry:
        return self._entries[index]

    @property
    def best(self) -> Entry:
        return self._entries[0]

    def add(self, entry: Entry) -> None:
        """Take ``entry`` in if it is among the best."""
        for i, known in enumerate(self._entries):
            if np.array_equal(known.removed, entry.removed):
                if known.q >= entry.q:
                    return
                del self._entries[i]
                break
        self._entries = sorted([*self._entries, entry], key=lambda e: -e.q)[: self.capacity]

    def clear(self) -> None:
        """Forget all: the current architecture changed."""
        self._entries = []

    def state(self) -> list[Any]:
        """The buffer as JSON."""
        return [entry.state() for entry in self._entries]

    def restore(self, state: list[Any]) -> None:
        """Resume from what ``state`` returned."""
        self._entries = [Entry.of(item) for item in state]
