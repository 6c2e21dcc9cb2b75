"""Labels to groups, on a handful of labels."""

from __future__ import annotations

import numpy as np

from fxprune.passes.coupling.grouping import classes_of, in_layers, is_alike, kinds_of, ordered, partition, reasons_of
from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.passes.labels.values import Labels

STAY = Reason(ReasonKind.OUTPUT, "it stays")
OTHER = Reason(ReasonKind.OPERATION, "it is mixed")


def six() -> tuple[Labels, list[np.ndarray]]:
    """Two lines of three labels each, the last two of both united, crosswise: classes {0}, {3}, {1, 5}, {2, 4}."""
    labels = Labels()
    lines = [labels.new(3), labels.new(3)]
    labels.unite(lines[0][1:], lines[1][:0:-1])
    return labels, lines


def test_classes_are_numbered_by_their_root() -> None:
    labels, lines = six()
    spare = labels.new(1)
    classes = classes_of(labels, lines)
    assert classes.roots.tolist() == [0, 1, 2, 3] and classes.first.tolist() == [0, 1, 2, 3]
    assert classes.of_index.tolist() == [0, 1, 2, 3, 2, 1] and classes.line.tolist() == [0, 0, 0, 1, 1, 1]
    assert classes.of_label.tolist() == [0, 1, 2, 3, 2, 1, -1] and classes.of_label[spare[0]] == -1


def test_the_first_reason_of_a_class_counts_and_equal_words_are_one() -> None:
    labels, lines = six()
    pins = [(lines[1][2:], OTHER), (lines[0][:2], STAY), (lines[1][:1], Reason(ReasonKind.OPERATION, "it is mixed"))]
    assert reasons_of(classes_of(labels, lines), pins).tolist() == [2, 1, 0, 1]
    assert reasons_of(classes_of(labels, lines), []).tolist() == [0, 0, 0, 0]


def test_what_is_read_as_a_weight_is_a_layer() -> None:
    labels, lines = six()
    classes = classes_of(labels, lines)
    assert in_layers(classes, np.array([False, True]), []).tolist() == [False, True, True, True]
    assert in_layers(classes, np.array([False, False]), [lines[0][:1], labels.new(2)[:0]]).tolist() == [True, False, False, False]


def test_classes_on_the_same_lines_are_of_one_kind() -> None:
    labels, lines = six()
    classes = classes_of(labels, lines)
    kind = kinds_of(classes, 2, ())
    assert kind[1] == kind[2] and len(set(kind.tolist())) == 3
    told = kinds_of(classes, 2, (np.array([0, 0, 1, 0]),))
    assert len(set(told.tolist())) == 4


def test_a_sum_that_does_not_tell_kinds_apart_is_noticed() -> None:
    labels, lines = six()
    classes = classes_of(labels, lines)
    assert is_alike(classes, kinds_of(classes, 2, ()), 2, ())
    assert not is_alike(classes, np.array([0, 1, 1, 0]), 2, ())  # 0 lies on the first line, 3 on the second
    assert not is_alike(classes, np.array([0, 0, 0, 1]), 2, ())  # 0 lies on one line, 1 and 2 on both
    assert not is_alike(classes, np.array([0, 1, 1, 2]), 2, (np.array([0, 0, 1, 0]),))
    twice = Labels()
    line = twice.new(3)
    twice.unite(line[:1], line[1:2])
    assert not is_alike(classes_of(twice, [line]), np.array([0, 0]), 1, ())  # one occurs twice on the line, the other once


def test_groups_and_units_go_by_their_first_index() -> None:
    group, unit = ordered(np.array([1, 0, 1, 0]), np.array([3, 5, 1, 2]))
    assert group.tolist() == [0, 1, 0, 1] and unit.tolist() == [1, 3, 0, 2]


def test_a_partition_has_every_channel_in_one_unit() -> None:
    labels, lines = six()
    made = partition(labels, lines, np.array([True, True]), [(lines[1][:1], STAY)], [(lines[0][:1], OTHER)])
    assert made.starts.tolist() == [0, 1, 3, 4] and made.group_of_unit.tolist() == [0, 1, 1, 2]
    assert [units.tolist() for units in made.units_of_line] == [[0, 1, 2], [3, 2, 1]]
    assert made.unit_of_label.tolist() == [0, 1, 2, 3, 2, 1]
    assert made.lines.tolist() == [[True, False], [True, True], [False, True]]
    assert (made.reason.tolist(), made.note.tolist(), made.in_layer.tolist()) == ([0, 0, 1], [1, 0, 0], [True] * 3)


def test_nothing_gives_nothing() -> None:
    made = partition(Labels(), [], np.zeros(0, dtype=bool), [], [])
    assert made.starts.tolist() == [0] and not len(made.group_of_unit) and made.units_of_line == ()
