"""Epsilon of the epsilon-greedy choice of the next architecture, and its decay (Wang 2024, sec. 3.4)."""

from __future__ import annotations

import math


def epsilon_at(step: int, steps: int, *, start: float, decay: str, share: float = 0.1) -> float:
    """The chance of a random choice at ``step`` (from 0) of ``steps``.

    It goes from ``start`` towards 0 over the first ``share`` of the steps ("linear", "cosine") or stays there ("constant"), and is 0 after.
    """
    horizon = share * steps
    if step >= horizon:
        return 0.0
    progress = step / horizon
    if decay == "linear":
        return start * (1 - progress)
    if decay == "cosine":
        return start * (1 + math.cos(math.pi * progress)) / 2
    return start
