"""Views by sizes of the input that leave channels where they are, and those that would move them at other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.testing import assert_sound
from tests.passes.helpers import gap, zeroed


class Collapsed(nn.Module):
    """A map of one row as a sequence, as recognisers of text and of brain waves do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv2d(1, 12, (4, 3), padding=(0, 1)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        b, c, h, w = y.shape
        if self.how == "read":
            y = y.reshape(b, c, w)
        elif self.how == "named":
            y = y.view(b, 12, w)
        else:
            y = y.view(b, c * h, w)
        return self.b(y.transpose(1, 2))


@pytest.mark.parametrize("how", ["read", "named", "multiplied"])
def test_an_axis_of_one_is_viewed_away(how: str) -> None:
    torch.manual_seed(0)
    model = Collapsed(how).eval()
    assert_sound(model, torch.randn(2, 1, 4, 9), removes=("a.weight",))
    slim = fxprune.compress(model, 0.5, torch.randn(2, 1, 4, 9))
    with torch.no_grad():
        other = torch.randn(3, 1, 4, 14)
        assert gap(zeroed(model, fxprune.record(slim).kept)(other), slim(other)) < 1e-5


class Attention(nn.Module):
    """Its width is that of the query that it is given, read before any layer has taken it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, query: Tensor) -> Any:
        length, batch, width = query.size()
        assert width == 12
        q, k, v = (layer(query).view(length, batch * 3, 4).transpose(0, 1) for layer in (self.q, self.k, self.v))
        y = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) / 2, -1), v)
        return self.out(y.transpose(0, 1).contiguous().view(length, batch, width))


def test_a_width_that_is_read_of_what_layers_take_is_a_number() -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    assert_sound(model, torch.randn(5, 2, 12), removes=("v.weight", "out.weight"))
    slim = fxprune.compress(model, 0.5, torch.randn(5, 2, 12))
    with torch.no_grad():
        other = torch.randn(7, 3, 12)
        assert gap(zeroed(model, fxprune.record(slim).kept)(other), slim(other)) < 1e-5


class Grid(nn.Module):
    """Tokens read as a map without moving the channels first: they lie elsewhere for every size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        side = int(y.shape[1] ** 0.5)
        return self.b(y.view(y.shape[0], y.shape[2], side, side))


def test_tokens_read_as_a_map_keep_their_channels() -> None:
    graph = fxprune.analyze(Grid().eval(), torch.randn(2, 16, 6))
    assert not graph.by_name["a"].prunable
