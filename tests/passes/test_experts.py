"""Mixtures of experts whose weights lie in one parameter: the stream and the experts' inner width go, the experts stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import UnsupportedError
from fxprune.testing import assert_sound

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")


class Experts(nn.Module):
    """Each token goes to the expert that its router ranks first. ``stored``: how the weights lie, as torch's Linear or transposed."""

    def __init__(self, stored: str, by: str = "name") -> None:
        super().__init__()
        self.lift, self.router, self.head = nn.Linear(6, 16), nn.Linear(6, 3), nn.Linear(16, 5)
        self.stored, self.by = stored, by
        shape = (3, 24, 16) if stored == "linear" else (3, 16, 24)
        self.up, self.down = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape[0], shape[2], shape[1]))

    def product(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        weight = weight.transpose(1, 2) if self.stored == "linear" else weight
        return F.grouped_mm(x, weight, offs=ends) if self.by == "name" else F.grouped_mm(mat_a=x, mat_b=weight, offs=ends)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lift(x)
        chosen, order = self.router(x).argmax(1).sort()
        ends = (chosen.unsqueeze(1) <= torch.arange(3)).sum(0).to(torch.int32)
        found = self.product(torch.relu(self.product(y[order], self.up, ends)), self.down, ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        out: Tensor = self.head(found[back])
        return out


@pytest.mark.parametrize(("stored", "by"), [("linear", "name"), ("transposed", "name"), ("linear", "keywords")])
def test_stream_and_inner_width_of_experts_go(stored: str, by: str) -> None:
    torch.manual_seed(0)
    model, x = Experts(stored, by).eval(), torch.randn(7, 6)
    graph = assert_sound(model, x, removes=("up", "down", "lift.weight"))
    assert sorted(g.size for g in graph.groups if g.prunable) == [16, 16, 24]
    reasons = [g.reason for g in graph.groups if any(name in ("up", "down") and d == 0 for name, d, _ in g.members)]
    assert len(reasons) == 2 and all("each group of rows has a matrix of its own" in reason for reason in reasons)
    macs = fxprune.profile(model, x).macs
    assert macs == 7 * (6 * 16 + 6 * 3 + 16 * 5 + 2 * 16 * 24)


@pytest.mark.parametrize("stored", ["linear", "transposed"])
def test_widths_that_torch_does_not_take_are_said(stored: str) -> None:
    torch.manual_seed(0)
    model, x = Experts(stored).eval(), torch.randn(7, 6)
    what = r"test_experts.py:\d+: grouped_mm takes rows of whole 16 bytes, and 1[0-9] channels of 4 bytes .*round_to=4"
    with pytest.raises(UnsupportedError, match=what):
        fxprune.compress(model, 0.3, x)
    assert fxprune.compress(model, 0.3, x, round_to=4)(x).shape == (7, 5)
    half: Any = fxprune.compress(model.bfloat16(), 0.5, x.bfloat16(), round_to=8)
    assert half(x.bfloat16()).shape == (7, 5) and half.lift.out_features == 8 and 16 in half.up.shape
