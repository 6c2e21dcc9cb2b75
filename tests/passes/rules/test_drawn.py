"""Tensors that ``torch.normal`` draws: by size, or for means and deviations that have channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Drawn(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.first, self.last = body, nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.body(self.first(x)))
        assert isinstance(made, Tensor)
        return made


@pytest.mark.parametrize(
    "body",
    [
        lambda y: torch.normal(y, torch.ones(16)),
        lambda y: torch.normal(y, y.exp()),
        lambda y: torch.normal(y, 1.0),
        lambda y: torch.normal(mean=y, std=y.exp()),
        lambda y: y + torch.normal(torch.zeros(y.shape), 1.0),
        lambda y: y + torch.normal(mean=0.0, std=torch.ones_like(y)),
        lambda y: y + torch.normal(0.0, 1.0, y.shape),
        lambda y: y + torch.normal(0.0, 1.0, size=(y.shape[0], y.shape[1])),
    ],
)
def test_drawn_by_means_or_by_size(body: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net, x = Drawn(body).eval(), torch.randn(5, 10)
    slim = fxprune.compress(net, 0.5, x, verify=True)
    assert slim.get_parameter("first.weight").shape == (8, 10)
    torch.manual_seed(1)
    wanted = net(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fxprune.compress(net, 0.0, x)(x), wanted)
    assert slim(torch.randn(7, 10)).shape == (7, 4)


class OnADevice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with x.device:
            made = self.last(y + torch.normal(mean=0.0, std=torch.ones_like(y)))
        assert isinstance(made, Tensor)
        return made


def test_drawn_in_a_block_of_a_device() -> None:
    slim = fxprune.compress(OnADevice().eval(), 0.5, torch.randn(5, 10), verify=True)
    assert slim.get_parameter("first.weight").shape == (8, 10)
