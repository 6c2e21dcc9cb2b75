"""Targets: what must be left of the network, as users write it (`macs=0.5`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fxprune.errors import SearchError, shown

METRICS = ("macs", "params", "latency", "memory", "sparsity")
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}  # units in which a latency may be given
_TIME = re.compile(r"\s*([0-9.eE+-]+)\s*(s|ms|us|µs)\s*")


@dataclass(frozen=True)
class Target:
    """One bound. ``value``: the share that is left of ``metric``, or for "sparsity" the share of output channels that goes.

    ``seconds``: what was asked for of a latency given as a time; ``value`` is then its share of the original's, 0 until that is known.
    """

    metric: str
    value: float
    seconds: float | None = None
    text: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.seconds is not None:
            if not 0 < self.seconds < float("inf"):
                raise SearchError(f"target {self} is out of range; give a time above 0, for example latency=12ms")
        elif not 0 < self.value < 1:
            raise SearchError(f"target {self.metric}={self.value:g} is out of range; give a share between 0 and 1, for example 0.5")

    @property
    def remaining(self) -> float:
        """The share of the original that may be left."""
        return 1 - self.value if self.metric == "sparsity" else self.value

    def shown(self, remaining: float) -> float:
        """A remaining share in the user's terms."""
        return 1 - remaining if self.metric == "sparsity" else remaining

    def of(self, whole: float) -> Target:
        """A time as a share of the ``whole`` seconds that the original takes. Raises ``SearchError`` where that is no less."""
        if self.seconds is None:
            return self
        if self.seconds >= whole:
            raise SearchError(f"target {self}: the original takes {1e3 * whole:.3g} ms already; ask for less than that")
        return replace(self, value=self.seconds / whole)

    def __str__(self) -> str:
        return self.text or f"{self.metric}={self.value:g}"


Point = tuple[Target, ...]
"""Targets to be met at once."""


def parse(given: str | Sequence[str] | Mapping[str, float | str], own: Sequence[str] = ()) -> tuple[Point, ...]:
    """Read targets: ``"macs=0.5"``, several of them, or a mapping; a comma list (``"macs=0.7,0.5"``) makes a Pareto run of several points.

    ``own``: names of costs of the user's own, which may be bounded too.
    Returns the points in the order in which a search visits them, the mildest first. Raises ``SearchError`` for anything malformed.
    """
    if not isinstance(given, (str, Mapping, Iterable)):
        raise SearchError(f'targets is {shown(given)}; write METRIC=SHARE, as in targets="macs=0.5"')
    texts = [f"{k}={v}" for k, v in given.items()] if isinstance(given, Mapping) else [given] if isinstance(given, str) else list(given)
    strange = next((text for text in texts if not isinstance(text, str)), None)
    if strange is not None:
        raise SearchError(f'targets holds {shown(strange)}; write each as METRIC=SHARE, as in targets="macs=0.5"')
    if not texts:
        raise SearchError("no target given; say what is to be left, for example macs=0.5")
    lists = [_values(text) for text in texts]
    metrics = [metric for metric, _ in lists]
    for metric, values in lists:
        times = [seconds for _, seconds, _ in values if seconds is not None]
        if times and metric != "latency":
            raise SearchError(f"target {metric} is given as a time; only latency is one, for example latency=12ms")
        if times and len(times) < len(values):
            raise SearchError(f"target {metric} mixes times and shares; give all in one of them, for example latency=12ms,8ms")
    for metric in metrics:
        if metric not in (*METRICS, *own):
            known, name = ", ".join((*METRICS, *own)), metric if metric.isidentifier() else "energy"
            ways = f"costs={{{name!r}: f}}, on the command line --cost {name}=module:function"
            raise SearchError(f"unknown target {metric!r}; use one of {known}, for example macs=0.5, or give a cost of your own: {ways}")
    if len(set(metrics)) != len(metrics):
        raise SearchError(f"a target is given twice: {', '.join(texts)}; use one entry per metric, commas for a Pareto run")
    if sum(len(values) > 1 for _, values in lists) > 1:
        raise SearchError(f"only one target may be a comma list: {' '.join(texts)}")
    count = max(len(values) for _, values in lists)
    points = [tuple(Target(metric, *values[min(i, len(values) - 1)]) for metric, values in lists) for i in range(count)]
    return tuple(sorted(points, key=lambda point: -sum(target.seconds or target.remaining for target in point)))


def _values(text: str) -> tuple[str, list[tuple[float, float | None, str]]]:
    """The metric, and for each value the share, the seconds where it is a time, and how it was written where it is."""
    metric, sign, rest = text.partition("=")
    if not sign:
        raise SearchError(f"target {text!r} is malformed; write METRIC=SHARE, for example macs=0.5")
    metric = metric.strip()
    values: list[tuple[float, float | None, str]] = []
    try:
        for part in rest.split(","):
            time = _TIME.fullmatch(part)
            if time is None:
                values.append((float(part), None, ""))
            else:
                values.append((0.0, float(time[1]) * SECONDS[time[2]], f"{metric}={part.strip()}"))
    except ValueError:
        raise SearchError(
            f"target {text!r} is malformed; the share must be a number between 0 and 1, for example macs=0.5, or a time, latency=12ms"
        ) from None
    if len({(share, seconds) for share, seconds, _ in values}) != len(values):
        raise SearchError(f"target {text!r} names a share twice")
    return metric, values
