"""The zoo: every small network by name. Each stands for one way of moving channels that has gone wrong in some tool."""

from __future__ import annotations

from tests.passes.zoo import (
    attention,
    calls,
    conv,
    features,
    forms,
    norm,
    parts,
    scripted,
    sequence,
    shape,
    single,
    transformer,
    vision,
    writes,
)
from tests.passes.zoo.catalogue import ZOO, Network

__all__ = [
    "ZOO",
    "Network",
    "attention",
    "calls",
    "conv",
    "forms",
    "features",
    "norm",
    "parts",
    "scripted",
    "sequence",
    "shape",
    "single",
    "transformer",
    "vision",
    "writes",
]
