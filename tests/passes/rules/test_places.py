"""Writes at channels that a constant names, and windows of one over the axis of the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.testing import assert_sound

X = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, how: Callable[[Any, Tensor], Tensor], index: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other, self.last = nn.Linear(10, 16), nn.Linear(10, 16), nn.Linear(16, 4)
        self.register_buffer("i", torch.arange(15, -1, -1) if index is None else index)
        self.how = how

    def forward(self, x: Tensor) -> Any:
        self.x = x
        return self.last(self.how(self, self.first(x)))


@pytest.mark.parametrize(
    "how",
    [
        lambda s, y: s.other(s.x).index_add(1, s.i, y),
        lambda s, y: torch.index_add(s.other(s.x), 1, s.i, y, alpha=2),
        lambda s, y: s.other(s.x).index_copy(-1, s.i, y),
        lambda s, y: torch.zeros(y.shape[0], 16).index_add_(1, s.i, y),
        lambda s, y: s.other(s.x).index_reduce(1, s.i, y, "amax"),
    ],
)
def test_writes_at_constant_channels(how: Callable[[Any, Tensor], Tensor]) -> None:
    model = Net(how).eval()
    assert_sound(model, X)
    slim = fxprune.compress(model, 0.5, X, verify=True)
    assert slim.get_parameter("first.weight").shape[0] == 8


@pytest.mark.parametrize(
    "how",
    [
        lambda s, y: y.index_fill(1, s.i, 0.0),
        lambda s, y: y.index_fill(1, s.i, 1.5),
        lambda s, y: torch.index_fill(y, -1, s.i, torch.tensor(2.0)).tanh(),
        lambda s, y: filled_below_a_view(s, y) * s.other(s.x),
    ],
)
def test_a_number_at_constant_channels(how: Callable[[Any, Tensor], Tensor]) -> None:
    model = Net(how, torch.tensor([1, 3, 4, 15])).eval()
    assert_sound(model, X)
    slim = fxprune.compress(model, 0.5, X, verify=True)
    assert slim.get_parameter("first.weight").shape[0] == 8


def filled_below_a_view(net: Any, y: Tensor) -> Tensor:
    z = y.relu()
    view = z.view(-1, 4, 4)
    z.index_fill_(1, net.i, 0.5)
    return view.flatten(1)


def test_two_slices_that_are_written_to_one_channel_go_together() -> None:
    model = Net(lambda s, y: s.other(s.x).index_add(1, s.i, y), torch.arange(16) // 2).eval()
    assert_sound(model, X)
    kept = fxprune.record(fxprune.compress(model, 0.5, X, verify=True)).kept["first.weight"][0].tolist()
    assert kept == sorted(kept) and {k ^ 1 for k in kept} == {*kept}


def test_computed_places_lock() -> None:
    model = Net(lambda s, y: s.other(s.x).index_add(1, y[0].argsort(), y)).eval()
    assert not next(g for g in fxprune.analyze(model, X).groups if g.name == "first").prunable


@pytest.mark.parametrize(
    "how",
    [
        lambda s, y: F.avg_pool2d(y[:, None, None], (1, 1))[:, 0, 0],
        lambda s, y: F.max_pool2d(y[:, None].expand(-1, 3, -1)[:, None], (3, 1), 1)[:, 0, 0],
        lambda s, y: nn.MaxPool1d(1)(y[:, None])[:, 0],
        lambda s, y: nn.AvgPool2d((2, 1), (2, 1))(y[:, None, None].expand(-1, 1, 4, -1)).mean((1, 2)),
    ],
)
def test_a_window_of_one_leaves_channels(how: Callable[[Any, Tensor], Tensor]) -> None:
    model = Net(how).eval()
    assert_sound(model, X)
    assert fxprune.compress(model, 0.5, X, verify=True).get_parameter("first.weight").shape[0] == 8


@pytest.mark.parametrize(
    "how",
    [
        lambda s, y: F.avg_pool2d(y[:, None, None], (1, 3), 1, (0, 1))[:, 0, 0],
        lambda s, y: F.max_pool1d(y[:, None], 1, 2)[:, 0].repeat(1, 2),
    ],
)
def test_other_windows_lock_them(how: Callable[[Any, Tensor], Tensor]) -> None:
    group = next(g for g in fxprune.analyze(Net(how).eval(), X).groups if g.name == "first")
    assert not group.prunable and "mixed" in group.reason
