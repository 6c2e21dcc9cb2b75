"""Recurrent cells as functions: a weight or bias of fixed size keeps the units that meet it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, zeroed


class Cell(nn.Module):
    def __init__(self, step: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.beside, self.last, self.step = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 4), step
        self.w_ih, self.w_hh, self.b = nn.Parameter(torch.randn(48, 16)), nn.Parameter(torch.randn(48, 16)), nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor, given: Tensor) -> Any:
        return self.last(self.step(self, self.first(x), given))


KEPT: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], int]] = {
    "bias": (lambda net, h, z: torch.gru_cell(h, h, net.w_ih, net.w_hh, z[:, 0]), 0),
    "second bias by name": (lambda net, h, z: torch.gru_cell(h, h, net.w_ih, net.w_hh, b_ih=net.b, b_hh=z[:, 0]), 0),
    "weight of the input": (lambda net, h, z: torch.gru_cell(h, torch.zeros_like(h), z, net.w_hh), 0),
    "weight of the state": (lambda net, h, z: torch.gru_cell(net.beside(h), h, net.w_ih, z), 1),
    "neither": (lambda net, h, z: torch.gru_cell(h, h, net.w_ih, net.w_hh, net.b) * z.mean(), 1),
}


@pytest.mark.parametrize("how", KEPT)
def test_a_weight_of_fixed_size_keeps_the_units(how: str) -> None:
    torch.manual_seed(0)
    step, prunable = KEPT[how]
    model, x = Cell(step).eval(), (torch.randn(2, 10), torch.randn(48, 16))
    graph = fxprune.analyze(model, x)
    assert len([g for g in graph.groups if g.prunable]) == prunable
    if not prunable:
        assert "it meets a weight of fixed size" in graph.by_name["first"].reason
        return
    slim = fxprune.compress(graph, 0.5, x)
    with torch.no_grad():
        assert gap(zeroed(model, fxprune.record(slim).kept)(*x), slim(*x)) < 1e-4
