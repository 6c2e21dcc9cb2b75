"""Masks in an index: what is picked is what is true in them, and how much that is only values say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def is_mask(value: Any) -> bool:
    """Whether a tensor in an index picks what is true in it."""
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8) and value.ndim > 0


def most_rows(shape: Sequence[int]) -> int:
    """How many elements can be true in a mask of this shape. At least two: an axis of one stands beside others as if it were repeated."""
    return max(math.prod(shape), 2)


def as_positions(mask: torch.Tensor) -> list[torch.Tensor]:
    """A mask of unknown values as a vector of positions for each of its axes, as many as there can be, all zero."""
    return [torch.zeros(1, dtype=torch.int64, device=mask.device).expand(most_rows(mask.shape))] * mask.ndim
