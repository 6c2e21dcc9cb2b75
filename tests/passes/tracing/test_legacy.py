"""Tensors made and cast as code from before torch 0.4 does it: sizes stay in the graph, and channels go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Variable

import fxprune
from fxprune.testing import assert_sound
from tests.passes.helpers import gap, zeroed

FloatTensor = torch.FloatTensor  # as ``from torch import FloatTensor`` has it: the class itself


def variable(y: Tensor) -> Any:
    grid = torch.arange(0, y.size(3)).view(1, 1, 1, -1).repeat(y.size(0), 1, y.size(2), 1).float()
    return y + Variable(grid) + Variable(torch.zeros(y.size(0), 16, 1, 1), requires_grad=False)


def of_activation(y: Tensor) -> Any:
    return y * Variable(y.data.new(y.size(0), y.size(1), 1, 1).fill_(2))


def by_sizes(y: Tensor) -> Any:
    return y + torch.Tensor(y.size(0), y.size(1), y.size(2), 1).fill_(0.5) + torch.FloatTensor(y.size()).zero_()


def by_numbers(y: Tensor) -> Any:
    sizes = torch.Tensor([y.size(2), y.size(3)]) + FloatTensor([1.0, 2.0]) + torch.LongTensor([y.size(3), 1]).float()
    return y * sizes.mean() + y.new([y.size(2)]) + torch.Tensor(y)


def new(y: Tensor) -> Any:
    return y + y.new(y.size()).fill_(1.0) + y.new(y).detach() + y.new(1, y.size(1), 1, 1).zero_() + y.new().numel()


def cast(y: Tensor) -> Any:
    mask = (y > 0).type(torch.FloatTensor) + (y > 1).type("torch.DoubleTensor").type(y.type()) + (y > 2).type(FloatTensor)  # type: ignore[call-overload]
    assert isinstance(mask, torch.FloatTensor) and y.type() == "torch.FloatTensor"
    return y * mask.type(torch.float32) * (y > 3).type(dtype=torch.float64).type(dtype=y.dtype)


def keyword(y: Tensor) -> Any:
    made = torch.ones(y.size(), requires_grad=False) + torch.zeros(y.size(0), y.size(1), 1, 1, requires_grad=False)
    made = made + torch.full((y.size(0), y.size(1), 1, 1), 2.0, requires_grad=False) + y.new_zeros(y.shape, requires_grad=False)
    return y * made


WAYS = (variable, of_activation, by_sizes, by_numbers, new, cast, keyword)


class Net(nn.Module):
    def __init__(self, way: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.way, self.a, self.b = way, nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.way(self.a(x)))


@pytest.mark.parametrize("way", WAYS)
def test_channels_and_sizes_follow(way: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, x = Net(way).eval(), torch.randn(2, 3, 8, 6)
    assert_sound(model, x, removes=("a.weight", "b.weight") if way not in (variable,) else ())
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert not fxprune.record(slim).notes
    with torch.no_grad():
        for other in (torch.randn(3, 3, 8, 6), torch.randn(1, 3, 12, 10)):
            assert gap(zeroed(model, fxprune.record(slim).kept)(other), slim(other)) < 1e-5


def test_what_was_replaced_is_put_back() -> None:
    names = ("FloatTensor", "LongTensor", "Tensor")
    before = [getattr(torch, name) for name in names]
    fxprune.analyze(Net(cast).eval(), torch.randn(2, 3, 8, 6))
    assert [getattr(torch, name) for name in names] == before and "__new__" not in vars(torch.Tensor)
    assert torch.Tensor(2, 3).shape == (2, 3) and torch.Tensor([2, 3]).tolist() == [2.0, 3.0] and Variable(torch.ones(2)).sum() == 2
    assert isinstance(torch.Tensor(), torch.Tensor) and nn.Parameter(torch.ones(2)).requires_grad


def through_tensors(x: Tensor) -> Any:
    h, w = x.shape[-2:]
    return int(torch.tensor(h) // 2) + float(torch.tensor([h, w]).max()) + torch.tensor(w).sqrt().item() + torch.tensor([h, w]).tolist()[1]


def by_strides(x: Tensor) -> Any:
    return float(x.stride(0)) + x.stride()[1] + len(x) * 0.5


@pytest.mark.parametrize("number", [through_tensors, by_strides])
def test_numbers_made_of_sizes_follow_them(number: Callable[[Tensor], Any]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.b(self.a(x) * number(x))

    torch.manual_seed(0)
    model, x = Scaled().eval(), torch.randn(2, 3, 8, 6)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert not fxprune.record(slim).notes and slim.get_parameter("a.weight").shape[0] == 8
    with torch.no_grad():
        for other in (torch.randn(3, 3, 8, 6), torch.randn(1, 3, 12, 10)):
            assert gap(zeroed(model, fxprune.record(slim).kept)(other), slim(other)) < 1e-5


def test_channels_whose_number_is_in_a_stride_stay() -> None:
    class Strided(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.dim, self.a, self.b = dim, nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return self.b(y) * float(y.stride(self.dim))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 6)
    assert_sound(Strided(1).eval(), x, removes=("a.weight", "b.weight"))  # height times width
    graph = fxprune.analyze(Strided(0).eval(), x)
    assert "its strides are read at stride" in graph.by_name["a"].reason


def test_numbers_that_are_read_in_an_array_are_noted() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.b(self.a(x) * float(torch.tensor([x.shape[2], x.shape[3]]).numpy().sum()))

    (note,) = fxprune.record(fxprune.compress(Read().eval(), 0.5, torch.randn(2, 3, 8, 6))).notes
    assert "numpy() was specialised to the example inputs" in note


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
@pytest.mark.parametrize("scripted", [False, True])
def test_a_gate_cut_where_an_integer_tensor_says(scripted: bool) -> None:
    """As WaveGlow and its followers have it."""

    def gated(a: Tensor, b: Tensor, channels: Tensor) -> Tensor:
        n, s = channels[0], a + b
        return torch.tanh(s[:, :n, :]) * torch.sigmoid(s[:, n:, :])

    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.inner = nn.Conv1d(4, 16, 1), nn.Conv1d(16, 32, 3, padding=1)
            self.beside, self.end = nn.Conv1d(16, 32, 1), nn.Conv1d(16, 4, 1)
            self.gated = torch.jit.script(gate) if scripted else gated

        def forward(self, x: Tensor) -> Any:
            x = self.start(x)
            return self.end(self.gated(self.inner(x), self.beside(x), torch.IntTensor([16])))

    torch.manual_seed(0)
    removed = ("start.weight", "inner.weight", "beside.weight", "end.weight")
    assert_sound(Wave().eval(), torch.randn(2, 4, 20), removes=removed)


def gate(a: Tensor, b: Tensor, channels: Tensor) -> Tensor:
    n = channels[0]
    s = a + b
    return torch.tanh(s[:, :n, :]) * torch.sigmoid(s[:, n:, :])
