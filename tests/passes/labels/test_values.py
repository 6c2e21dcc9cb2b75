"""The union-find of labels, and values that stand for tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.passes.labels.values import Labels, Value, lift, values

WHY = Reason(ReasonKind.INPUT, "it comes from the input")


def test_the_smallest_label_is_the_root_whatever_the_order() -> None:
    pairs = [(5, 3), (3, 4), (1, 2), (2, 5)]
    for order in (pairs, pairs[::-1], [(b, a) for a, b in pairs]):
        labels = Labels()
        line = labels.new(6)
        for a, b in order:
            labels.unite(line[[a]], line[[b]])
        assert labels.find(line).tolist() == [0, 1, 1, 1, 1, 1] and labels.units(line) == 2


def test_many_unions_at_once_are_those_one_by_one() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 200, 150), generator.integers(0, 200, 150)
    at_once, one_by_one = Labels(), Labels()
    line = at_once.new(200)
    one_by_one.new(200)
    at_once.unite(a, b)
    for left, right in zip(a.tolist(), b.tolist(), strict=True):
        one_by_one.unite(np.array([left]), np.array([right]))
    assert at_once.find(line).tolist() == one_by_one.find(line).tolist()


def test_labels_beyond_the_first_room_keep_what_was_known() -> None:
    labels = Labels()
    first = labels.new(1000, soft=True)
    labels.unite(first[:1], first[-1:])
    later = labels.new(5000)
    assert labels.count == 6000 and labels.find(first[-1:]).tolist() == [0] and labels.units(later) == 5000
    assert labels.yields(first) and not labels.yields(later)


def test_soft_labels_yield_until_they_meet_a_hard_one() -> None:
    labels = Labels()
    soft, more, hard = labels.new(2, soft=True), labels.new(2, soft=True), labels.new(2)
    labels.unite(soft, more)
    assert labels.yields(soft) and labels.yields(more)
    labels.unite(more[:1], hard[:1])
    assert not labels.yields(soft) and labels.yields(soft[1:])


class Pair(NamedTuple):
    left: object
    right: object


def test_what_is_nested_keeps_its_form() -> None:
    tensor = torch.zeros(2, 3)
    lifted = lift({"a": [tensor, 1], "b": Pair(tensor, (tensor, None)), "c": tensor.shape}, WHY)
    assert isinstance(lifted["b"], Pair) and isinstance(lifted["a"], list) and isinstance(lifted["b"].right, tuple)
    assert lifted["a"][1] == 1 and lifted["b"].right[1] is None and lifted["c"] == torch.Size((2, 3))
    assert [(value.shape, value.axes, value.why) for value in values(lifted)] == [((2, 3), {}, WHY)] * 3


def test_a_value_is_never_edited() -> None:
    value = lift(torch.zeros(2), WHY)
    assert isinstance(value, Value) and value.ndim == 1
    with pytest.raises(AttributeError):
        setattr(value, "shape", (3,))  # noqa: B010 - mypy knows that it is read-only
