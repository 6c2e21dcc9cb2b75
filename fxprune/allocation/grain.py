"""In multiples of how many channels a target is met where the user does not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxprune.allocation.prices import METRICS
from fxprune.allocation.uniform import Uniform
from fxprune.evaluation.running import one_thread
from fxprune.importance.criteria import scores
from fxprune.passes.compat import ConvNd
from fxprune.passes.coupling.graph import CouplingGraph

GRAIN = 8  # channels in multiples of which runtimes keep the fast layouts of their convolutions; see docs/latency.md
COARSE = 0.1  # of a group in the mean; where multiples are coarser, the few widths that are left cost more accuracy than time is worth
NEAR = 0.01  # of a bound: how far below it the same share of every group may come out


def convolves(graph: CouplingGraph) -> bool:
    """Whether the network has convolutions."""
    return any(isinstance(module, ConvNd) for module in graph.model.modules())


def multiple_for_bounds(
    graph: CouplingGraph, points: Sequence[Mapping[str, float]], most: Mapping[str, float] | float | None = None
) -> int:
    """``GRAIN`` for wide convolutional networks whose bounds can be met closely in multiples of it, else 1.

    Half of the multiply-accumulates in widths that a runtime has no fast layout for can take longer than all of them.

    Args:
        graph: The analysed network.
        points: For each point of a run, metric -> the share of the original that may be left.
        most: As for ``compress``.
    """
    sizes = [group.size for group in graph.groups if group.prunable]
    if not convolves(graph) or not sizes or COARSE * sum(sizes) / len(sizes) < GRAIN:
        return 1
    if any(metric not in METRICS for bounds in points for metric in bounds):
        return 1
    with one_thread():
        ranking = scores(graph, "l2")
    for bounds in points:
        even = Uniform(graph, ranking, bounds, GRAIN, most)
        counts = even.counts()
        left = even.left(counts)
        if max(left[metric] / share for metric, share in bounds.items()) < 1 - NEAR or not even.fits(counts):
            return 1
    return GRAIN
