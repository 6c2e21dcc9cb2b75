"""The kept positions along everything that a rewrite cuts, found all at once: the first thing that each candidate of a search asks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.labels.values import Vector
from fxprune.passes.planning.plan import Keep

Kept = list[Vector | None]
"""For every line the positions that are left, None where all are."""


class Lines:
    """The different vectors of units along parameters and values of an analysed model, laid end to end.

    ``of_dims``: tensor name -> its dimensions that carry units, each with the number of its line. ``of_labels``: id of a vector of labels
    -> the number of its line.
    """

    def __init__(self, graph: CouplingGraph, labels: Iterable[Vector]) -> None:
        self._rows: list[Vector] = []
        known: dict[int | bytes, int] = {}
        self.of_dims = {name: tuple((dim, self._row(units, known)) for dim, units in dims) for name, dims in graph.dims_of.items()}
        self._labels = {id(vector): vector for vector in labels}  # held, so that no other vector gets the id of one
        self.of_labels = {key: self._row(graph.units_of_labels(vector), known) for key, vector in self._labels.items()}
        sizes = np.array([len(row) for row in self._rows], dtype=np.int64)
        self._sizes, self._ends = sizes.tolist(), np.cumsum(sizes)
        self._starts = np.repeat(self._ends - sizes, sizes)
        self._units = np.concatenate(self._rows) if self._rows else np.zeros(0, dtype=np.int64)

    def _row(self, units: Vector, known: dict[int | bytes, int]) -> int:
        """The number of a vector's line: dimensions of one conv, its norm and what it gives are often one line."""
        found = known.get(id(units))
        if found is None:
            content = units.tobytes()
            found = known.get(content)
            if found is None:
                found = known[content] = len(self._rows)
                self._rows.append(units)
            if self._rows[found] is units:
                known[id(units)] = found
        return found

    def kept(self, keep: Keep) -> Kept:
        """What is left of every line. ``keep``: one flag for each unit and a last one, for what belongs to no unit."""
        where = np.flatnonzero(keep[self._units])
        ends = np.searchsorted(where, self._ends).tolist()
        positions = where - self._starts[where]
        found: Kept = []
        begin = 0
        for size, end in zip(self._sizes, ends, strict=True):
            found.append(None if end - begin == size else positions[begin:end].copy())
            begin = end
        return found


def as_indices(kept: Kept) -> list[torch.Tensor | None]:
    """The same as index tensors."""
    return [None if positions is None else torch.from_numpy(positions) for positions in kept]
