"""Code that only training runs, and that cannot be traced: what evaluation runs is pruned all the same, and a note says what is lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, prime


def spans(batch: int, length: int) -> np.ndarray:
    """A span of every row, drawn by NumPy as for SpecAugment."""
    mask = np.zeros((batch, length), dtype=bool)
    starts = [np.random.choice(np.arange(length - 2), 1, replace=False) for _ in range(batch)]  # noqa: NPY002
    np.put_along_axis(mask, np.array([np.concatenate([start, start + [1]]) for start in starts]).reshape(batch, -1), True, -1)
    return mask


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Parameter(torch.randn(16)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            batch, length, _ = x.size()
            x = x.clone()
            x[torch.tensor(spans(batch, length), dtype=torch.bool)] = self.embed
        return F.dropout(self.drop(x), 0.0, self.training)


class SkipsByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Parameter(torch.randn(16)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.5:
            return x
        made = self.drop(x)
        assert isinstance(made, Tensor)
        return made


class Told(nn.Module):
    """Its parent says whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x: Tensor, masked: bool) -> Tensor:
        if masked:
            x = x * torch.tensor(spans(x.shape[0], x.shape[1]), dtype=x.dtype)[..., None]
        made = self.inner[0](x)
        assert isinstance(made, Tensor)
        return made


class Tells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.told, self.drop = Told(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        made = self.drop(self.told(x, self.training))
        assert isinstance(made, Tensor)
        return made


class Network(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.norm, self.last = nn.Linear(8, 16), middle, nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.first(x).relu())
        made = self.last(self.norm(y.transpose(1, 2)).transpose(1, 2))
        assert isinstance(made, Tensor)
        return made


class AtTheRoot(Network):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * torch.tensor(spans(x.shape[0], x.shape[1]), dtype=x.dtype)[..., None]
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Network(Masked()), "middle"),
        (lambda: Network(SkipsByValue()), "middle"),
        (lambda: Network(Tells()), "middle"),
        (lambda: AtTheRoot(nn.Dropout(0.5)), "the network"),
    ],
)
def test_it_does_not_hold_what_evaluation_runs(make: Callable[[], nn.Module], named: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8)
    model = prime(make(), (x,))
    slim = fxprune.compress(model, 0.5, x, verify=True)
    notes = fxprune.record(slim).notes
    assert [n for n in notes if f"in training {named} itself computes as in evaluation, since its code there could not be traced" in n]
    assert not [n for n in notes if "in training mode the slim module may compute something else" in n]
    assert slim.get_parameter("first.weight").shape == (8, 8)
    # The rest trains: dropout drops, statistics move, and another batch is taken.
    slim.train()
    other = torch.randn(3, 5, 8)
    before = slim.get_buffer("norm.running_mean").clone()
    assert gap(slim(other), slim(other)) > 1e-3
    assert not torch.equal(before, slim.get_buffer("norm.running_mean"))


class Codebook(nn.Module):
    """What it does in training fills its buffer."""

    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and bool((x.mean() > -100).item()):
            self.codes += 1
        return x


def test_a_layer_that_training_fills_is_kept_whole() -> None:
    x = torch.randn(4, 6, 8)
    slim = fxprune.compress(Network(Codebook()).eval(), 0.5, x)
    slim.train()
    slim(x)
    assert bool((slim.get_buffer("middle.codes") == 1).all())
