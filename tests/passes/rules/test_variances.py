"""A variance over channels needs more numbers than its correction: so many channels stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Net(nn.Module):
    def __init__(self, how: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), how

    def forward(self, x: Tensor) -> Any:
        return self.last(self.how(self.first(x)))


@pytest.mark.parametrize(
    ("how", "least"),
    [
        (lambda y: y / y.std(1, keepdim=True), 2),
        (lambda y: y / torch.var(y, dim=1, keepdim=True), 2),
        (lambda y: y / torch.std_mean(y, (1,), keepdim=True)[0], 2),
        (lambda y: y / torch.var_mean(y, 1, correction=2, keepdim=True)[0], 3),
        (lambda y: y.std(1, unbiased=False, keepdim=True) + y, 1),
        (lambda y: y / y.std((1, 2, 3), keepdim=True), 1),
    ],
)
def test_enough_channels_stay(how: Callable[[Any], Any], least: int) -> None:
    torch.manual_seed(0)
    model, x = Net(how).eval(), torch.randn(2, 3, 6, 6)
    slim = fxprune.compress(model, 0.99, x, verify=True)
    assert slim.get_parameter("first.weight").shape[0] == least
    assert slim(x).isfinite().all()
    named = fxprune.compress(model, {"first": 0.99}, x)
    assert named.get_parameter("first.weight").shape[0] == least


def test_enough_of_a_part_stay() -> None:
    torch.manual_seed(0)
    model, x = Net(lambda y: torch.cat([y[:, :3] / y[:, :3].std(1, keepdim=True), y[:, 3:]], 1)).eval(), torch.randn(2, 3, 6, 6)
    slim = fxprune.compress(model, 0.99, x, verify=True)
    assert slim.get_parameter("first.weight").shape[0] == 2 + 1
    assert slim(x).isfinite().all()
