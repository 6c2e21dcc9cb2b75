"""Policy update: a step towards the best action found, bounded entry by entry (Wang 2024, sec. 3.4)."""

from __future__ import annotations

import numpy as np

from fxprune.driver.problem import FloatArray
from fxprune.driver.simplex import on_simplex


def updated(policy: FloatArray, best: FloatArray, *, step_length: float, clip: float | None, floor: float) -> FloatArray:
    """``policy + step_length * (best - policy)``, each entry's ratio to the old one within ``1 +- clip``, then clamped and renormalised.

    ``policy`` and ``best``: points on the simplex, shape ``(groups,)``. The clip is what the paper's code takes from PPO (Schulman 2017,
    eq. 7): the ratio bound alone, without an advantage or a gradient. Renormalising comes last, so ratios can pass the bound by the
    change of the sum, as they do there.
    """
    moved = policy + step_length * (best - policy)
    if clip is not None:
        moved = policy * np.clip(moved / policy, 1 - clip, 1 + clip)
    return on_simplex(moved, floor)
