"""A target in place of a policy: ``"macs=0.5"`` as an allocation, without a search."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fxprune.allocation.allocating import allocate, out_of_reach, policy_of
from fxprune.allocation.grain import multiple_for_bounds
from fxprune.allocation.prices import METRICS
from fxprune.allocation.trying import TRIALS
from fxprune.allocation.uniform import TOLERANCE, Uniform
from fxprune.errors import PolicyError, TargetError
from fxprune.evaluation.running import one_thread
from fxprune.importance.criteria import resolved, scores
from fxprune.importance.gradients import Loss
from fxprune.passes.base import Observer
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.policies import Policy
from fxprune.repair.registry import Repair

_TARGET = re.compile(r"\s*\w+\s*=")
_MEASURED = ("latency",)


def is_target(text: str) -> bool:
    """Whether a policy given as text is a target, ``METRIC=SHARE``, rather than the path of a file."""
    return _TARGET.match(text) is not None


def bounds_of(text: str) -> dict[str, float]:
    """A target as metric -> share of the original that may be left; several are separated by commas or blanks.

    "sparsity" is given as the share of the output channels that goes, as everywhere, and comes out as the share that stays. Raises
    ``PolicyError`` for anything malformed, and for what would have to be measured.
    """
    found: dict[str, float] = {}
    for part in re.sub(r"\s*=\s*", "=", text).replace(",", " ").split():
        metric, sign, share = part.partition("=")
        if metric in _MEASURED:
            raise PolicyError(f"the target {part!r} has to be measured on candidates; search for it: fxprune.search with targets={part!r}")
        if metric not in METRICS:
            raise PolicyError(f"the target {text!r} names {metric!r}; it is METRIC=SHARE with one of {', '.join(METRICS)}, as in macs=0.5")
        try:
            value = float(share)
        except ValueError:
            value = float("nan")
        if not sign or not 0 < value < 1:
            raise PolicyError(f"the target {part!r} needs a share between 0 and 1 of what {'goes' if metric == 'sparsity' else 'is left'}")
        if metric in found:
            raise PolicyError(f"the target {text!r} names {metric} twice; a Pareto run is a matter for fxprune.search")
        found[metric] = 1 - value if metric == "sparsity" else value
    return found


def allocated(
    graph: CouplingGraph,
    target: str,
    calibration: Iterable[Any] | None,
    *,
    importance: Any = "auto",
    loss: Loss | None = None,
    repair: Repair = "none",
    round_to: int | None = None,
    most: Mapping[str, float] | float | None = None,
    observe: Observer | None = None,
) -> Policy:
    """The policy that meets a target: by the error tables where there is ``calibration``, else the same share of every group.

    What the tables say is tried out beside other allocations, on inputs kept apart (``fxprune.allocation.trying``).

    Args:
        graph: the analysed network.
        target: as ``bounds_of`` reads it. The other arguments are those of ``compress``.
        round_to: None: as ``multiple_for_bounds`` says.

    Returns:
        A policy that names the units; ``meta`` has the bounds and what is left.

    Raises:
        PolicyError: the target is malformed.
        TargetError: it cannot be met; ``nearest`` is the policy that comes closest.
    """
    bounds = bounds_of(target)
    if round_to is None:
        round_to = multiple_for_bounds(graph, [bounds], most)
    if calibration is not None:
        options: dict[str, Any] = {"importance": importance, "loss": loss, "repair": repair, "round_to": round_to, "most": most}
        return allocate(graph, bounds, calibration, trials=TRIALS, observe=observe, **options)
    with one_thread():
        ranking = scores(graph, resolved(importance))
    uniform = Uniform(graph, ranking, bounds, round_to, most)
    counts = uniform.counts()
    left = uniform.left(counts)
    policy = policy_of(graph, uniform.keep(counts), round_to, importance, {"strategy": "uniform", "bounds": bounds, "left": left})
    over = [metric for metric, share in bounds.items() if left[metric] > share + TOLERANCE]
    if over:
        raise TargetError(out_of_reach(over[0], bounds[over[0]], left[over[0]], most), policy)
    return policy
