"""Channels that a constant picks, through expansions to the input's sizes; diagonals, and pools that give positions as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, zeroed

ORDER = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
MASK = [True, False, True, True, False, False, True, False]


class Net(nn.Module):
    def __init__(self, how: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.register_buffer("order", ORDER)
        self.register_buffer("three", torch.tensor([1, 5, 2]))
        self.register_buffer("mask", torch.tensor(MASK))
        self.gain = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.square = nn.Parameter(torch.randn(8, 8))
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.last(self.how(self, self.first(x))).mean((2, 3))


def row(net: Any) -> Any:
    return net.order.view(1, 8, 1, 1)


def along(net: Any, y: Any) -> Any:
    """The order, expanded as code does it in steps."""
    index = net.order.unsqueeze(0).expand(y.shape[0], -1)
    return index.unsqueeze(-1).expand(-1, -1, y.shape[2]).unsqueeze(-1).expand(*index.shape, *y.shape[2:]).contiguous()


def put(index: Callable[[Any], Any], value: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def how(net: Any, y: Any) -> Any:
        y = y.clone()
        y[index(net)] = value(net, y)
        return y

    return how


def masked_twice(net: Any, y: Any) -> Any:
    y = y.clone()
    y[:, net.mask] *= 2
    return y


HOW: dict[str, Callable[[Any, Any], Any]] = {
    "expand": lambda net, y: y.gather(1, row(net).expand(len(y), 8, *y.shape[2:])),
    "expand by -1": lambda net, y: torch.gather(y, dim=1, index=row(net).expand(y.shape[0], -1, y.shape[2], y.shape[3])),
    "broadcast_to": lambda net, y: torch.gather(y, -3, torch.broadcast_to(row(net), (y.size(0), 8, y.size(2), y.size(3)))),
    "expand_as": lambda net, y: y.gather(1, row(net).expand_as(y)),
    "expand_as of two axes": lambda net, y: y.mean((2, 3)).gather(1, net.order.view(1, 8).expand(len(y), -1))[..., None, None],
    "a mask expanded": lambda net, y: y.masked_fill((row(net) > 5).expand_as(y), 0.0),
    "a parameter expanded": lambda net, y: y * net.gain.expand_as(y),
    "diag_embed": lambda net, y: (torch.diag_embed(y.mean((2, 3))) @ y.flatten(2)).view_as(y),
    "diag": lambda net, y: torch.einsum("bchw,cd->bdhw", y, torch.diag(net.gain.flatten())),
    "einsum over a diagonal": lambda net, y: torch.einsum("bchw,cc->bchw", y, net.square),
    "einsum over a diagonal, with dots": lambda net, y: torch.einsum("b...c,cc->bc...", y.movedim(1, -1), net.square),
    "einsum over a diagonal of activations": lambda net, y: torch.einsum("bcchw->bchw", y[:, :, None] * y[:, None]),
    "einsum, its output not said": lambda net, y: torch.einsum("adbc,de", y, net.square).movedim(-1, 1),
    "einsum, its output not said, with dots": lambda net, y: torch.einsum("...d,df", y.movedim(1, -1), net.square).movedim(-1, 1),
    "einsum by lists": lambda net, y: torch.einsum(y, [0, 4, 1, 2], net.square, [4, 7]).movedim(-1, 1),
    "einsum of a trace": lambda net, y: y * torch.einsum("ii", net.square),
    "roll by one number along listed axes": lambda net, y: y.roll(3, dims=(-1,)) + torch.roll(y, -y.shape[2] // 2, [2]) + y.roll(2, (1,)),
    "atleast_3d": lambda net, y: torch.atleast_3d(y),
    "max_pool with positions": lambda net, y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), (2, 2), output_size=y.shape[-2:]),
    "repeat": lambda net, y: y.gather(1, row(net).repeat(len(y), 1, y.shape[2], y.shape[3])),
    "expand to more axes": lambda net, y: y.flatten(2).mT.gather(-1, net.order.expand(len(y), y.shape[2] * y.shape[3], 8)).mT[..., None],
    "expanded in steps": lambda net, y: y.gather(1, along(net, y)),
    "scatter": lambda net, y: torch.zeros_like(y).scatter(1, row(net).expand_as(y), y),
    "scatter_add": lambda net, y: torch.zeros_like(y).scatter_add(1, along(net, y), y),
    "scatter of three": lambda net, y: y.scatter(1, net.three.view(1, 3, 1, 1).expand(len(y), -1, *y.shape[2:]), 2 * y[:, [1, 5, 2]]),
    "scatter of a number": lambda net, y: y.scatter(1, net.three.view(1, 3, 1, 1).repeat(len(y), 1, *y.shape[2:]), 1.5),
    "index_fill": lambda net, y: y.index_fill(1, net.three, 0.0),
    "a mask, set to zero": put(lambda net: (slice(None), net.mask), lambda net, y: 0),
    "a mask, set to a number": put(lambda net: (slice(None), net.mask), lambda net, y: 1.5),
    "a mask, set to another mean": put(lambda net: (slice(None), ~net.mask), lambda net, y: y.mean(1, keepdim=True) * 0 + 1),
    "a mask beside others": put(lambda net: (..., net.mask, slice(1, None), slice(None)), lambda net, y: y.amax()),
    "a mask that is made": put(lambda net: (slice(None), torch.arange(8) < 5), lambda net, y: -1.0),
    "a mask, set to channels": put(lambda net: (slice(None), net.mask), lambda net, y: y.flip(-1)[:, [0, 2, 3, 6]]),
    "a mask, set to others": put(lambda net: (slice(None), net.mask), lambda net, y: y[:, ~net.mask]),
    "a mask in place": masked_twice,
    "a mask, set to numbers": put(lambda net: (slice(None), net.mask), lambda net, y: net.gain[0, net.three.new_tensor([0, 1, 2, 3])]),
    "a list that is a mask": put(lambda net: (slice(None), MASK), lambda net, y: 0.5),
    "an array that is a mask": lambda net, y: torch.cat([y[:, np.array(MASK)], y[:, [not m for m in MASK]]], 1),
    "a mask of values": put(lambda net: (slice(None), net.gain.flatten() > 0), lambda net, y: 0.5),
    "masked_fill by one": lambda net, y: y.masked_fill(net.mask.view(1, 8, 1, 1), 1.0),
    "adaptive_max_pool with positions": lambda net, y: F.adaptive_max_pool2d(y, 2, return_indices=True)[0],
}


@pytest.mark.parametrize("name", HOW)
def test_it_is_pruned(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(HOW[name]).eval(), torch.randn(2, 3, 8, 8)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    kept = fxprune.record(slim).kept
    assert slim.get_parameter("first.weight").shape[0] == 4 and slim.get_parameter("last.weight").shape[1] == 4
    reference = zeroed(model, kept)
    for other in (x, torch.randn(3, 3, 8, 8), torch.randn(1, 3, 12, 6)):
        with torch.no_grad():
            assert gap(reference(other), slim(other)) < 1e-5


def test_a_mask_of_what_the_network_computes_goes_with_the_channels_it_is_set_at() -> None:
    def how(net: Any, y: Any) -> Any:
        y = y.clone()
        y[:, y.amax((0, 2, 3)) > 0.5] = 0
        return y

    torch.manual_seed(0)
    model, x = Net(how).eval(), torch.randn(2, 3, 8, 8)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert slim.get_parameter("first.weight").shape[0] == 4
    with torch.no_grad():
        assert gap(zeroed(model, fxprune.record(slim).kept)(x), slim(x)) < 1e-5


@pytest.mark.parametrize(
    "how",
    [
        lambda net, y: y.scatter(1, net.order.view(1, 8, 1, 1).expand(2, 8, 4, 4), y),  # only a part of all positions
        lambda net, y: y.scatter(1, torch.stack([net.order, net.order.flip(0)]).view(2, 8, 1, 1).expand_as(y), y),
        lambda net, y: y.gather(1, torch.stack([net.order, net.order.flip(0)]).view(2, 8, 1, 1).expand_as(y)),
        lambda net, y: y.gather(1, (row(net) * torch.ones(1, 1, 1, y.shape[3]).long()).expand_as(y)),
    ],
)
def test_constants_that_are_not_the_same_at_all_positions_keep_them(how: Callable[[Any, Any], Any]) -> None:
    model, x = Net(how).eval(), torch.randn(2, 3, 8, 8)
    with pytest.warns(fxprune.PruningWarning):
        slim = fxprune.compress(model, 0.5, x)
    with torch.no_grad():
        assert gap(model(x), slim(x)) < 1e-6


class OnDiagonal(nn.Module):
    def __init__(self, ends: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8 + ends), nn.Linear(8 + ends, 5)
        self.blocks = nn.ParameterList([torch.randn(4, 3), torch.randn(4, 5), *[torch.randn(1, 1)] * ends])

    def forward(self, x: Tensor) -> Any:
        return self.last((self.first(x).relu() @ torch.block_diag(*self.blocks)).relu())


@pytest.mark.parametrize("ends", [0, 1])
def test_blocks_on_a_diagonal_lose_rows_and_columns(ends: int) -> None:
    torch.manual_seed(0)
    model, x = OnDiagonal(ends).eval(), torch.randn(2, 6)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert slim.get_parameter("blocks.0").shape == (2, 2) and slim.get_parameter("blocks.1").shape == (2, 3)
    reference = zeroed(model, fxprune.record(slim).kept)
    with torch.no_grad():
        assert gap(reference(x), slim(x)) < 1e-5


def test_a_diagonal_with_an_axis_of_fixed_size_keeps_them() -> None:
    model = Net(lambda net, y: torch.einsum("bccw->bcw", y)[..., None])  # as many rows as channels
    assert "a diagonal is taken" in str(next(g for g in fxprune.analyze(model, torch.randn(2, 3, 8, 8)).groups).reason)


def test_a_shifted_diagonal_keeps_them() -> None:
    model = Net(lambda net, y: (torch.diag_embed(y.mean((2, 3)), 1)[:, :8, :8] @ y.flatten(2)).view_as(y))
    assert "it is put beside a diagonal" in str(next(g for g in fxprune.analyze(model, torch.randn(2, 3, 8, 8)).groups).reason)
