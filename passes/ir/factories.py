"""The functions of ``torch`` that make a tensor from no tensor, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# Without a tensor among their arguments fx would not see them: a size there would be turned into a number.
FACTORIES = (
    *("zeros", "ones", "full", "empty", "arange", "linspace", "eye", "tril_indices", "triu_indices"),
    *("tensor", "as_tensor", "asarray"),
)
# What is drawn while tracing would be the same at every call.
RANDOM_FACTORIES = ("rand", "randn", "randint", "randperm", "normal")
# Older versions of torch look at ``dtype`` before they look for a proxy, and refuse one in its place.
LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
# Those whose result follows from their arguments.
DETERMINED = frozenset(FACTORIES) - {"empty"}


def takes_no_device(name: str, given: Iterable[Any]) -> bool:
    """Whether a function of torch makes its result where the tensors among its arguments are: ``torch.normal(mean, std)``."""
    return name == "normal" and any(isinstance(a, torch.Tensor) for a in given)
