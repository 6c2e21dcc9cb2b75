"""The sizes that a module keeps as attributes, set to what its sliced parameters have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fxprune.passes.rules import conv, norm, recurrent
from fxprune.passes.rules.values import Value

if TYPE_CHECKING:
    from fxprune.passes.slim import Slimmer


# torch's own layers that keep sizes as attributes, beside those with a normalized_shape.
_SIZED = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.PReLU,
    nn.Unflatten,
)


def has_sizes(module: nn.Module) -> bool:
    """Whether ``resize`` has anything to do."""
    return isinstance(module, _SIZED) or hasattr(module, "normalized_shape")


def resize(slimmer: Slimmer, module: Any, x: Value, y: Value) -> None:
    """Set ``module``'s sizes from what is left of its input ``x`` and its output ``y``."""
    if isinstance(module, nn.modules.conv._ConvNd):
        channel = x.ndim - module.weight.ndim + 1
        conv.resize(module, slimmer.count(x, channel), slimmer.count(y, channel))
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        axis = x.ndim - norm._spatial(module) - 1 if isinstance(module, nn.modules.instancenorm._InstanceNorm) else 1
        module.num_features = slimmer.count(x, axis)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = norm.groups_left(slimmer, x, module.num_groups)
        module.num_channels = slimmer.count(x, 1)
    elif hasattr(module, "normalized_shape"):
        first = x.ndim - len(module.normalized_shape)
        module.normalized_shape = tuple(slimmer.count(x, a) for a in range(first, x.ndim))
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.RNNBase):
        recurrent.resize(module)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
    elif isinstance(module, nn.Unflatten):
        axis = module.dim % x.ndim
        module.unflattened_size = tuple(slimmer.count(y, axis + i) if s != -1 else -1 for i, s in enumerate(module.unflattened_size))
