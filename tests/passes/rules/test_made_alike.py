"""Constants made like a tensor have its size: which of their channels go is for what they meet to say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import prime


class Alike(nn.Module):
    def __init__(self, body: Callable[[Alike, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.first, self.last, self.wide = body, nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1), nn.Conv2d(32, 4, 1)
        self.mixed = nn.Parameter(torch.randn(16, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.first(x).relu())


def flipped(net: Alike, y: Tensor) -> Tensor:
    return net.last(y + torch.ones_like(y).flip(1))  # type: ignore[no-any-return]


def interleaved(net: Alike, y: Tensor) -> Tensor:
    made = torch.empty_like(y)
    made[:, 0::2], made[:, 1::2] = y[:, :8], y[:, 8:]
    return net.last(made)  # type: ignore[no-any-return]


def a_part(net: Alike, y: Tensor) -> Tensor:
    return net.last(y) + torch.full_like(y, 2.0)[:, :4]  # type: ignore[no-any-return]


def transposed(net: Alike, y: Tensor) -> Tensor:
    made = torch.ones_like(y, dtype=torch.bool).view(y.shape[0], 4, 4, *y.shape[2:])
    return net.last(y * made.transpose(1, 2).reshape(y.shape))  # type: ignore[no-any-return]


def beside(net: Alike, y: Tensor) -> Tensor:
    return net.wide(torch.cat([torch.zeros_like(y), y], 1))  # type: ignore[no-any-return]


def as_weight(net: Alike, y: Tensor) -> Tensor:
    return net.last(F.conv2d(y, torch.ones_like(net.mixed)))  # type: ignore[no-any-return]


def folded(net: Alike, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return net.last(torch.ones_like(y.reshape(b * c, h, w)).view(b, c, h, w) + y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("body", [flipped, interleaved, a_part, transposed, beside, as_weight, folded])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_constant_does_not_tie_channels(body: Callable[[Alike, Tensor], Tensor], share: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    model = prime(Alike(body), (x,))
    graph = fxprune.analyze(model, x)
    group = next(g for g in graph.groups if g.name == "first")
    assert group.prunable and group.size == (4 if body is transposed else 16)
    slim = fxprune.compress(graph, {g.name: share for g in graph.groups if g.prunable}, x, verify=True)
    assert slim.get_parameter("first.weight").shape[0] == 16 - 16 * share
    assert slim.eval()(torch.randn(3, 3, 6, 7)).shape == (3, 4, 6, 7)


def test_one_that_is_returned_keeps_its_size_alone() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x).relu()
            return self.last(y), torch.zeros_like(y)

    x = torch.randn(2, 3, 5, 5)
    slim = fxprune.compress(Returned().eval(), 0.5, x, verify=True)
    assert slim.get_parameter("first.weight").shape[0] == 8
    assert slim.eval()(torch.randn(1, 3, 4, 4))[1].shape == (1, 16, 4, 4)
