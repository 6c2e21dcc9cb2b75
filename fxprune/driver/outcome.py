"""What a search returns, and what it tells while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fxprune.driver.problem import IntArray


@dataclass(frozen=True)
class Allocation:
    """One architecture with its figures. ``met``: whether it is on target."""

    removed: IntArray
    reward: float
    metrics: Mapping[str, float]
    met: bool

    def state(self) -> dict[str, Any]:
        return {"removed": self.removed.tolist(), "reward": self.reward, "metrics": dict(self.metrics), "met": self.met}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Allocation:
        return cls(np.array(state["removed"], dtype=np.int64), state["reward"], state["metrics"], state["met"])


@dataclass(frozen=True)
class SearchOutcome:
    """The end of a search.

    ``removed``: units that each group loses, int64, shape ``(groups,)``.
    ``metrics``: what it scored, with the remaining shares of its costs ("macs", "params", ...) and the channel "sparsity".
    ``history``: one JSON record a step, see ``fxprune.driver.history``.
    ``evaluations``: scorings made, baselines included.
    ``baselines``: "original" and "uniform", the latter on the same budget.
    ``targets``: the targets as written.
    ``halfway``: like ``removed``, on the same budget, halfway between it and the uniform allocation; not scored. None where no such
    allocation is another than these two or is known to meet the target (a latency is only known once it is measured).
    ``note``: what to know of it, in a line: that a measured cost came out lower than asked.
    ``pareto``: the outcomes of all points of a Pareto run, the mildest target first; empty in an ordinary run.
    """

    removed: IntArray
    reward: float
    metrics: Mapping[str, float]
    history: tuple[Mapping[str, Any], ...]
    evaluations: int
    baselines: Mapping[str, Allocation]
    targets: tuple[str, ...]
    halfway: IntArray | None = None
    note: str = ""
    pareto: tuple[SearchOutcome, ...] = field(default=(), repr=False)

    def state(self) -> dict[str, Any]:
        """The outcome of one point as JSON."""
        return {
            "removed": self.removed.tolist(),
            "reward": self.reward,
            "metrics": dict(self.metrics),
            "history": list(self.history),
            "evaluations": self.evaluations,
            "baselines": {name: allocation.state() for name, allocation in self.baselines.items()},
            "targets": list(self.targets),
            "halfway": None if self.halfway is None else self.halfway.tolist(),
            "note": self.note,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> SearchOutcome:
        """Resume from what ``state`` returned."""
        return cls(
            np.array(state["removed"], dtype=np.int64),
            state["reward"],
            state["metrics"],
            tuple(state["history"]),
            state["evaluations"],
            {name: Allocation.of(item) for name, item in state["baselines"].items()},
            tuple(state["targets"]),
            None if state.get("halfway") is None else np.array(state["halfway"], dtype=np.int64),
            state.get("note", ""),
        )


@dataclass(frozen=True)
class Progress:
    """How a search stands; handed to ``on_event`` after every round.

    ``kind``: "start", "round", "step", "recover" or "end".
    ``share``: how much of the way to the target the current architecture has come, 0 to 1.
    ``done``: how much of the search's work is done, 0 to 1.
    ``best``: the best reward on target so far, or None.
    ``left``: seconds to the end, estimated from the rounds so far; None before the first.
    ``rounds``: rounds so far, of all points and across resumptions.
    ``figures``: metrics and remaining shares of the candidate at hand, the best of a round, and what the strategy says of itself.
    """

    kind: str
    targets: tuple[str, ...]
    step: int
    steps: int
    evaluations: int
    limit: int | None
    reward: float
    accuracy: float
    best: float | None
    share: float
    done: float
    seconds: float
    left: float | None
    rounds: int
    figures: Mapping[str, float]
