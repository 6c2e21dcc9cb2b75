"""Targets: what must be left of the network, as users write it (`macs=0.5`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxprune.errors import SearchError

METRICS = ("macs", "params", "latency", "memory", "sparsity")


@dataclass(frozen=True)
class Target:
    """One bound. ``value``: the share that is left of ``metric``, or for "sparsity" the share of output channels that goes."""

    metric: str
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value < 1:
            raise SearchError(f"target {self.metric}={self.value:g} is out of range; give a share between 0 and 1, for example 0.5")

    @property
    def remaining(self) -> float:
        """The share of the original that may be left."""
        return 1 - self.value if self.metric == "sparsity" else self.value

    def shown(self, remaining: float) -> float:
        """A remaining share in the user's terms."""
        return 1 - remaining if self.metric == "sparsity" else remaining

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}"


Point = tuple[Target, ...]
"""Targets to be met at once."""


def parse(given: str | Sequence[str] | Mapping[str, float], own: Sequence[str] = ()) -> tuple[Point, ...]:
    """Read targets: ``"macs=0.5"``, several of them, or a mapping; a comma list (``"macs=0.7,0.5"``) makes a Pareto run of several points.

    ``own``: names of costs of the user's own, which may be bounded too.
    Returns the points in the order in which a search visits them, the mildest first. Raises ``SearchError`` for anything malformed.
    """
    texts = [f"{k}={v}" for k, v in given.items()] if isinstance(given, Mapping) else [given] if isinstance(given, str) else list(given)
    if not texts:
        raise SearchError("no target given; say what is to be left, for example macs=0.5")
    lists = [_values(text) for text in texts]
    metrics = [metric for metric, _ in lists]
    for metric in metrics:
        if metric not in (*METRICS, *own):
            known = ", ".join((*METRICS, *own))
            raise SearchError(f"unknown target {metric!r}; use one of {known}, for example macs=0.5, or pass your own with costs=")
    if len(set(metrics)) != len(metrics):
        raise SearchError(f"a target is given twice: {', '.join(texts)}; use one entry a metric, commas for a Pareto run")
    if sum(len(values) > 1 for _, values in lists) > 1:
        raise SearchError(f"only one target may be a comma list: {' '.join(texts)}")
    count = max(len(values) for _, values in lists)
    points = [tuple(Target(metric, values[min(i, len(values) - 1)]) for metric, values in lists) for i in range(count)]
    return tuple(sorted(points, key=lambda point: -sum(target.remaining for target in point)))


def _values(text: str) -> tuple[str, list[float]]:
    metric, sign, rest = text.partition("=")
    if not sign:
        raise SearchError(f"target {text!r} is malformed; write METRIC=SHARE, for example macs=0.5")
    try:
        values = [float(part) for part in rest.split(",")]
    except ValueError:
        raise SearchError(f"target {text!r} is malformed; the share must be a number between 0 and 1, for example macs=0.5") from None
    if len(set(values)) != len(values):
        raise SearchError(f"target {text!r} names a share twice")
    return metric.strip(), values
