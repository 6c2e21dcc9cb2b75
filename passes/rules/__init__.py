"""What each family of operations does to channels, one file per family; ``registry`` holds the tables."""

from __future__ import annotations

import importlib
import sys

from fxprune.passes.rules import (
    assign,
    contract,
    conv,
    factory,
    fourier,
    indexing,
    joining,
    movement,
    norm,
    parts,
    pointwise,
    recurrent,
    reduce,
    registry,
    sizes,
)
from fxprune.passes.rules.registry import is_known, register_op

__all__ = [
    "assign",
    "contract",
    "complete",
    "conv",
    "factory",
    "fourier",
    "indexing",
    "is_known",
    "joining",
    "movement",
    "norm",
    "parts",
    "pointwise",
    "recurrent",
    "reduce",
    "register_op",
    "registry",
    "sizes",
]


def complete() -> None:
    """Add the rules for torchvision where it has been imported: no model can use its operations before that."""
    if "torchvision" in sys.modules:
        importlib.import_module("fxprune.passes.rules.vision")
