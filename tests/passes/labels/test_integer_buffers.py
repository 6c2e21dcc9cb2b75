"""Integer buffers: signs and scales by channel are sliced, indices are renumbered, positions stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import assert_sound

torch.manual_seed(0)
X = torch.randn(2, 3, 6, 6)
SIGNS = torch.tensor([1, -1] * 8)


class Net(nn.Module):
    def __init__(self, how: Callable[[Any, Tensor], Tensor], buffer: Tensor) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.register_buffer("i", buffer)
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.last(self.how(self, self.first(x).relu()))


@pytest.mark.parametrize(
    "how",
    [
        lambda s, y: y * s.i.view(16, 1, 1),
        lambda s, y: y * s.i[:, None, None].to(y.dtype),
        lambda s, y: y + (s.i.float() / 2)[None, :, None, None],
        lambda s, y: y * (2 * s.i + 1).view(-1, 1, 1),
        lambda s, y: torch.where((s.i > 0)[:, None, None], y, -y),
        lambda s, y: y.masked_fill(s.i.lt(0).view(1, -1, 1, 1), 0.5),
        lambda s, y: y - s.i.reshape(4, 4).flatten().long().view(-1, 1, 1).double().to(y.dtype),
    ],
)
def test_what_is_computed_with_goes_along(how: Callable[[Any, Tensor], Tensor]) -> None:
    model = Net(how, SIGNS.clone()).eval()
    assert_sound(model, X)
    slim = fxprune.compress(model, 0.5, X, verify=True)
    assert slim.get_parameter("first.weight").shape[0] == 8
    kept = fxprune.record(slim).kept
    assert torch.equal(slim.get_buffer("i"), SIGNS[kept["i"][0]]) and torch.equal(kept["i"][0], kept["first.weight"][0])


@pytest.mark.parametrize(
    "how",
    [
        lambda s, y: y.index_select(1, s.i),
        lambda s, y: y[:, s.i],
        lambda s, y: y[:, s.i + 0],
        lambda s, y: torch.take_along_dim(y, s.i.view(1, 16, 1, 1), 1),
    ],
)
def test_what_picks_is_not_sliced(how: Callable[[Any, Tensor], Tensor]) -> None:
    model = Net(how, torch.randperm(16)).eval()
    assert_sound(model, X)
    slim = fxprune.compress(model, 0.5, X, verify=True)
    assert "i" not in fxprune.record(slim).kept


def test_what_picks_and_is_computed_with_locks() -> None:
    model = Net(lambda s, y: y[:, s.i] * s.i.view(16, 1, 1), torch.randperm(16)).eval()
    group = next(g for g in fxprune.analyze(model, X).groups if g.name == "first")
    assert not group.prunable and "'i'" in group.reason
