"""What reads the channels of a group: the weights whose columns go when its units go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.repair.layers import Layer, Reading
from fxprune.repair.matrices import input_axis, matrices

WIDEST = 4608  # features of a layer beyond which its covariance is too large; its weights count as sliced, not as refitted


@dataclass(frozen=True)
class Reader:
    """An ungrouped convolution or linear layer of the original that can be refitted.

    ``name``: its weight's qualified name. ``weights``: (outputs, features), float64 on the CPU; features are ordered by input channel, then
    by kernel position. ``width``: features of one input channel. ``calls``: one, or several with the same weight.
    """

    name: str
    calls: tuple[Layer, ...]
    weights: Tensor
    width: int

    @property
    def layer(self) -> Layer:
        """The layer as its first call shows it."""
        return self.calls[0]


@dataclass(frozen=True)
class Cut:
    """Where a group's units are taken from a weight: ``indices`` along ``dim`` of the parameter ``name``, and the ``units`` of each.

    ``reads``: whether the weight reads the units there; else it makes them.
    """

    name: str
    dim: int
    indices: Tensor
    units: Tensor
    reads: bool


def readers_of(module: Any, graph: fx.Graph, prefix: str, wanted: set[str]) -> list[Reader]:
    """The layers of a traced part that can be refitted, of the weights ``wanted``; ``prefix``: of the part's names, with its dot."""
    found = []
    reading = Reading(module, graph)
    for calls in [*([one] for one in reading.layers()), *reading.repeated()]:
        one = calls[0]
        name = prefix + one.name
        if name not in wanted or one.form.kind == "conv_transpose" or one.form.groups > 1:
            continue
        weights = matrices(one.form, one.weight)
        if weights.shape[2] <= WIDEST:
            width = weights.shape[2] // int(one.weight.shape[input_axis(one.form)])
            found.append(Reader(name, tuple(calls), weights[0].cpu().double(), width))
    return found


def cuts(group: Group, graph: CouplingGraph) -> list[Cut]:
    """The weights through which all that the group's units compute is read.

    Where nothing reads them through a weight (queries and keys, say), the first weight that makes them.
    """
    members = [
        Cut(name, dim, indices, units, not graph.is_output((name, dim)))
        for (name, dim, indices), units in zip(group.members, group.units, strict=True)
    ]
    skeleton = graph.traced.skeleton
    weights = [cut for cut in members if cut.name in skeleton.parameter_names and skeleton.tensor(cut.name).ndim > 1]
    reading = [cut for cut in weights if cut.reads]
    return reading or weights[:1] or members[:1]


def unit_sums(values: Tensor, cut: Cut, size: int) -> npt.NDArray[np.float64]:
    """``values``, shaped like the cut's parameter, summed over what belongs to each unit: (size,)."""
    rest = [d for d in range(values.ndim) if d != cut.dim]
    along = (values.sum(rest) if rest else values)[cut.indices.to(values.device)].double().cpu()
    return torch.zeros(size, dtype=torch.float64).index_add_(0, cut.units, along).numpy()
