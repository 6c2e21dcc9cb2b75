"""Error tables: what the removal of any number of units from any group does to the output of the network.

For each group and width the weights that read the group are refitted in closed form without the units that went, and the change of these
weights is multiplied with the gradients of the output (see ``fxprune.allocation.responses``): so the error of a layer counts by what it
does to the output, whatever its scale, with the correlation between channels, positions and layers. No slim network is made or run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.allocation.elimination import Thinning, eliminated
from fxprune.allocation.readers import Cut, Reader, cuts, unit_sums
from fxprune.allocation.responses import Responses, per_sample
from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.repair.least_squares import gram
from fxprune.repair.matrices import choose, input_rows
from fxprune.repair.registry import Repair
from fxprune.repair.splitting import portions
from fxprune.repair.splitting import samples as samples_of

FloatArray = npt.NDArray[np.float64]
ROWS = 32  # rows a layer takes from each calibration sample: places of a convolution's output, or tokens
ROUNDS = 32  # a group is thinned out in at most so many rounds; between them the table is interpolated
SAMPLES = 512  # calibration samples with gradients; more change little
MEMORY = 2**29  # bytes of changed weights that are held at once; groups beyond it wait for another run over the samples


@dataclass(frozen=True)
class ErrorTable:
    """What the removal of units does to the output.

    ``ranking``: by group, a score a unit, lowest for what goes first; "auto" importance of what the table is used for.
    ``widths``: by group, the numbers of units removed that were computed, rising from 0 to all but one.
    ``effects``: by group, the change of the output that each of these makes, for every sample along its own random direction,
    (widths, samples), float64.
    """

    ranking: Mapping[str, FloatArray]
    widths: Mapping[str, npt.NDArray[np.int64]] = field(repr=False)
    effects: Mapping[str, FloatArray] = field(repr=False)

    def along(self, name: str) -> FloatArray:
        """The effects of removing 0, 1, ... units of a group, up to all but one: (size, samples)."""
        at, known = self.widths[name], self.effects[name]
        wanted = np.arange(int(at[-1]) + 1)
        upper = np.clip(np.searchsorted(at, wanted), 1, None) if len(at) > 1 else np.zeros(len(wanted), dtype=np.int64)
        lower = np.maximum(upper - 1, 0)
        share = (wanted - at[lower]) / np.maximum(at[upper] - at[lower], 1)
        found: FloatArray = known[lower] * (1 - share[:, None]) + known[upper] * share[:, None]
        return found

    def errors(self, name: str) -> FloatArray:
        """The mean squared change of the output by units removed, (size,); never falling."""
        found: FloatArray = np.maximum.accumulate((self.along(name) ** 2).mean(1))
        return found


def error_table(
    graph: CouplingGraph,
    calibration: Iterable[Any],
    *,
    ranking: Mapping[str, Any] | None = None,
    repair: Repair = "lstsq",
    samples: int = SAMPLES,
    seed: int = 0,
) -> ErrorTable:
    """Compute the error table of an analysed network, from its weights as they are now.

    Args:
        graph: The analysed network; neither it nor its model is changed.
        calibration: Batches of inputs, or of (inputs, labels); labels are not read. All of them serve the second moments of what layers
            read, the first ``samples`` samples the gradients.
        ranking: Group name -> a score a unit; the lowest go first. Left out: the table chooses the order itself.
        repair: How a slim network will be repaired: by least squares ("lstsq"), which the errors then allow for; by its means ("bn",
            "bias"); or not at all ("none").
        samples: Samples whose output gradients are computed.
        seed: Of the random directions and places.

    Raises:
        InputError: There is no calibration batch, or the network's output holds no floating tensor.
        EvaluationError: The output is not finite.
    """
    groups = [group for group in graph.groups if group.prunable]
    cuts_of = {group.name: cuts(group, graph) for group in groups}
    all_cuts = [cut for found in cuts_of.values() for cut in found]
    responses = Responses(graph, calibration, {c.name for c in all_cuts if c.reads}, {c.name for c in all_cuts if not c.reads})
    deep = _deep(responses, samples)
    statistics = _Statistics.of(responses, deep, seed)
    order, widths, effects = {}, {}, {}
    for portion in portions(groups, lambda group: _size(group, cuts_of[group.name], responses), MEMORY):
        thinned = {g.name: _Thinned.of(g, cuts_of[g.name], responses, statistics, ranking, repair) for g in portion}
        found = _effects(thinned, responses, deep, seed, {} if repair == "none" else _means(thinned, statistics, responses))
        for name, one in thinned.items():
            order[name], widths[name], effects[name] = one.ranking, one.widths, found[name]
    return ErrorTable(order, widths, effects)


def _deep(responses: Responses, samples: int) -> list[int]:
    """The first batches that hold ``samples`` samples."""
    found, held = [], 0
    for batch in range(len(responses.batches)):
        if held >= samples:
            break
        found.append(batch)
        held += samples_of(responses.batches[batch])
    return found


class _Moments:
    """First and second moments of rows (rows, features), added up."""

    def __init__(self) -> None:
        self.rows = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.rows += len(x)
        new = [x.sum(0).cpu().double(), gram(x.unsqueeze(0))[0].cpu().double()]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new

    def mean(self) -> Tensor:
        return self._sums[0] / self.rows

    def covariance(self) -> Tensor:
        mean = self.mean()
        return self._sums[1] / self.rows - mean.unsqueeze(1) * mean


@dataclass(frozen=True)
class _Statistics:
    """``moments``: of what each reader reads. ``stakes``: what a squared error of each of its output channels does to the output.

    ``saliency``: the gradients of the weights that cannot be refitted, one a batch.
    """

    moments: Mapping[str, _Moments]
    stakes: Mapping[str, Tensor]
    saliency: Mapping[str, Sequence[Tensor]]

    @classmethod
    def of(cls, responses: Responses, deep: list[int], seed: int) -> _Statistics:
        """One run over all batches, there and back for those that are ``deep``."""
        moments = {name: _Moments() for name in responses.readers}
        apart: dict[str, Tensor] = {}
        together: dict[str, Tensor] = {}
        saliency: dict[str, list[Tensor]] = {name: [] for name in responses.rest}
        number = {name: i for i, name in enumerate(responses.readers)}

        def hear(reader: Reader, _: Tensor, gradient: Tensor) -> None:
            rows = _channel_rows(reader, gradient)
            _add(apart, reader.name, rows.square().sum((0, 1)).cpu().double())
            _add(together, reader.name, rows.sum(1).square().sum(0).cpu().double())

        for batch in range(len(responses.batches)):
            limit = ROWS * samples_of(responses.batches[batch])

            def see(reader: Reader, inputs: Tensor, output: Tensor, batch: int = batch, limit: int = limit) -> None:
                layer = reader.layer
                drawn = (seed * 1009 + batch) * 100_003 + number[reader.name]
                rows = input_rows(layer.form, layer.weight, inputs, choose(layer.form, layer.weight, inputs, limit, drawn))
                moments[reader.name].add(rows[0])

            if batch in deep:
                for name, gradient in responses.backward(batch, seed, hear, see).items():
                    saliency[name].append(gradient)
            else:
                responses.forward(batch, see)
        # Errors at different positions may add up or cancel out; the larger of both readings decides which units go.
        stakes = {name: torch.maximum(apart[name], together[name]) for name in apart}
        return cls(moments, stakes, saliency)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _channel_rows(reader: Reader, tensor: Tensor) -> Tensor:
    """(samples, positions, channels)."""
    form = reader.layer.form
    if not form.space:
        return tensor.float().reshape(tensor.shape[0], -1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.float().reshape(1, 1, -1)
    batched = tensor.unsqueeze(0) if tensor.ndim == form.space + 1 else tensor
    return batched.float().flatten(2).transpose(1, 2)


def _size(group: Group, cut: Sequence[Cut], responses: Responses) -> int:
    """Bytes of the changed weights of a group at all its widths."""
    read = [responses.readers[one.name] for one in cut if one.reads and one.name in responses.readers]
    return 4 * (min(group.size, ROUNDS) + 1) * sum(one.weights.numel() for one in read)


@dataclass(frozen=True)
class _Thinned:
    """A group thinned out. ``changes``: for each reader, the change of its weights at every width, (widths, outputs * features), float32.

    ``rest``: for each other weight that reads it, the units' rows summed at every width are taken from its gradient.
    """

    ranking: FloatArray
    widths: npt.NDArray[np.int64]
    changes: Sequence[tuple[str, Tensor]]
    rest: Sequence[Cut]
    order: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        group: Group,
        cut: Sequence[Cut],
        responses: Responses,
        statistics: _Statistics,
        ranking: Mapping[str, Any] | None,
        repair: Repair,
    ) -> _Thinned:
        read = [(responses.readers[c.name], c) for c in cut if c.reads and c.name in statistics.stakes]
        rest = [c for c in cut if c.name in responses.rest and not (c.reads and c.name in responses.readers)]
        given = None if ranking is None else torch.from_numpy(np.argsort(np.asarray(ranking[group.name], dtype=np.float64), kind="stable"))
        thinnings = [
            Thinning.of(
                one.weights,
                statistics.moments[one.name].covariance(),
                statistics.stakes[one.name],
                one.width,
                c.indices,
                c.units,
                statistics.moments[one.name].rows,
                refitted=repair == "lstsq",
            )
            for one, c in read
        ]
        if given is None and not thinnings:
            given = torch.from_numpy(np.argsort(_saliency(group, rest, responses, statistics), kind="stable"))
        each = -(-group.size // ROUNDS)
        gone: list[Tensor] = []
        changes: list[list[Tensor]] = [[torch.zeros_like(one.weights).flatten().float()] for one, _ in read]
        for went in eliminated(group.size, thinnings, given, each):
            gone.append(went)
            for (one, _), thinning, found in zip(read, thinnings, changes, strict=True):
                found.append((thinning.weights - one.weights).flatten().float())
        widths = np.cumsum([0, *(len(one) for one in gone)]).astype(np.int64)
        first = torch.cat(gone).numpy() if gone else np.zeros(0, dtype=np.int64)
        order = np.concatenate([first, np.setdiff1d(np.arange(group.size), first)]).astype(np.int64)
        scores = np.empty(group.size)
        scores[order] = np.arange(group.size)
        return cls(scores, widths, [(one.name, torch.stack(f)) for (one, _), f in zip(read, changes, strict=True)], rest, order)


def _saliency(group: Group, rest: Sequence[Cut], responses: Responses, statistics: _Statistics) -> FloatArray:
    """By unit, the mean squared first-order change of the output without it (Molchanov 2019, arXiv:1906.10771)."""
    total = np.zeros(group.size)
    for cut in rest:
        for gradient in statistics.saliency[cut.name]:
            total += unit_sums(responses.rest[cut.name].detach() * gradient, cut, group.size) ** 2
    return total


def _means(thinned: Mapping[str, _Thinned], statistics: _Statistics, responses: Responses) -> dict[str, Tensor]:
    """The mean inputs of the readers whose output can be given a constant, as a repair does."""
    names = {name for one in thinned.values() for name, _ in one.changes if responses.readers[name].layer.takes_shift}
    return {name: statistics.moments[name].mean().float().to(responses.device) for name in sorted(names)}


def _effects(
    thinned: Mapping[str, _Thinned], responses: Responses, deep: list[int], seed: int, means: Mapping[str, Tensor]
) -> dict[str, FloatArray]:
    """Run the samples there and back once more, and multiply each layer's gradients with its changes."""
    changes: dict[str, list[tuple[str, Tensor]]] = {}
    for group, one in thinned.items():
        for name, change in one.changes:
            changes.setdefault(name, []).append((group, change))
    held = {name: [(group, change.to(responses.device)) for group, change in found] for name, found in changes.items()}
    found: dict[str, list[Tensor]] = {group: [] for group in thinned}
    for batch in deep:
        samples = samples_of(responses.batches[batch])
        sums = {group: torch.zeros(len(one.widths), samples, dtype=torch.float64) for group, one in thinned.items()}
        hear: Callable[[Reader, Tensor, Tensor], None] = _Hearing(held, means, sums, samples)
        rest = responses.backward(batch, seed, hear)
        for group, one in thinned.items():
            for cut in one.rest:
                if cut.name in rest:
                    along = unit_sums(responses.rest[cut.name].detach() * rest[cut.name], cut, len(one.order))
                    lost = np.concatenate([[0.0], -np.cumsum(along[one.order])])[one.widths]
                    # One figure a batch: spread so that its square counts as the sum of the samples' own.
                    sums[group] += torch.from_numpy(lost)[:, None] / samples**0.5
            found[group].append(sums[group])
    return {group: torch.cat(parts, 1).numpy() for group, parts in found.items()}


@dataclass(frozen=True)
class _Hearing:
    """Adds up what the changes of a reader's weights do to the output. ``means``: of the inputs of readers whose mean is corrected."""

    changes: Mapping[str, Sequence[tuple[str, Tensor]]]
    means: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    samples: int

    def __call__(self, reader: Reader, inputs: Tensor, gradient: Tensor) -> None:
        if reader.name not in self.changes:
            return
        weights, constants = per_sample(reader, inputs, gradient, self.samples)
        outputs = constants.shape[1]
        for group, change in self.changes[reader.name]:
            effect = change @ weights.T
            if reader.name in self.means:
                effect = effect - change.unflatten(1, (outputs, -1)) @ self.means[reader.name] @ constants.T
            self.sums[group].add_(effect.cpu().double())
