"""What is claimed of removed channels holds: zeros are computed, folded sizes stay sizes, fixed vectors lock, no part becomes empty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.passes.planning.parts import parts_of
from fxprune.passes.rules import registry
from tests.passes.helpers import TOLERANCE, call, gap, prime, zeroed


class Around(nn.Module):
    """A convolution of 16 channels, a function on them, and a linear layer on what is left of it."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.function = nn.Conv2d(3, 16, 3, padding=1), function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.a(x))


def noted(function: Callable[..., Any], reads: int, **modules: nn.Module) -> bool:
    """Whether the channels carry a note; where they do not, they must equal the zeroed original."""
    torch.manual_seed(0)
    model = Around(function, fc=nn.Linear(reads, 4), **modules)
    inputs = (torch.randn(2, 3, 8, 8),)
    prime(model, inputs)
    graph = fxprune.analyze(model, inputs)
    group = graph.by_name["a"]
    assert group.prunable, group.reason
    slim = fxprune.compress(model, {"a": 0.5}, inputs).eval()
    with torch.no_grad():
        found = gap(call(zeroed(model, fxprune.record(slim).kept), inputs), call(slim, inputs))
    assert group.notes or found < TOLERANCE, found
    return bool(group.notes)


def total(y: Any) -> Any:
    """A sum over channels, exact where what is removed is zero."""
    return y.sum(1).flatten(1)


NOT_ZERO: dict[str, Callable[[Any], Any]] = {
    "hardtanh": lambda y: F.hardtanh(y, 0.5, 2.0),
    "clamp": lambda y: y.clamp(min=0.25),
    "celu": lambda y: F.celu(y) + True,
    "threshold": lambda y: F.threshold(y, 0.1, 20.0),
    "atan2": lambda y: torch.atan2(y, torch.full_like(y, -1.0)),
    "pad": lambda y: F.pad(y, (1, 1), value=1.0)[..., 1:-1] + F.pad(y, (0, 1), value=0.5)[..., 1:],
    "masked_fill": lambda y: y.masked_fill(y > -1, 0.5),
    "softmax": lambda y: y.softmax(2),
    "logcumsumexp": lambda y: y.logcumsumexp(2),
}
ZERO: dict[str, Callable[[Any], Any]] = {
    "hardtanh": lambda y: F.hardtanh(y, -0.5, 2.0),
    "clamp": lambda y: y.clamp(min=-0.25),
    "where": lambda y: torch.where(y > 0, y, y * 0.1),
    "pad": lambda y: F.pad(y, (1, 1))[..., 1:-1],
    "threshold": lambda y: F.threshold(y, -0.1, 20.0),
    "cumsum": lambda y: y.cumsum(axis=2),
    "dropout": lambda y: F.dropout(y, 0.5, False),
}


@pytest.mark.parametrize("name", NOT_ZERO)
def test_what_is_not_zero_is_noted(name: str) -> None:
    assert noted(lambda s, y: s.fc(total(NOT_ZERO[name](y))), 64)


@pytest.mark.parametrize("name", ZERO)
def test_what_stays_zero_is_exact(name: str) -> None:
    assert not noted(lambda s, y: s.fc(total(ZERO[name](y))), 64)


def test_batch_norm_without_affine_is_exact_of_zeros_only() -> None:
    assert noted(lambda s, y: s.fc(total(s.n(y.sigmoid()))), 64, n=nn.BatchNorm2d(16, affine=False))
    assert not noted(lambda s, y: s.fc(total(s.n(y.relu()))), 64, n=nn.BatchNorm2d(16, affine=False))


def test_a_write_through_an_alias_counts() -> None:
    def add(s: Any, y: Any) -> Any:
        z = s.i(y)
        z += 1
        return s.fc(total(y))

    assert noted(add, 64, i=nn.Identity()) and noted(add, 64, i=nn.Dropout(0.5))


FOLDS: dict[str, Callable[..., Any]] = {
    "view": lambda y, b, c, h, w: F.avg_pool2d(y.view(b * c, 1, h, w), 3, 1, 1).view(b, c, h, w),
    "reshape": lambda y, b, c, h, w: (lambda z: z - z.amax(1, keepdim=True))(y.reshape(b * c, -1)).reshape(b, c, h, w),
    "groups": lambda y, b, c, h, w: F.conv2d(y.reshape(1, b * c, h, w), y.mean((2, 3)).view(b * c, 1, 1, 1), groups=b * c).view(b, c, h, w),
    "repeat": lambda y, b, c, h, w: F.conv2d(
        y.reshape(1, b * c, h, w), torch.ones(1, 1, 3, 3).repeat(b * c, 1, 1, 1), padding=1, groups=b * c
    ).view(b, c, h, w),
    "split": lambda y, b, c, h, w: torch.stack(y.reshape(b * c, h, w).split(c), 0),
    "group_norm": lambda y, b, c, h, w: F.group_norm(y.view(1, b * c, h, w), b * c).view(b, c, h, w),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", FOLDS)
def test_folded_sizes_follow_the_batch(name: str, batch: int) -> None:
    torch.manual_seed(0)
    model = Around(lambda s, y: s.b(FOLDS[name](y, *y.shape)).mean((2, 3)), b=nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(batch, 3, 8, 8)
    slim = fxprune.compress(model, 0.5, x).eval()
    assert slim.get_parameter("a.weight").shape[0] == 8
    reference = zeroed(model, fxprune.record(slim).kept)
    with torch.no_grad():
        for n in (batch, 3):
            other = torch.randn(n, 3, 8, 8)
            assert gap(reference(other), slim(other)) < TOLERANCE


@pytest.mark.parametrize("size", [3, 5])
def test_a_part_keeps_one_channel(size: int) -> None:
    torch.manual_seed(0)

    def parts(s: Any, y: Any) -> Any:
        return s.fc(torch.cat([F.max_pool2d(y[:, :size], 8), F.avg_pool2d(y[:, size:], 8)], 1).flatten(1))

    model, x = Around(parts, fc=nn.Linear(16, 4)).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.a.weight[:size] *= 0.001  # the first to go
    graph = fxprune.analyze(model, x)
    assert sorted(len(p) for p in parts_of(graph)) == sorted([size, 16 - size])
    slim = fxprune.compress(graph, 0.5)
    kept = fxprune.record(slim).kept["a.weight"][0]
    assert len(kept) == 8 and int((kept < size).sum()) == 1
    with torch.no_grad():
        assert gap(zeroed(model, fxprune.record(slim).kept)(x), slim(x)) < TOLERANCE


def test_a_layer_that_overrides_what_forward_calls_is_not_known() -> None:
    class Standardised(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            made: Tensor = super()._conv_forward(input, weight - weight.mean(), bias)
            return made

    class Computed(nn.ReLU):
        @property
        def inplace(self) -> bool:
            return False

        @inplace.setter
        def inplace(self, value: bool) -> None: ...

    class Plain(nn.Conv2d):
        def reset_parameters(self) -> None:
            nn.init.ones_(self.weight)

    assert registry.is_known(nn.Conv2d(3, 4, 1)) and registry.is_known(Plain(3, 4, 1))
    assert not registry.is_known(Standardised(3, 4, 1)) and not registry.is_known(Computed())


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("called", [False, True])
def test_an_axis_that_adaptive_pooling_leaves_as_it_is_may_be_the_channel_axis(kind: str, called: bool) -> None:
    """As a CRNN has it: height is pooled behind a permutation, and channels lie where width does otherwise."""

    class Turned(nn.Module):
        def __init__(self, size: tuple[int | None, int]) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)
            self.size, self.pool = size, (nn.AdaptiveAvgPool2d if kind == "avg" else nn.AdaptiveMaxPool2d)(size)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv(x)).permute(0, 3, 1, 2)
            function: Any = F.adaptive_avg_pool2d if kind == "avg" else F.adaptive_max_pool2d
            y = function(y, output_size=self.size) if called else self.pool(y)
            found: Tensor = self.fc(y.squeeze(3))
            return found

    x = torch.randn(2, 3, 8, 10)
    torch.manual_seed(0)
    for size, free in (((None, 1), True), ((16, 1), False)):
        graph = fxprune.analyze(Turned(size).eval(), x)
        (group,) = [one for one in graph.groups if one.name == "conv"]
        assert group.prunable is free and free == ("mixed with each other" not in str(group.reason))
    slim = fxprune.compress(Turned((None, 1)).eval(), {"conv": 0.5}, x, verify=True)
    assert slim.get_parameter("conv.weight").shape[0] == slim.get_parameter("fc.weight").shape[1] == 8
