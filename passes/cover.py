"""What the walk does not see of a parameter: the module that reads it whole, or code beside the graph. Those dimensions stay."""

from __future__ import annotations

from torch import nn

from fxprune.passes.labels import Walk


def pin_unseen(walk: Walk) -> None:
    """Lock the width of kernels, and tensors that a module read shares with code that was not traced."""
    _kernels(walk)
    _shared(walk)


def _kernels(walk: Walk) -> None:
    """A convolution's module is asked about channels alone; a graph that reads its weight as well (its dtype, say) labels all of it."""
    for path, module in walk.traced.skeleton.original.named_modules():
        name = walk.canonical(path, "weight") if isinstance(module, nn.modules.conv._ConvNd) else None
        for dim in range(2, walk.traced.skeleton.tensor(name).ndim if name is not None else 0):
            vector = walk.parameters.get((str(name), dim))
            if vector is not None:
                walk.labels.pin(vector, "a kernel's width is not pruned")


def _shared(walk: Walk) -> None:
    """Of tied tensors one place may lie in a module kept whole, or outside the parts that were traced: it reads the tensor as it was."""
    traced = walk.traced
    for name, aliases in traced.skeleton.aliases.items():
        for alias in aliases:
            why = _unseen(walk, alias.rpartition(".")[0])
            if why is None:
                continue
            for dim in range(traced.skeleton.tensor(name).ndim):
                if (name, dim) in walk.parameters:
                    walk.labels.pin(walk.parameters[name, dim], why)


def _unseen(walk: Walk, path: str) -> str | None:
    for kept, reason in walk.traced.opaque.items():
        if path == kept or path.startswith(f"{kept}."):
            return f"it is inside {kept!r}, which could not be traced: {reason}"
    parts = walk.traced.parts
    if parts and not any(path == p or path.startswith(f"{p}.") for p in parts):
        return "it is used by code that could not be traced"
    return None
