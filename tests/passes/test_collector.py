"""The collector is paused while a network is analysed, and left as it was found."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxPruneError


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    yield
    gc.enable()


class Watching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if gc.isenabled():  # a list would be put back as it was before the trace
            raise RuntimeError("the collector is on while forward is traced")
        found: Tensor = self.b(self.a(x))
        return found


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("as always")


def test_paused_while_tracing_and_on_again() -> None:
    fxprune.compress(Watching().eval(), 0.5, torch.randn(2, 4))
    assert gc.isenabled()
    with pytest.raises(FxPruneError):
        fxprune.analyze(Failing(), torch.randn(2, 4))
    assert gc.isenabled()


def test_stays_off_where_it_was_off() -> None:
    gc.disable()
    fxprune.analyze(Watching().eval(), torch.randn(2, 4))
    assert not gc.isenabled()
