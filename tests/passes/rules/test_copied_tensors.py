"""Tensors that are made of other tensors have their channels: they are not picked a second time, and gradients stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, zeroed


class Net(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(10, 16), nn.Linear(16, 4), how

    def forward(self, x: Tensor) -> Any:
        return self.last(self.how(self.first(x)))


def written_through(y: Tensor) -> Tensor:
    torch.asarray(y).mul_(2)
    return y


HOW: dict[str, Callable[[Tensor], Tensor]] = {
    "as_tensor": lambda y: torch.as_tensor(y) + 1,
    "as_tensor of a dtype": lambda y: torch.as_tensor(y, dtype=torch.float64).float(),
    "asarray": lambda y: torch.asarray(y, requires_grad=False) * 2 + y,
    "written through": written_through,
    "Tensor": lambda y: torch.Tensor(y),
    "FloatTensor": lambda y: torch.FloatTensor(y) * y,
    "new": lambda y: y.new(y),
    "new_tensor": lambda y: y.new_tensor(y.detach().tanh()) + y,
    "new_tensor of numbers": lambda y: y * y.new_tensor([1.0, 2.0] * 8),
    "new of numbers": lambda y: y * y.new([1.0, 2.0] * 8),
    "tensor": lambda y: torch.tensor(y.detach().tanh()) + y,
    "tensor of numbers": lambda y: y * torch.tensor([1.0, 2.0] * 8),
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor", "ignore:torch.asarray")
@pytest.mark.parametrize("how", HOW)
def test_copies_are_pruned_and_train_as_the_original(how: str) -> None:
    torch.manual_seed(0)
    model, x = Net(HOW[how]).eval(), torch.randn(3, 10)
    slim = fxprune.compress(model, 0.5, x)
    kept = fxprune.record(slim).kept
    assert slim.get_parameter("first.weight").shape[0] == 8
    with torch.no_grad():
        for other in (x, torch.randn(5, 10)):
            assert gap(zeroed(model, kept)(other), slim(other)) < 1e-4
    for net in (model, slim):
        net(x).sum().backward()
    mine, theirs = model.get_parameter("first.bias").grad, slim.get_parameter("first.bias").grad
    assert (mine is None) == (theirs is None)
    if mine is not None and theirs is not None:
        assert gap(mine[kept["first.bias"][0]], theirs) < 1e-4
