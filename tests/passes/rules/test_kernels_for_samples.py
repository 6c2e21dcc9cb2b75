"""Convolutions with a kernel of its own for each sample: mixed of several (CondConv, dynamic convolution), or modulated (StyleGAN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, zeroed

MIXED: dict[str, Callable[[Any, Any], Any]] = {
    "mm": lambda net, a: torch.mm(a, net.weight.view(net.k, -1)).view(-1, net.i // net.g, 3, 3),
    "mm, then samples": lambda net, a: torch.mm(a, net.weight.view(net.k, -1)).view(len(a), net.o, -1, 3, 3).flatten(0, 1),
    "at": lambda net, a: (a @ net.weight.reshape(net.k, -1)).view(a.size(0) * net.o, net.i // net.g, 3, 3),
    "matmul and flatten": lambda net, a: torch.matmul(a, net.weight.flatten(1)).reshape(-1, net.i // net.g, 3, 3),
    "by its own size": lambda net, a: own_size(a @ net.weight.view(net.k, net.o * (net.i // net.g) * 9), net),
    "sum": lambda net, a: (net.weight * a[:, :, None, None, None, None]).sum(1).view(-1, net.i // net.g, 3, 3),
    "einsum": lambda net, a: torch.einsum("bk,koihw->boihw", a, net.weight).reshape(-1, net.i // net.g, 3, 3),
}


def own_size(mixed: Any, net: Any) -> Any:
    return mixed.view(mixed.size(0) * net.o, net.i // net.g, 3, 3)


class Mixed(nn.Module):
    def __init__(self, how: Callable[[Any, Any], Any], groups: int) -> None:
        super().__init__()
        self.how, self.k, self.i, self.o, self.g = how, 4, 8, 12, groups
        self.weight, self.bias = nn.Parameter(torch.randn(4, 12, 8 // groups, 3, 3) * 0.1), nn.Parameter(torch.randn(4, 12))
        self.choose = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        b, _, h, w = x.shape
        a = self.choose(x.mean((2, 3))).sigmoid()
        y = F.conv2d(x.view(1, -1, h, w), self.how(self, a), (a @ self.bias).view(-1), padding=1, groups=b * self.g)
        return y.view(b, self.o, *y.shape[2:])


class Around(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3), middle, nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.middle(self.first(x).relu()).relu())


OTHERS = ((2, 3, 10, 10), (3, 3, 10, 10), (1, 3, 13, 9), (4, 3, 8, 16))


def assert_equal_zeroed(model: nn.Module, slim: nn.Module) -> None:
    reference = zeroed(model, fxprune.record(slim).kept)
    for size in OTHERS:
        x = torch.randn(size)
        with torch.no_grad():
            assert gap(reference(x), slim(x)) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", MIXED.values(), ids=MIXED)
def test_mixed_kernels_lose_inputs_and_outputs(how: Callable[[Any, Any], Any], groups: int) -> None:
    torch.manual_seed(0)
    model, x = Around(Mixed(how, groups)).eval(), torch.randn(OTHERS[0])
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert slim.get_parameter("middle.weight").shape == (2, 6, 4 // groups, 3, 3)
    assert not fxprune.record(slim).notes
    assert_equal_zeroed(model, slim)


class Dynamic(Mixed):
    def forward(self, x: Tensor) -> Any:
        b, _, h, w = x.shape
        a = self.choose(x.mean((2, 3))).sigmoid()
        weight = self.weight.view(self.k, -1)
        kernels = torch.mm(a, weight).view(-1, self.i, 3, 3)
        return F.conv2d(x.view(1, -1, h, w), kernels, (a @ self.bias).view(-1), padding=1, groups=b).view(b, self.o, h, w)


def test_the_class_with_mixed_kernels_can_be_kept() -> None:
    torch.manual_seed(0)
    model, x = Around(Dynamic(MIXED["mm"], 1)).eval(), torch.randn(OTHERS[0])
    slim: nn.Module = fxprune.compress(model, 0.5, x, keep_class=True)
    assert isinstance(slim, Around) and slim.get_parameter("middle.weight").shape == (2, 6, 4, 3, 3)
    assert_equal_zeroed(model, slim)


def test_a_product_that_is_read_flat_as_well_stays_one() -> None:
    model = Around(Mixed(lambda net, a: scaled(a @ net.weight.view(4, -1)), 1)).eval()
    slim = fxprune.compress(model, 0.5, torch.randn(OTHERS[0]), verify=True)
    assert slim.get_parameter("middle.weight").shape[2] == 8
    assert_equal_zeroed(model, slim)


def scaled(mixed: Any) -> Any:
    return mixed.view(-1, 8, 3, 3) * mixed.amax(1).mean()


def test_the_size_of_an_input_in_what_is_flat_leaves_the_product_alone() -> None:
    """Of a tensor that the input enters the first axis may be as long as the code says on the example only."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            return self.last((y.mean(1).mean(0)[:2] @ y.view(2, -1)).view(-1, 8))

    model = Net().eval()
    slim = fxprune.compress(model, 0.0, torch.randn(2, 5, 6))
    for n in (2, 4):
        x = torch.randn(n, 5, 6)
        with torch.no_grad():
            assert gap(model(x), slim(x)) < 1e-5


class Modulated(nn.Module):
    def __init__(self, demodulated: bool, by_sizes: bool) -> None:
        super().__init__()
        self.demodulated, self.by_sizes = demodulated, by_sizes
        self.weight, self.style = nn.Parameter(torch.randn(1, 12, 8, 3, 3) * 0.2), nn.Linear(7, 8)

    def forward(self, x: Tensor, style: Tensor) -> Any:
        b, i, h, w = x.shape
        weight = self.weight * self.style(style).view(b, 1, i, 1, 1)
        if self.demodulated:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(b, 12, 1, 1, 1)
        weight = weight.view(b * 12, i, 3, 3) if self.by_sizes else weight.view(-1, 8, 3, 3)
        return F.conv2d(x.reshape(1, b * i, h, w), weight, padding=1, groups=b).view(b, -1, h, w)


class Styled(Around):
    def forward(self, x: Tensor, style: Tensor) -> Any:  # type: ignore[override]
        return self.last(self.middle(self.first(x).relu(), style).relu())


@pytest.mark.parametrize("by_sizes", [False, True])
@pytest.mark.parametrize("demodulated", [False, True])
def test_modulated_kernels_are_right_at_every_batch_and_nothing_is_noted(demodulated: bool, by_sizes: bool) -> None:
    torch.manual_seed(0)
    model = Styled(Modulated(demodulated, by_sizes)).eval()
    slim = fxprune.compress(model, 0.5, (torch.randn(OTHERS[0]), torch.randn(2, 7)), verify=True)
    assert slim.get_parameter("middle.weight").shape == (1, 6, 4, 3, 3)
    assert not fxprune.record(slim).notes
    reference = zeroed(model, fxprune.record(slim).kept)
    for size in OTHERS:
        x, style = torch.randn(size), torch.randn(size[0], 7)
        with torch.no_grad():
            assert gap(reference(x, style), slim(x, style)) < 1e-5
