"""Parts of channels that an operation sees alone (a split, a slice): each keeps one, since few operations take a tensor without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.labels.values import Vector, values

_parts: WeakKeyDictionary[CouplingGraph, list[Vector]] = WeakKeyDictionary()


def parts_of(graph: CouplingGraph) -> list[Vector]:
    """The units, shape ``(part,)``, along every axis of a tensor that may lose all of them: no group lies in it whole. Each once."""
    found = _parts.get(graph)
    if found is None:
        found = _parts[graph] = _found(graph)
    return found


def _found(graph: CouplingGraph) -> list[Vector]:
    sizes = np.diff(graph.starts)
    seen: set[int] = set()
    parts: dict[bytes, Vector] = {}
    for env in graph.values.values():
        for value in values(list(env.values())):
            for vector in value.axes.values():
                if id(vector) in seen:
                    continue
                seen.add(id(vector))
                units = graph.units_of_labels(vector)
                first = units[0]
                if first < 0 or not graph.prunable_unit[first]:
                    continue  # what is in no group, or in a locked one, stays
                group = graph.group_of_unit[first]
                if len(units) >= sizes[group] and _whole(units, graph.starts[group], sizes[group]):
                    continue
                units = np.unique(units)
                if units[0] < 0 or not graph.prunable_unit[units].all():
                    continue
                groups, counts = np.unique(graph.group_of_unit[units], return_counts=True)
                if not (counts == sizes[groups]).any():
                    parts[units.tobytes()] = units
    return list(parts.values())


def _whole(units: Vector, start: int, size: int) -> bool:
    """Whether the group of units from ``start`` on is among ``units``, as it is along most axes: in order at the front."""
    return bool((units[:size] == np.arange(start, start + size)).all())


def keep_one_of_each(graph: CouplingGraph, keep: npt.NDArray[np.bool_], scores: Mapping[str, Any]) -> None:
    """Where a part lost all of its units, bring the best of them back, and remove the next in its group instead."""
    if keep.all():
        return
    parts = parts_of(graph)
    for units in parts:
        if keep[units].any():
            continue
        best = max(units.tolist(), key=lambda u: (_score(graph, scores, u), -u))
        keep[best] = True
        group = graph.by_number[int(graph.group_of_unit[best])]
        start = int(graph.starts[group.number])
        mine = np.arange(start, start + group.size)
        for other in mine[np.argsort(np.asarray(scores[group.name], dtype=np.float64), kind="stable")].tolist():
            if keep[other] and other != best and not _last(parts, keep, other):
                keep[other] = False
                break


def _score(graph: CouplingGraph, scores: Mapping[str, Any], unit: int) -> float:
    number = int(graph.group_of_unit[unit])
    return float(scores[graph.by_number[number].name][unit - int(graph.starts[number])])


def _last(parts: Sequence[Vector], keep: npt.NDArray[np.bool_], unit: int) -> bool:
    """Whether a part would be empty without ``unit``."""
    return any(unit in part and int(keep[part].sum()) == 1 for part in parts)
