"""Axes that must keep equally many channels: units are given back, the highest scores first, and no more than that takes."""

from __future__ import annotations

import numpy as np

from fxprune.passes.planning.even import _give_back


def test_units_are_given_back_where_fewer_are_left_and_only_so_many() -> None:
    keep = np.array([True, False, False, False, True, True, True, False])
    score = np.arange(8.0)
    a, b = np.arange(4), np.arange(4, 8)
    _give_back(keep, score, [a, b, a, b])  # both modes name the same axes
    assert keep.tolist() == [True, False, True, True, True, True, True, False]


def test_a_unit_that_lies_on_an_axis_twice_counts_twice() -> None:
    keep = np.array([True, False, False, True, True, True, False])
    doubled, single = np.repeat(np.arange(3), 2), np.array([3, 4, 5, 6, 6, 6])
    _give_back(keep, np.arange(7.0), [doubled, single])
    assert keep[doubled].sum() == keep[single].sum() == 6


def test_axes_of_unequal_size_end() -> None:
    keep = np.array([True, True, False, True, True, True])
    _give_back(keep, np.arange(6.0), [np.arange(3), np.array([3, 4, 5, 5])])
    assert keep.all()
