"""What the walk does not see of a parameter: code beside the graph that reads it too. It stays."""

from __future__ import annotations

from fxprune.passes.coupling.walk import Walk
from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.passes.ir.traced import Surroundings


def pin_unseen(walk: Walk) -> None:
    """Lock tensors that a module read shares with code that was not traced.

    Of tied tensors one place may lie in a module that was not traced, or outside the parts that were: it reads the tensor as it was.
    """
    traced = walk.traced
    around = Surroundings(traced)
    for name, aliases in traced.skeleton.aliases.items():
        for alias in aliases:
            why = unseen(around, alias.rpartition(".")[0])
            if why is None:
                continue
            for dim in range(traced.skeleton.tensor(name).ndim):
                if (name, dim) in walk.parameters:
                    walk.labels.pin(walk.parameters[name, dim], why)


def unseen(around: Surroundings, path: str) -> Reason | None:
    """Why the walk does not see all that reads the tensors of the module at ``path``; None where it does."""
    if why := around.why(path):
        return Reason(ReasonKind.UNTRACED, why)
    if around.traced.in_parts and not around.in_part(path):
        return Reason(ReasonKind.UNTRACED, "it is used by code that could not be traced")
    return None
