"""What code computes of sizes with functions of Python, ``math`` and NumPy stays as dynamic as the sizes are, and is no loss to name."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from math import ceil, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from tests.passes.helpers import gap, zeroed


class Net(nn.Module):
    def __init__(self, how: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1), how

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.how(self.first(x)))
        assert isinstance(made, Tensor)
        return made


def root_of_numel(y: Any) -> Any:
    return y / math.sqrt(y[0].numel())


def imported_root(y: Any) -> Any:
    return y * sqrt(y.shape[2] * y.shape[3]) / np.sqrt(y.shape[3])


def square(y: Any) -> Any:
    tokens = y.flatten(2).transpose(1, 2)
    side = int(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).reshape(y.shape[0], y.shape[1], side, -1)


def integer_root(y: Any) -> Any:
    return y.flatten(2).unflatten(2, (math.isqrt(y.shape[2] * y.shape[3]), -1))


def half(y: Any) -> Any:
    return F.interpolate(y, size=(int(y.shape[2] * 0.5), max(round(y.shape[3] / 3), 1)))


def padded(y: Any) -> Any:
    high = ceil(y.shape[2] / 5) * 5 - y.shape[2]
    wide = max((math.ceil(y.shape[3] / 3) - 1) * 3 + 4 - y.shape[3], 0)
    return F.avg_pool2d(F.pad(y, (0, wide, 0, high)), 2)


def of_windows(y: Any) -> Any:
    b, c, h, w = y.shape
    parts = y.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 2, 2, c)
    back = int(parts.shape[0] / (h * w / 2 / 2))
    return parts.relu().view(back, h // 2, w // 2, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).contiguous().view(back, -1, h, w)


def smaller(y: Any) -> Any:
    return y[:, :, : min(y.shape[2], y.shape[3])] + float(y.shape[3]) + min([y.shape[2], 100, y.shape[3]])


def asking(y: Any) -> Any:
    side: Any = int(y.shape[2] ** 0.5)
    kind = float if isinstance(side, int) and not isinstance(side, float) else int
    return y * kind(3) * int("2") + int.from_bytes(b"\1", "big") + max("a", "b").count("b")


def limit(y: Any) -> Any:
    return y + y.shape[2] * torch.finfo(y.dtype).eps


def elements(y: Any) -> Any:
    high, wide = (int(n) for n in torch.tensor(y.shape[2:]))
    return y.flatten(2).view(y.size(0), y.size(1), high, wide) * max(int(n) for n in torch.tensor(y.shape[2:]))


def levels(y: Any) -> Any:
    """As deformable attention keeps the sizes of its levels."""
    shapes = torch.as_tensor([[y.shape[2], y.shape[3]], [y.shape[2] // 2, y.shape[3] // 2]], dtype=torch.long)
    parts = torch.cat([y.flatten(2), F.avg_pool2d(y, 2).flatten(2)], 2).split([int(h) * int(w) for h, w in shapes], dim=2)
    made = [part.reshape(y.shape[0], y.shape[1], int(h), int(w)) for part, (h, w) in zip(parts, shapes, strict=True)]
    return sum(F.interpolate(one, size=y.shape[2:]) for one in made)


def tensors_as_sizes(y: Any) -> Any:
    sizes: Any = torch.tensor(y.shape)
    y = y.reshape(sizes[0].item(), sizes[1].item(), -1).view(sizes[0], sizes[1], sizes[2], sizes[3])
    return torch.cat(y.split(int(sizes[1]) // 2, 1)[::-1], 1) / sizes[1]


CODE = [root_of_numel, imported_root, square, integer_root, half, padded, of_windows, smaller, asking, limit]


def mapped(y: Any) -> Any:
    high, wide = map(int, y.shape[2:])
    high, wide = (int(n) if type(n) == int or type(n) in (int, float) else n for n in (high, wide))  # noqa: E721
    return y.flatten(2).unflatten(2, (high, wide)) * float(sum(map(float, y.shape[2:])))


def axes_in_a_tensor(y: Any) -> Any:
    """As entropy models of images bring the channels to the front and back."""
    order = torch.cat((torch.tensor([1, 0]), torch.arange(2, y.ndim)))
    back: Any = torch.arange(len(order))[torch.argsort(order)]
    front = y.permute(*order).contiguous()
    shape = front.size()
    return front.reshape(y.size(1), 1, -1).relu().reshape(shape).permute(tuple(back)).transpose(order[0] + 1, -1).transpose(2, 3)


CODE += [elements, levels, tensors_as_sizes, mapped, axes_in_a_tensor]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("how", CODE)
def test_other_sizes(how: Callable[[Any], Any], times: int) -> None:
    torch.manual_seed(0)
    model, x = Net(how).eval(), torch.randn(2, 3, 8, 8)
    slim = fxprune.compress(model, 0.5, x)
    if times == 2:  # read from the graph of the first, where the calls stand that its code made
        slim = fxprune.compress(slim, 0.5, x).eval()
    assert slim.get_parameter("first.weight").shape[0] == 16 // 2**times
    reference = zeroed(model, fxprune.record(slim).kept)
    for other in (x, torch.randn(3, 3, 16, 16), torch.randn(1, 3, 4, 4), torch.randn(5, 3, 12, 12)):
        with torch.no_grad():
            assert gap(reference(other), slim(other)) < 1e-5, tuple(other.shape)
    assert not fxprune.record(slim).notes


def test_names_are_as_before() -> None:
    space = half.__globals__
    before = {name: value for name, value in space.items() if name != "slim"}
    fxprune.analyze(Net(half), torch.randn(2, 3, 8, 8))
    with pytest.raises(fxprune.FxPruneError):
        fxprune.analyze(Net(lambda y: y[int(y.sum())]), torch.randn(2, 3, 8, 8))
    assert space == before and math.sqrt is sqrt and builtins.int is int and "int" not in space


def by_identity(y: Any) -> Any:
    kind = type(y.ndim)
    ones: Any = torch.ones(1, dtype=int)  # type: ignore[call-overload]
    return y.to(dtype=torch.float32) * (2 if kind is int else 0) + ones.float() * int(y.shape[2])


def test_code_that_uses_the_type_itself_is_left_alone() -> None:
    model, x = Net(by_identity).eval(), torch.randn(2, 3, 8, 8)
    slim = fxprune.compress(model, 0.0, x)
    assert gap(model(x), slim(x)) == 0


@pytest.mark.parametrize(
    "scale",
    [
        lambda c: c.bit_length(),
        lambda c: c.real,
        lambda c: c.numerator,
        lambda c: c.conjugate(),
        lambda c: c.as_integer_ratio()[0],
        lambda c: float((c / 1).is_integer()),
        lambda c: 1 << (c - 1).bit_length(),
    ],
)
def test_what_a_number_of_channels_is_asked_for(scale: Callable[[Any], Any]) -> None:
    """It becomes the original's number, of which Python's text asks nothing: ``16.bit_length()`` is no code."""
    torch.manual_seed(0)
    net, x = Net(lambda y: y * scale(y.shape[1])).eval(), torch.randn(2, 3, 8, 8)
    slim = fxprune.compress(net, 0.5, x, verify=True)
    assert len(slim.get_parameter("first.weight")) == 8
    assert gap(zeroed(net, fxprune.record(slim).kept)(x), slim(x)) < 1e-5
