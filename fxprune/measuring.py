"""Networks timed against each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import nn

from fxprune.evaluation import one_thread
from fxprune.profiling import profile

LATENCY_BATCH, LATENCY_RUNS, LATENCY_TURNS = 32, 5, 7


def in_turns(models: Sequence[nn.Module], example: torch.Tensor) -> list[float]:
    """Median seconds for a batch of the one image ``example``, on one thread; the networks take turns, so that what else the machine does
    falls on all."""
    profiles = [profile(model, torch.cat([example] * LATENCY_BATCH)) for model in models]
    with one_thread():
        turns = [[one.latency(LATENCY_RUNS) for one in profiles] for _ in range(LATENCY_TURNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]
