"""What the caller of a public function may have switched on for the process, and what our own work does without.

Tensors that are made in ``torch.inference_mode`` can never be trained, autocast computes statistics in half precision, and where "meta" is
the default device our tables would have no values.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_plain_modes(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, called as in a ``no_grad`` block where its caller is in inference mode, without autocast, and not on "meta"."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            if torch.empty(0).is_meta:
                stack.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return call
