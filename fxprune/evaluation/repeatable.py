"""Running a module of the user's without leaving a trace: copies of its inputs, and the random generators put back afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.compat import tree_map_only


@contextmanager
def same_random_numbers(seed: int = 0) -> Iterator[None]:
    """Every block draws the same random numbers, of torch, NumPy and Python; on leaving the generators are as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002, users' code draws from the global generator
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def cloned(inputs: Any) -> Any:
    """``inputs`` with copies of all tensors in it: some modules change theirs in place."""
    return tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)
