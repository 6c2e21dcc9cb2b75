"""What each family of operations does to channels, one file per family; ``registry`` holds the tables."""

from __future__ import annotations

import importlib
import sys

from fxprune.passes.rules import registry
from fxprune.passes.rules.computing import contractions, conv, fourier, norm, pointwise, recurrent, reduce
from fxprune.passes.rules.layer_specs import LayerSpec, register_layer
from fxprune.passes.rules.moving import assign, factory, indexing, joining, movement, parts, views
from fxprune.passes.rules.registry import is_known, register_op

__all__ = [
    "LayerSpec",
    "assign",
    "contractions",
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
    "register_layer",
    "register_op",
    "registry",
    "views",
]


def complete() -> None:
    """Add the rules for torchvision where it has been imported: no model can use its operations before that."""
    if sys.modules.get("torchvision") is not None:
        importlib.import_module("fxprune.passes.rules.computing.vision")
