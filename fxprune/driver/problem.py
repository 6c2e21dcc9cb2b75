"""What the search is told about a network: numbers and functions, never the network itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fxprune.errors import SearchError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Metrics = Mapping[str, float]
Cost = Callable[[IntArray], Metrics]
Score = Callable[[IntArray], Metrics]
Rounding = Callable[[IntArray], IntArray]
Trying = Callable[[Mapping[str, float]], "IntArray | None"]
"""Shares of metrics that may be left -> the best removal vector of those that were tried out, or None where none can be."""


class Allocating(Protocol):
    """An error table: what each number of removed units breaks. ``metrics``: the costs that it can bound."""

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def allocate(self, bounds: Mapping[str, float]) -> IntArray:
        """The removal vector that breaks least while at most these shares of the metrics are left; nothing is scored for it."""
        ...


class Clock(Protocol):
    """Measures a latency that is otherwise predicted, and sets the prediction right."""

    @property
    def tolerance(self) -> float:
        """How far from its target, as a share of it, a measured latency may be."""
        ...

    def seconds(self) -> float:
        """What the original takes."""
        ...

    def share(self, removed: IntArray) -> float:
        """What is left of the latency, measured: seconds, and another number each time."""
        ...

    def correct(self, points: Sequence[tuple[IntArray, float]]) -> None:
        """From now on predict by these measured shares, the last of which count most."""
        ...


@dataclass(frozen=True)
class Space:
    """The removal vectors there are, and what each costs: all that a strategy sees.

    A *removal vector* is an int64 array of shape ``(groups,)``: how many units each prunable group loses, from 0 to its units minus one.

    ``names``: one per group.
    ``units``: int64, shape ``(groups,)``: units of each group before pruning.
    ``channels``: int64, shape ``(groups,)``: output channels that go with one unit of each group.
    ``fixed_channels``: output channels in no prunable group; they count in the channel sparsity's denominator.
    ``cost``: removal vector -> what is left, as a share of the original from 0 to 1: "macs", "params", and "latency" and "memory" where
        they are asked for. Only the names that a search needs are looked up, so a mapping may measure on lookup.
    ``unit_scores``: for each group the importance of its units in ascending order, float64, shape ``(units,)``; None if there is none.
    ``rounding``: removal vector -> the one that it comes to, nowhere more, where channels are kept in multiples of ``grain``; None: itself.
    ``table``: the error table, where there is one; ``tried``: tries allocations that it gives beside others, which takes as long as some
        dozens of scores. ``rungs``: how many cheaper scores there are.
    ``blocks``: how many of the last groups are whole blocks, which lose nothing (0) or are left out (1); they have 2 units.
    ``slack``: by how much of it a cost may be off where that is more than the search's tolerance: costs that are predicted, and measured
        on what was found.
    """

    names: tuple[str, ...]
    units: IntArray
    channels: IntArray
    cost: Cost
    fixed_channels: int = 0
    unit_scores: tuple[FloatArray, ...] | None = None
    rounding: Rounding | None = None
    grain: int = 1
    table: Allocating | None = None
    rungs: int = 0
    most: IntArray | None = None
    slack: Mapping[str, float] = field(default_factory=dict)
    blocks: int = 0
    tried: Trying | None = None

    @property
    def room(self) -> IntArray:
        """The most that each group may lose: all units but one, or its limit."""
        return self.units - 1 if self.most is None else np.minimum(self.units - 1, self.most)

    @property
    def widths(self) -> IntArray:
        """``units``, and 0 for every block: what allocations go by that know nothing of blocks."""
        found: IntArray = self.units.copy()
        found[len(found) - self.blocks :] = 0
        return found

    def zeros(self) -> IntArray:
        """The removal vector of the original network."""
        return np.zeros(len(self.names), dtype=np.int64)

    def sparsity(self, removed: IntArray) -> float:
        """Share of all output channels that are gone, as the paper counts (Wang 2024, sec. 4)."""
        total = int((self.units * self.channels).sum()) + self.fixed_channels
        return float((self.rounded(removed) * self.channels).sum() / max(total, 1))

    def rounded(self, removed: IntArray) -> IntArray:
        """What ``removed`` comes to once channels are kept in multiples of ``grain``."""
        return removed if self.rounding is None else self.rounding(removed)

    def checked(self, removed: Any, where: str) -> IntArray:
        """Return ``removed`` as a fresh removal vector; raise ``SearchError`` naming ``where`` if it is none of this space."""
        array = np.array(removed)
        if array.shape != self.units.shape or not np.issubdtype(array.dtype, np.integer):
            raise SearchError(
                f"{where}: expected {len(self.names)} whole numbers, one a group; got dtype {array.dtype}, shape {array.shape}"
            )
        vector = array.astype(np.int64)
        outside = np.flatnonzero((vector < 0) | (vector > self.room))
        if outside.size:
            i = int(outside[0])
            raise SearchError(f"{where}: group {self.names[i]!r} would lose {vector[i]} units; it may lose 0 to {self.room[i]}")
        return vector


@dataclass(frozen=True)
class Problem:
    """A network to be searched, as functions of a removal vector (see ``Space`` for the fields that they share).

    ``score``: removal vector -> metrics, among them "accuracy" (any figure of merit, larger is better). Expensive. It must be a pure
        function of the vector, so that executors and resumed runs agree; an executor with several workers pickles it.
    ``rough``: a cheaper score, of fewer images say, that gives the same metrics; with ``SearchConfig.finalists`` the search goes by it.
    ``rungs``: cheaper scores still, by less data each, the cheapest first; each lets the better of the candidates pass to the next one, and
        the last to ``score``; see ``SearchConfig.halving``.
    ``recover``: called with the current removal vector between prune steps to train what is left; scores may change after it.
    ``measured``: the original's latency in seconds, by the name "latency", once ``cost`` has measured it; a resumed search puts there what
        the first one measured, so that old and new shares are of the same whole.
    ``clock``: where ``cost`` predicts the latency, what measures it; see ``Clock``.
    ``save_weights``, ``load_weights``: write what ``recover`` changed to a path, and read it back when a search is resumed.
    """

    names: tuple[str, ...]
    units: IntArray
    channels: IntArray
    cost: Cost
    score: Score
    fixed_channels: int = 0
    unit_scores: Sequence[FloatArray] | None = None
    rough: Score | None = None
    rungs: Sequence[Score] = ()
    recover: Callable[[IntArray], None] | None = None
    save_weights: Callable[[Path], None] | None = None
    load_weights: Callable[[Path], None] | None = None
    rounding: Rounding | None = None
    grain: int = 1
    table: Allocating | None = None
    measured: dict[str, float] = field(default_factory=dict)
    most: IntArray | None = None
    clock: Clock | None = None
    blocks: int = 0
    tried: Trying | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        for name in ("units", "channels"):
            object.__setattr__(self, name, np.array(getattr(self, name), dtype=np.int64))
        groups = len(self.names)
        if groups == 0:
            raise SearchError("there is no prunable group to search over; fxprune.visualize(model, inputs) says why each is locked")
        if self.units.shape != (groups,) or self.channels.shape != (groups,):
            raise SearchError(f"{groups} names, but units of shape {self.units.shape} and channels of shape {self.channels.shape}")
        if len(set(self.names)) != groups or self.units.min() < 1:
            raise SearchError("group names must be unique and every group must have at least one unit")
        if self.unit_scores is not None and [len(s) for s in self.unit_scores] != self.units.tolist():
            raise SearchError("unit_scores must hold one array a group, as long as the group has units")

    @property
    def space(self) -> Space:
        """The part of the problem that strategies may see."""
        scores = None if self.unit_scores is None else tuple(np.asarray(s, dtype=np.float64) for s in self.unit_scores)
        return Space(
            self.names,
            self.units,
            self.channels,
            self.cost,
            self.fixed_channels,
            scores,
            self.rounding,
            self.grain,
            self.table,
            len(self.rungs),
            self.most,
            {} if self.clock is None else {"latency": self.clock.tolerance},
            self.blocks,
            self.tried,
        )
