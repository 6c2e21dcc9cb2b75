"""Blocks without gradients: what a slim module computes in them is detached, so that it trains as the original does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap


class Net(nn.Module):
    def __init__(self, how: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.beside, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.register_buffer("mean", torch.zeros(8, 1, 1))
        self.mean: Tensor
        self.gain = nn.Parameter(torch.ones(8, 1, 1))
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.last(self.how(self, self.first(x)))


def in_no_grad(net: Any, y: Tensor) -> Any:
    with torch.no_grad():
        z = net.beside(y) * net.gain
    return y * z * net.gain


def in_set_grad(net: Any, y: Tensor) -> Any:
    with torch.set_grad_enabled(not net.training):
        z = net.beside(y).relu()
    return y + z


def as_a_function(net: Any, y: Tensor) -> Any:
    torch.set_grad_enabled(False)
    z = net.beside(y).sigmoid()
    torch.set_grad_enabled(True)
    return y * z


def in_inference_mode(net: Any, y: Tensor) -> Any:
    with torch.inference_mode(False), torch.no_grad():
        z = net.beside(y)
    return y * z


def as_a_decorator(net: Any, y: Tensor) -> Any:
    return y + torch.no_grad()(lambda: net.beside(y).exp())()


def with_gradients_within(net: Any, y: Tensor) -> Any:
    with torch.no_grad():
        z = net.beside(y)
        with torch.enable_grad():
            both = y * z
    return both + z


def running_mean(net: Any, y: Tensor) -> Any:
    if net.training:
        with torch.no_grad():
            net.mean.mul_(0.9).add_(y.mean((0, 2, 3)).view(8, 1, 1), alpha=0.1)
    return y - net.mean


def turned(net: Any, y: Tensor) -> Any:
    z = y.mT
    with torch.no_grad():
        w = net.beside(z)
    return w + z


HOW = (in_no_grad, in_set_grad, as_a_function, in_inference_mode, as_a_decorator, with_gradients_within, running_mean, turned)


@pytest.mark.parametrize("how", HOW)
def test_it_trains_as_the_original(how: Callable[[Any, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model, x = Net(how), torch.randn(2, 3, 6, 6)
    slim = fxprune.compress(model, 0.0, x)
    assert not any("cannot be kept" in note for note in fxprune.record(slim).notes)
    for _ in range(3):
        for net in (model, slim):
            net.zero_grad()
            net(x).square().sum().backward()
        mine, theirs = dict(model.named_parameters()), dict(slim.named_parameters())
        for name, parameter in mine.items():
            found = theirs[name].grad
            assert (parameter.grad is None) == (found is None), name
            if parameter.grad is not None and found is not None:
                assert gap(parameter.grad, found) < 1e-5, name
        assert gap(model.mean, slim.get_buffer("mean")) < 1e-6


@pytest.mark.parametrize("how", HOW)
def test_it_is_pruned(how: Callable[[Any, Tensor], Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    slim = fxprune.compress(Net(how).eval(), 0.5, x, verify=True).train()
    assert slim.get_parameter("first.weight").shape[0] == 4
    for _ in range(2):
        slim(x).sum().backward()


def written(_: Any, y: Tensor) -> Any:
    with torch.no_grad():
        y[:, :, 0].mul_(2.0)
    return y


def test_what_is_written_into_a_tensor_with_a_gradient_is_said() -> None:
    assert any("a block without gradients cannot be kept" in note for note in fxprune.analyze(Net(written), torch.randn(2, 3, 6, 6)).notes)
