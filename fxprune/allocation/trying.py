"""Allocations tried out: a few slim networks made, repaired and compared with the original on calibration inputs that were kept apart.

An error table is exact for small changes and says too much or too little for large ones, by how much depends on the group. One coefficient
for each group allows for that, found by a few evaluations (SPDY, Frantar 2022, https://arxiv.org/abs/2201.13096, sec. 3.2); here the first
of them are the table itself, its residual streams held or let go, and the same share of every group, so that what is taken is never worse
than these where it is judged. Where a trial is cheap, steps from the best so far follow: one group loses more or less, and the others make
up for it as the table says; a step that served is taken again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from fxprune.allocation.uniform import Uniform
from fxprune.evaluation.batches import alone, inputs_of
from fxprune.evaluation.running import call, device_of, evaluating, one_thread, to_device
from fxprune.example_inputs import build
from fxprune.passes.base import Observer
from fxprune.passes.compat import BatchNormBase
from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.passes.planning.cost_model import cost_model
from fxprune.passes.planning.plan import keep_counts
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.repair.distance import distances
from fxprune.repair.registry import Repair
from fxprune.repair.repairer import Repairer
from fxprune.repair.splitting import JUDGE, Piece, pieces, samples

FloatArray = npt.NDArray[np.float64]
Counts = Mapping[str, int]


@dataclass(frozen=True)
class Near:
    """``met``: weights of the groups, and removals to begin with -> the removals that the table then comes to.
    ``moved``: removals, a group, and what it is to lose -> removals near them, or None."""

    met: Callable[[FloatArray, Counts | None], Counts]
    moved: Callable[[Counts, str, int], Counts | None]


TRIALS = 12  # networks tried where a trial is dear: the fixed ones and what is drawn around the best
MOVES, WORTH = 32, 6e11  # steps that follow the fixed ones elsewhere, at most, and multiply-accumulates of what they are repaired by
FITTED, JUDGED = 384, 768  # samples by which they are repaired and judged
CHEAP = 4e10  # multiply-accumulates of a trial's inputs; dearer ones are sorted by BatchNorm re-estimated, and the best repaired in full
DEAR_FITTED, DEAR_JUDGED = 128, 64
HELD, LOOSE = 10.0, 0.5  # what the changes by residual streams count in two of the first allocations
STEP = (0.04, 0.3)  # of a group's units that a step moves
SPREAD = 0.25  # of the logarithms of coefficients that are drawn, at first
SURE = 1.0  # standard errors by which an allocation has to be better than the table's own


@dataclass(frozen=True)
class Trial:
    """``counts``: units that each group loses. ``distance``: of its outputs from the original's on the samples that judge, their mean;
    ``each``: by sample. ``repair``: what it was repaired by."""

    name: str
    counts: Counts
    distance: float
    repair: str
    each: FloatArray = field(repr=False)


class Trials:
    """Tries allocations of one network. ``ranking``: group name -> a score a unit, the lowest go first."""

    def __init__(
        self, graph: CouplingGraph, batches: Sequence[Any], ranking: Mapping[str, Any], repair: Repair, observe: Observer | None = None
    ) -> None:
        self.graph, self.ranking, self.observe = graph, ranking, observe
        self.device = device_of(graph.model)
        self.original: nn.Module = Slimmer(graph, np.ones(int(graph.starts[-1]), dtype=bool)).run().eval()
        with evaluating(self.original):
            self.pieces = pieces([inputs_of(batch, graph.inputs) for batch in batches], self._called)
        judge, fit = [p for p in self.pieces if p.role == JUDGE], [p for p in self.pieces if p.role != JUDGE]
        macs = cost_model(graph).macs() / samples(build(graph.inputs, device="meta"))
        normed = any(isinstance(m, BatchNormBase) and m.running_mean is not None for m in self.original.modules())
        cost = macs * min(FITTED, sum(p.samples for p in fit))
        dear = repair not in ("none", "bn") and normed and cost > CHEAP
        self.moves = 0 if dear else min(MOVES, int(WORTH / max(cost, 1)))
        self.whole = Repairer(graph, alone([p.inputs for p in fit]), repair if fit else "none")
        few = _first(fit, DEAR_FITTED if dear else FITTED)
        self.quick = self.whole
        if dear or len(few) < len(fit):
            self.quick = Repairer(graph, alone([p.inputs for p in few]), "bn" if dear else repair, thorough=False)
        self.judge = judge
        self.few = _first(judge, DEAR_JUDGED) if dear else _first([*judge, *fit[len(few) :]], JUDGED)
        with evaluating(self.original):
            longer = max(self.few, self.judge, key=len)  # one begins with the other
            self.wanted = [self._called(piece.inputs) for piece in longer]

    @property
    def possible(self) -> bool:
        """Whether there are samples to judge by, apart from those that repair."""
        return bool(self.judge) and len(self.judge) < len(self.pieces)

    def quickly(self, name: str, counts: Counts) -> Trial:
        """Try an allocation on few samples."""
        return self._tried(name, counts, self.quick, self.few)

    def fully(self, trial: Trial) -> Trial:
        """Try an allocation as it will be used, on all samples."""
        return self._tried(trial.name, trial.counts, self.whole, self.judge)

    def _tried(self, name: str, counts: Counts, repairer: Repairer, judge: Sequence[Piece]) -> Trial:
        begun = time.perf_counter()
        with one_thread():
            slimmer = Slimmer(self.graph, keep_counts(self.graph, counts, self.ranking))
            slim: nn.Module = slimmer.run().eval()
            repairer(slim, slimmer)
            with evaluating(slim):
                found = [call(slim, to_device(piece.inputs, self.device)) for piece in judge]
        each = distances(found, self.wanted[: len(judge)]).numpy()
        # What is not finite is far away, and may be compared.
        trial = Trial(name, dict(counts), float(np.nan_to_num(each, nan=1e30, posinf=1e30).mean()), repairer.kind, each)
        if self.observe is not None:
            self.observe("Try", trial, time.perf_counter() - begun)
        return trial

    def _called(self, inputs: Any) -> Any:
        return call(self.original, to_device(inputs, self.device))


def tried(trials: Trials, uniform: Uniform, groups: Sequence[Group], table: Counts, near: Near, number: int, seed: int) -> list[Trial]:
    """Try ``number`` allocations and the steps that are worth it, and the best few as they will be used; returns those last ones, the one
    to take first.

    The table's own is taken where none is better by more than ``SURE`` standard errors of their differences by sample.

    Args:
        trials: What tries them.
        uniform: The same share of every group.
        groups: The prunable groups, in the order of the weights of ``near``.
        table: What the table comes to as it is.
        near: What it comes to otherwise.
        number: How many are tried where a trial is dear; elsewhere with fewer than ``TRIALS`` there are fewer steps.
        seed: Of the weights and steps that are drawn.
    """
    stream = np.array([_streams(group, trials.graph) for group in groups])
    found: dict[tuple[int, ...], Trial] = {}

    def note(name: str, counts: Counts) -> Trial | None:
        key = tuple(counts.get(group.name, 0) for group in groups)
        if key in found:
            return None
        found[key] = trials.quickly(name, counts)
        return found[key]

    first = note("table", table)
    assert first is not None
    best, at = first, np.ones(len(groups))
    for name, counts, weights in _begun(uniform, stream, near):
        trial = note(name, counts) if len(found) < number else None
        if trial is not None and trial.distance < best.distance:
            best, at = trial, weights
    drawn = np.random.default_rng(seed)
    for i in range(0 if trials.moves else 2 * number):  # small networks have few allocations, and some are drawn again
        if len(found) >= number:
            break
        weights = at * np.exp(SPREAD * (1 - i / (2 * number)) * drawn.standard_normal(len(groups)))
        trial = note(f"drawn {i + 1}", near.met(weights, best.counts))
        if trial is not None and trial.distance < best.distance:
            best, at = trial, weights
    _stepped(best, note, groups, near, trials.moves * number // TRIALS, drawn)
    ordered = sorted(found.values(), key=lambda one: one.distance)
    finalists = [first, *(one for one in ordered[: 1 if trials.moves else 2] if one is not first)]
    final = [trials.fully(one) for one in finalists] if trials.quick is not trials.whole or trials.few is not trials.judge else finalists
    return sorted(final, key=lambda one: (not _better(one, final[0]) if one is not final[0] else False, one.distance))


def _stepped(
    best: Trial,
    note: Callable[[str, Counts], Trial | None],
    groups: Sequence[Group],
    near: Near,
    moves: int,
    drawn: np.random.Generator,
) -> None:
    """Try steps from the best so far; one that served is taken again."""
    again: tuple[Group, int] | None = None
    made = 0
    for _ in range(4 * moves):  # some lead nowhere
        if made >= moves:
            return
        if again is None:
            group = groups[int(drawn.integers(len(groups)))]
            step = max(1, round(group.size * float(drawn.uniform(*STEP)))) * (1 if drawn.random() < 0.5 else -1)
        else:
            group, step = again
        again = None
        counts = near.moved(best.counts, group.name, min(max(best.counts.get(group.name, 0) + step, 0), group.size - group.least))
        trial = None if counts is None else note(f"{group.name} {-step:+d}", counts)
        if trial is None:
            continue
        made += 1
        if trial.distance < best.distance:
            best, again = trial, (group, step)


def _begun(uniform: Uniform, stream: npt.NDArray[np.bool_], near: Near) -> Iterator[tuple[str, Counts, FloatArray]]:
    """Allocations to begin with, made when they are asked for, and the weights around which more are drawn."""
    even = np.ones(len(stream))
    counts = uniform.counts()
    if uniform.fits(counts):
        yield "uniform", counts, even
    if stream.any() and not stream.all():
        for name, weight in (("streams held", HELD), ("streams loose", LOOSE)):
            weights = np.where(stream, weight, 1.0)
            yield name, near.met(weights, None), weights


def _better(one: Trial, table: Trial) -> bool:
    """Whether ``one`` is better than the table's own by more than chance."""
    apart = table.each - one.each
    if not np.isfinite(apart).all():
        return one.distance < table.distance
    return float(apart.mean()) > SURE * float(apart.std()) / math.sqrt(max(1, len(apart)))


def _streams(group: Group, graph: CouplingGraph) -> bool:
    """Whether several layers write the group's units, as into a residual stream; what works channel by channel only passes them on."""
    tensors = ((graph.traced.skeleton.tensor(name), (name, dim)) for name, dim, _ in group.members)
    return len([key for tensor, key in tensors if tensor.ndim > 1 and tensor.shape[1] > 1 and graph.is_output(key)]) > 1


def _first(chosen: Sequence[Piece], wanted: int) -> list[Piece]:
    """The first pieces that hold as many samples."""
    found: list[Piece] = []
    for piece in chosen:
        if sum(one.samples for one in found) >= wanted:
            break
        found.append(piece)
    return found
