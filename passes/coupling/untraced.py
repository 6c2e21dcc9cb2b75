"""What the walk does not see of a parameter: code beside the graph that reads it too. It stays."""

from __future__ import annotations

from fxprune.passes.coupling.walk import Walk
from fxprune.passes.ir.reasons import Reason, ReasonKind


def pin_unseen(walk: Walk) -> None:
    """Lock tensors that a module read shares with code that was not traced.

    Of tied tensors one place may lie in a module kept whole, or outside the parts that were traced: it reads the tensor as it was.
    """
    traced = walk.traced
    for name, aliases in traced.skeleton.aliases.items():
        for alias in aliases:
            why = _unseen(walk, alias.rpartition(".")[0])
            if why is None:
                continue
            for dim in range(traced.skeleton.tensor(name).ndim):
                if (name, dim) in walk.parameters:
                    walk.labels.pin(walk.parameters[name, dim], why)


def _unseen(walk: Walk, path: str) -> Reason | None:
    for kept, reason in walk.traced.opaque.items():
        if path == kept or path.startswith(f"{kept}."):
            return Reason(ReasonKind.UNTRACED, f"it is inside {kept!r}, which could not be traced: {reason}")
    parts = walk.traced.parts
    if parts and not any(path == p or path.startswith(f"{p}.") for p in parts):
        return Reason(ReasonKind.UNTRACED, "it is used by code that could not be traced")
    return None
