"""The sizes that a module keeps as attributes, set to what its sliced parameters have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value
from fxprune.passes.rules.computing import conv, norm, recurrent
from fxprune.passes.rules.protocols import Rewriter

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


def called_again(ctx: LabelContext, node: fx.Node, module: nn.Module, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
    """A module that keeps sizes without having parameters of them can be given one size only, wherever it is called."""
    found = _sized(module, inputs[0], outputs[0]) if inputs and outputs and has_sizes(module) else []
    before = ctx.sized.setdefault(str(node.target), found)
    for (value, axis), (first, place) in zip(found, before, strict=True):
        a, b = value.axes.get(axis), first.axes.get(place)
        if a is not None and b is not None:
            ctx.unite(a, b)
        elif a is not None or b is not None:
            why = (value if a is None else first).why
            ctx.pin(a if b is None else b, f"{str(node.target)!r} is called on channels of fixed size as well ({why})")


def _sized(module: Any, x: Value, y: Value) -> list[tuple[Value, int]]:
    """The axes of its input ``x`` or output ``y`` whose size a module keeps as an attribute although no parameter of it has that size."""
    if any(True for _ in module.parameters()):
        return []
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return [(x, _channel(module, x))]
    if isinstance(module, nn.GroupNorm):
        return [(x, 1)]
    if hasattr(module, "normalized_shape"):
        return [(x, a) for a in range(x.ndim - len(module.normalized_shape), x.ndim)]
    if isinstance(module, nn.Unflatten):
        return [(y, module.dim % x.ndim + i) for i, s in enumerate(module.unflattened_size) if s != -1]
    return []


def _channel(module: Any, x: Value) -> int:
    return x.ndim - norm._spatial(module) - 1 if isinstance(module, nn.modules.instancenorm._InstanceNorm) else 1


def resize(slim: Rewriter, module: Any, x: Value, y: Value) -> None:
    """Set ``module``'s sizes from what is left of its input ``x`` and its output ``y``."""
    if isinstance(module, nn.modules.conv._ConvNd):
        channel = x.ndim - module.weight.ndim + 1
        conv.resize(module, slim.count(x, channel), slim.count(y, channel))
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = slim.count(x, _channel(module, x))
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = norm.groups_left(slim, x, module.num_groups)
        module.num_channels = slim.count(x, 1)
    elif hasattr(module, "normalized_shape"):
        first = x.ndim - len(module.normalized_shape)
        module.normalized_shape = tuple(slim.count(x, a) for a in range(first, x.ndim))
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.RNNBase):
        recurrent.resize(module)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
    elif isinstance(module, nn.Unflatten):
        axis = module.dim % x.ndim
        module.unflattened_size = tuple(slim.count(y, axis + i) if s != -1 else -1 for i, s in enumerate(module.unflattened_size))
