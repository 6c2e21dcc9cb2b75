"""Networks timed against each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fxprune.costs.profiling import profile
from fxprune.evaluation.running import one_thread

LATENCY_BATCH, LATENCY_RUNS, LATENCY_TURNS = 32, 5, 7
ALONE_RUNS = 9  # of a candidate, which does not take turns


def in_turns(models: Sequence[nn.Module], example: torch.Tensor) -> list[float]:
    """Median seconds for a batch of the one image ``example``, on one thread; the networks take turns, so that what else the machine does
    falls on all."""
    profiles = [profile(model, _batch(example)) for model in models]
    with one_thread():
        turns = [[one.latency(LATENCY_RUNS) for one in profiles] for _ in range(LATENCY_TURNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def alone(example: torch.Tensor) -> Callable[[nn.Module], float]:
    """What measures one network as ``in_turns`` does several, so that a target for the latency means what the last table shows."""
    batch = _batch(example)

    def seconds(model: nn.Module) -> float:
        with one_thread():
            return profile(model, batch).latency(ALONE_RUNS)

    return seconds


def _batch(example: torch.Tensor) -> torch.Tensor:
    return torch.cat([example] * LATENCY_BATCH)
