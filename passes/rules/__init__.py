"""What each family of operations does to channels, one file per family; ``registry`` holds the tables."""

from fxprune.passes.rules import (
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
    "contract",
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
