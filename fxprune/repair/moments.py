"""Second moments of what the layers of the original network read: one pass over calibration batches, in bounded memory.

What importances and error tables are made from: how well the inputs that are left can stand in for those that go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.repair.layers import Layer, layers_of
from fxprune.repair.least_squares import gram
from fxprune.repair.matrices import choose, input_axis, input_rows, matrices
from fxprune.repair.repairer import Repairer
from fxprune.repair.replay import Room
from fxprune.repair.splitting import portions

WIDEST = 4608  # features of a layer beyond which its moments are too large
MEMORY = 2**30  # bytes of moments that are gathered at once


@dataclass(frozen=True)
class InputMoments:
    """What a layer of the original network reads, summed over rows of calibration inputs.

    A row is what the layer's weights are multiplied with at one place of its output: of a convolution the window, features in the order
    channel, then kernel position; of a linear layer the input vector. Layers with ``groups`` have a matrix each.

    ``name``: the weight's qualified name. ``weights``: (groups, outputs, features), copied. ``gain``: (groups * outputs,) or of shape (),
    what the BatchNorm behind the layer multiplies each output with. ``mean``: (groups, features). ``second``: (groups, features, features),
    the mean of the products x xᵀ. ``rows``: how many rows were summed. ``width``: features an input channel has (kernel positions).
    ``axis``: of the weight, along which its input channels lie.
    ``mean``, ``second`` and ``weights`` are float64 on the CPU.
    """

    name: str
    weights: Tensor
    gain: Tensor
    mean: Tensor
    second: Tensor
    rows: int
    width: int
    axis: int

    @property
    def covariance(self) -> Tensor:
        """(groups, features, features)."""
        return self.second - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)


@torch.no_grad()
def collect(graph: CouplingGraph, batches: Iterable[Any], *, widest: int = WIDEST, memory: int = MEMORY) -> dict[str, InputMoments]:
    """The input moments of every layer that reads units of a prunable group.

    The original network runs once over the batches, batch by batch; only where the moments of all layers take more than ``memory`` bytes
    are they gathered in several passes, as many layers at a time as fit.

    Args:
        graph: The analysed network; its weights as they are now.
        batches: Inputs, or pairs of inputs and labels, as for a repair.
        widest: Layers with more features (input channels of a group times kernel positions) are left out.
        memory: Bytes that the moments gathered in one pass may take.

    Returns:
        Qualified name of the weight -> its ``InputMoments``, in the order in which the layers run. Left out are layers that
        ``fxprune.repair.layers`` does not recognise: called more than once, or with a weight that is shared or computed.
    """
    read = {(name, dim) for group in graph.groups if group.prunable for name, dim, _ in group.members}
    repairer = Repairer(graph, batches, "lstsq")
    found: dict[str, InputMoments] = {}
    for part in graph.traced.sections:
        prefix = f"{part}." if part else ""
        module, play_graph = repairer.original(part)
        layers = [
            (i, one)
            for i, one in enumerate(layers_of(module, play_graph))
            if (prefix + one.name, input_axis(one.form)) in read and matrices(one.form, one.weight).shape[2] <= widest
        ]
        for chosen in portions(layers, _size, memory):
            for one, sums in _gathered(repairer, part, chosen):
                weights = matrices(one.form, one.weight).cpu().double()
                width = one.weight[0, 0].numel() if one.form.space else 1
                found[prefix + one.name] = InputMoments(
                    name=prefix + one.name,
                    weights=weights,
                    gain=one.gain().cpu().double(),
                    mean=sums.mean(),
                    second=sums.second(),
                    rows=sums.rows,
                    width=width,
                    axis=input_axis(one.form),
                )
    return found


class _Sums:
    def __init__(self) -> None:
        self.rows, self._sums = 0, [torch.zeros(()), torch.zeros(())]

    def add(self, x: Tensor) -> None:
        """Rows (groups, rows, features)."""
        self.rows += x.shape[1]
        new = [x.sum(1).cpu().double(), gram(x).cpu().double()]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)]

    def mean(self) -> Tensor:
        return self._sums[0] / max(1, self.rows)

    def second(self) -> Tensor:
        return self._sums[1] / max(1, self.rows)


def _size(numbered: tuple[int, Layer]) -> int:
    groups, _, features = matrices(numbered[1].form, numbered[1].weight).shape
    return 8 * groups * features**2


def _gathered(repairer: Repairer, part: str, layers: list[tuple[int, Layer]]) -> list[tuple[Layer, _Sums]]:
    sums = [_Sums() for _ in layers]
    with Room(MEMORY) as room:
        play = repairer.playback(part, room)
        for batch, piece in enumerate(repairer.pieces):
            for (i, one), into in zip(layers, sums, strict=True):
                values = play.before(batch, one.node)
                for call, each in enumerate(values):
                    inputs = each[one.source]
                    seed = (batch * 1009 + call) * 100_003 + i
                    places = choose(one.form, one.weight, inputs, repairer.rows(one, piece.inputs), seed)
                    into.add(input_rows(one.form, one.weight, inputs, places))
                play.leave(batch, values)
            play.drop(batch)
    return [(one, into) for (_, one), into in zip(layers, sums, strict=True) if into.rows]
