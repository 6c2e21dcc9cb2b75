"""Labels to units and groups, on arrays alone: which labels are one class, which classes are of one kind, and in which order.

A *line* is one vector of labels: the channels along a dimension of a parameter (dimensions that share one vector are one line). A *class*
is a set of united labels, and becomes a *unit*. Classes that lie on the same lines equally often, for the same reasons, are of one
*kind*; the units of a kind are a *group*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fxprune.passes.ir.reasons import Reason
from fxprune.passes.labels.values import Labels, Vector

Flags = npt.NDArray[np.bool_]
NORMS = ("plain", "exact")


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes that lie on any line, numbered by their root.

    ``roots`` (classes,): the root label of each class, ascending. ``first`` (classes,): where it occurs first, among the indices of all
    lines one after the other. ``of_index`` (indices,): the class of every such index. ``line`` (indices,): its line. ``of_label``
    (labels,): the class of every label, -1 where it is on no line.
    """

    roots: Vector
    first: Vector
    of_index: Vector
    line: Vector
    of_label: Vector


@dataclass(frozen=True, eq=False)
class Partition:
    """Units and groups, both numbered in the order of their first index.

    ``starts`` (groups + 1,): the units of group g are ``starts[g]`` to ``starts[g + 1]``. ``group_of_unit`` (units,). ``units_of_line``:
    for each line, the unit of every index. ``unit_of_label`` (labels,): -1 for labels on no line. ``lines`` (groups, lines): whether a
    group has units on a line. ``reason``, ``note`` (groups,): 1 + the number of the pin, or of the note, that is given for the group; 0
    for none. ``undefined`` (groups,): likewise of the notes that hold with ``norms="exact"`` too. ``unproven``: norms -> groups for which
    the oracle is not defined, though it masks what went in choices. ``in_layer`` (groups,): whether its channels are those of a layer.
    """

    starts: Vector
    group_of_unit: Vector
    units_of_line: tuple[Vector, ...]
    unit_of_label: Vector
    lines: Flags
    reason: Vector
    note: Vector
    undefined: Vector
    unproven: dict[str, Flags]
    in_layer: Flags


def classes_of(labels: Labels, lines: Sequence[Vector]) -> Classes:
    """The classes of the labels on ``lines``."""
    found = [labels.find(line) for line in lines]
    flat = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    # np.unique would sort; roots are small numbers, so a table does it in one pass.
    first_at = np.full(labels.count + 1, -1, dtype=np.int64)
    first_at[flat[::-1]] = np.arange(len(flat))[::-1]
    roots = np.flatnonzero(first_at >= 0)
    number = np.full(labels.count + 1, -1, dtype=np.int64)
    number[roots] = np.arange(len(roots))
    line = np.repeat(np.arange(len(found)), [len(one) for one in found])
    return Classes(roots, first_at[roots], number[flat], line, number[labels.find(np.arange(labels.count))])


def reasons_of(classes: Classes, pins: Sequence[tuple[Vector, Reason]]) -> Vector:
    """For each class 1 + the number of the first reason that was given for one of its labels, or 0; shape (classes,).

    One sentence is one reason: the same words at several places have the number of the first.
    """
    reason = np.zeros(len(classes.roots), dtype=np.int64)
    if not pins or not len(classes.roots):
        return reason
    vectors = [vector for vector, _ in pins]
    number = np.repeat(np.arange(len(pins)), [len(vector) for vector in vectors])
    first_of: dict[str, int] = {}
    canonical = np.array([first_of.setdefault(text, i + 1) for i, (_, text) in enumerate(pins)])
    place = classes.of_label[np.concatenate(vectors)]
    hit = place >= 0
    reason[place[hit][::-1]] = canonical[number[hit]][::-1]
    return reason


def in_layers(classes: Classes, of_layers: Flags, weights: Sequence[Vector]) -> Flags:
    """Whether each class lies on a layer's line (``of_layers``, one flag a line) or is the channels of a tensor read as a weight."""
    found = np.zeros(len(classes.roots), dtype=bool)
    found[classes.of_index[of_layers[classes.line]]] = True
    if weights:
        place = classes.of_label[np.concatenate(weights)]
        found[place[place >= 0]] = True
    return found


def kinds_of(classes: Classes, lines: int, facts: Sequence[npt.NDArray[Any]]) -> Vector:
    """The kind of each class, shape (classes,): equal for classes that lie on the same lines equally often and share all ``facts``.

    Each line has a random mark and a class the sum of those of its lines, which tells kinds apart as a hash does; that it did is checked.
    """
    seed = 2024
    while True:
        rng = np.random.Generator(np.random.PCG64(seed))
        marks = rng.integers(1, 1 << 62, size=lines + len(facts), dtype=np.uint64)
        mixed = np.zeros(len(classes.roots), dtype=np.uint64)
        np.add.at(mixed, classes.of_index, marks[classes.line])
        for fact, mark in zip(facts, marks[lines:], strict=True):
            mixed += fact.astype(np.uint64) * mark
        _, kind = np.unique(mixed, return_inverse=True)
        kind = kind.reshape(-1)
        if is_alike(classes, kind, lines, facts):
            return kind
        seed += 1  # two kinds had one sum: other marks tell them apart


def is_alike(classes: Classes, kind: Vector, lines: int, facts: Sequence[npt.NDArray[Any]]) -> bool:
    """Whether all classes of one kind lie on the same lines equally often and share all facts."""
    if not len(kind):
        return True
    lead = np.zeros(int(kind.max()) + 1, dtype=np.int64)  # one class of each kind, which the others are compared with
    lead[kind] = np.arange(len(kind))
    of_lead = lead[kind]
    if any(not np.array_equal(fact, fact[of_lead]) for fact in facts):
        return False
    pairs, times = np.unique(classes.of_index * lines + classes.line, return_counts=True)
    owner, line = np.divmod(pairs, lines)
    starts = np.searchsorted(owner, np.arange(len(kind) + 1))
    counts = np.diff(starts)
    if not np.array_equal(counts, counts[of_lead]):
        return False
    twin = starts[of_lead[owner]] + np.arange(len(pairs)) - starts[owner]
    return bool(np.array_equal(line, line[twin]) and np.array_equal(times, times[twin]))


def ordered(kind: Vector, first: Vector) -> tuple[Vector, Vector]:
    """Group and unit number of every class: groups in the order of their first index, units within a group likewise."""
    count = int(kind.max()) + 1 if len(kind) else 0
    lead = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(lead, kind, first)
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(lead, kind="stable")] = np.arange(count)
    group = rank[kind]
    unit = np.empty(len(kind), dtype=np.int64)
    unit[np.lexsort((first, group))] = np.arange(len(kind))
    return group, unit


def partition(
    labels: Labels,
    lines: Sequence[Vector],
    of_layers: Flags,
    pins: Sequence[tuple[Vector, Reason]],
    notes: Sequence[tuple[Vector, Reason]],
    weights: Sequence[Vector] = (),
) -> Partition:
    """Units and groups of the channels on ``lines``.

    Args:
        labels: The union-find that the lines' labels are in.
        lines: Vectors of labels, shape (indices of the line,) each, in the order of execution.
        of_layers: For each line, whether it is a dimension of a layer's parameter.
        pins: Labels that must stay, with the reason; the first given for a label counts.
        notes: Labels whose pruning changes a statistic, likewise.
        weights: Labels of tensors that are read as a layer's weight.

    Returns:
        The partition. A channel belongs to exactly one unit, a unit to exactly one group.
    """
    classes = classes_of(labels, lines)
    reason, note = reasons_of(classes, pins), reasons_of(classes, notes)
    layer = in_layers(classes, of_layers, weights)
    lasting = reasons_of(classes, [note for note in notes if not note[1].exact])
    unproven = {norms: reasons_of(classes, [note for note in notes if not _is_proved(note[1], norms)]) > 0 for norms in NORMS}
    group, unit = ordered(kinds_of(classes, len(lines), (reason, note, layer)), classes.first)
    count = int(group.max()) + 1 if len(group) else 0
    group_of_unit = np.empty(len(group), dtype=np.int64)
    group_of_unit[unit] = group
    present = np.zeros((count, max(len(lines), 1)), dtype=bool)
    present[group[classes.of_index], classes.line] = True
    facts: list[npt.NDArray[Any]] = [np.zeros(count, dtype=fact.dtype) for fact in (reason, note, layer)]
    for of_group, fact in zip(facts, (reason, note, layer), strict=True):
        of_group[group] = fact
    undefined = np.zeros(count, dtype=np.int64)
    np.maximum.at(undefined, group, lasting)
    open_groups = {norms: np.isin(np.arange(count), group[found]) for norms, found in unproven.items()}
    bounds = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(np.int64)
    of_index = unit[classes.of_index]
    return Partition(
        np.searchsorted(group_of_unit, np.arange(count + 1)),
        group_of_unit,
        tuple(of_index[low:high] for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)),
        np.where(classes.of_label >= 0, unit[classes.of_label] if len(unit) else -1, -1),
        present,
        facts[0],
        facts[1],
        undefined,
        open_groups,
        facts[2],
    )


def _is_proved(note: Reason, norms: str) -> bool:
    """Whether the oracle covers what the note says, with these norms."""
    return norms in note.masked or (norms == "exact" and note.exact)
