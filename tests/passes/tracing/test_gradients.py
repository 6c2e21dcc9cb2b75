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


def written(_: Any, y: Tensor) -> Any:
    with torch.no_grad():
        y[:, :, 0].mul_(2.0)
    return y


def written_and_returned(_: Any, y: Tensor) -> Any:
    with torch.no_grad():
        z = y.add_(1.0)
    return z


def into_a_tensor_of_its_own(net: Any, y: Tensor) -> Any:
    with torch.no_grad():
        found = torch.empty_like(y)
        torch.mul(y, net.gain, out=found)
    return y + found


def into_its_input(net: Any, y: Tensor) -> Any:
    with torch.no_grad():
        torch.add(y, net.mean, alpha=2, out=y)
    return y


def into_a_parameter(net: Any, y: Tensor) -> Any:
    with torch.no_grad():
        net.gain.clamp_(0.5, 0.9)
    return y * net.gain


HOW = (
    *(in_no_grad, in_set_grad, as_a_function, in_inference_mode, as_a_decorator, with_gradients_within, running_mean, turned),
    *(written, written_and_returned, into_a_tensor_of_its_own, into_its_input, into_a_parameter),
)


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


def in_a_list(_: Any, y: Tensor) -> Any:
    with torch.no_grad():
        parts = y.chunk(2, 1)
    return torch.cat(parts, 1)


def test_what_leaves_a_block_in_another_form_is_said() -> None:
    assert any(
        "a block without gradients cannot be kept" in note for note in fxprune.analyze(Net(in_a_list), torch.randn(2, 3, 6, 6)).notes
    )


class Norm(nn.Module):
    """A module without children whose own statistics are kept without gradients, as hand-written batch norms are."""

    def __init__(self, how: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.scale, self.shift, self.how = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8)), how
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", 0.1 * torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.how(self, x)
        scale = self.scale * (var + 1e-5).rsqrt()
        found: Tensor = x * scale[:, None, None] + (self.shift - mean * scale)[:, None, None]
        return found


def of(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)


def batch_norm(norm: Any, x: Tensor) -> Any:
    if not norm.training:
        return norm.mean, norm.var
    mean, var = of(x)
    with torch.no_grad():
        norm.mean.mul_(0.9).add_(0.1 * mean)
        norm.var.copy_(0.9 * norm.var + 0.1 * var)
    return mean, var


def of_running_statistics(norm: Any, x: Tensor) -> Any:
    if norm.training:
        with torch.no_grad():
            mean, var = of(x)
            norm.mean = 0.9 * norm.mean + 0.1 * mean
            norm.var = norm.var.lerp(var, 0.1)
    return norm.mean, norm.var


@torch.no_grad()
def of_constants(norm: Any, x: Tensor) -> Any:
    if norm.training:
        norm.mean += 0.1 * (of(x)[0] - norm.mean)
        norm.var.data.mul_(0.9).add_(of(x)[1].data, alpha=0.1)
    return (norm.mean.clone(), norm.var.clone()) if norm.training else (norm.mean, norm.var)


@pytest.mark.parametrize("how", [batch_norm, of_running_statistics, of_constants])
def test_a_norm_that_keeps_its_own_statistics_is_pruned(how: Callable[[Any, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), Norm(how), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 3, 6, 6)
    slim: Any = fxprune.compress(model, 0.5, x, verify=True)
    gone = fxprune.record(slim).removed_units["0"]
    kept = torch.tensor([i for i in range(8) if i not in gone])
    assert slim.get_buffer("1.mean").shape == (4,) and not [note for note in fxprune.record(slim).notes if "kept" in str(note)]
    with torch.no_grad():
        model[3].weight[:, gone] = 0
    for mode in (True, False):  # what training wrote is read in evaluation
        ours, theirs = (net.train(mode)(x) for net in (slim, model))
        assert gap(ours, theirs) < 1e-5
        if mode:
            for net, out in ((slim, ours), (model, theirs)):
                net.zero_grad()
                out.square().sum().backward()
    for name in ("1.scale", "1.shift", "0.weight"):
        assert gap(slim.get_parameter(name).grad, model.get_parameter(name).grad[kept]) < 1e-4
    for name in ("1.mean", "1.var"):
        assert gap(slim.get_buffer(name), model.get_buffer(name)[kept]) < 1e-5
