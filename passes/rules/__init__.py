"""What each family of operations does to channels, one file per family; ``registry`` holds the tables."""

from fxprune.passes.rules import contract, conv, norm, pointwise, recurrent, reduce, registry, shape
from fxprune.passes.rules.registry import is_known, register_op

__all__ = ["contract", "conv", "is_known", "norm", "pointwise", "recurrent", "reduce", "register_op", "registry", "shape"]
