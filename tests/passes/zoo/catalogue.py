"""The table that the networks of the zoo enter themselves into; ``networks.py`` gathers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], Any]


@dataclass(frozen=True)
class Network:
    """A small network with what a test needs to know of it.

    ``make`` builds it; ``inputs`` gives a tuple of positional or a dict of keyword inputs.
    ``exact``: the zeroing oracle is defined for all its groups (no statistic over channels, no reduction or softmax over them).
    ``locked``: nothing of it can be pruned, and that is right.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    exact: bool = True
    locked: bool = False


ZOO: dict[str, Network] = {}


def image(*shape: int) -> Inputs:
    """One input tensor of this shape; by default two RGB images of 8x8."""
    return lambda: (torch.randn(*(shape or (2, 3, 8, 8))),)


def tokens(length: int = 6, width: int = 12, batch: int = 2) -> Inputs:
    return image(batch, length, width)


def words(length: int = 5, vocabulary: int = 11, batch: int = 2) -> Inputs:
    return lambda: (torch.randint(0, vocabulary, (batch, length)),)


def add(
    name: str, inputs: Inputs | None = None, *, exact: bool = True, locked: bool = False
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a module class under ``name``; it is built without arguments."""

    def enter(make: type[nn.Module]) -> type[nn.Module]:
        assert name not in ZOO, name
        ZOO[name] = Network(name, make, inputs or image(), exact, locked)
        return make

    return enter


def conv_bn(i: int, o: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU())


class Body(nn.Module):
    """A stem of 3 to 12 channels, ``mix`` in the middle, and a pooled linear head that reads ``width`` channels."""

    width = 12

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.build()
        self.tail = nn.Conv2d(self.width, 8, 1)
        self.head = nn.Linear(8, 5)

    def build(self) -> None:
        """Make the layers of ``mix``."""

    def mix(self, x: Tensor) -> Any:
        return x

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.tail(self.mix(self.stem(x))))
        return self.head(x.mean((2, 3)))
