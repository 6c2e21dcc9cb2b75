"""What a network of the third table is: how it is built, and inputs of any batch and size."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

OK, NOT_ASKED = "ok", "original fails"  # what a check says, unless it says what went wrong
CHECKS = ("other batch", "other size", "backward", "file", "intact")  # in the order of the table's columns

Inputs = Any  # a tuple of positional inputs, or a dict of keyword inputs
Maker = Callable[[int, int], Inputs]


@dataclass(frozen=True)
class Network:
    """One network. ``inputs(batch, size)`` makes its inputs; ``size`` is the example's, ``other`` the one that is tried afterwards."""

    family: str  # the package, by its name on the package index
    name: str
    build: Callable[[], nn.Module]
    inputs: Maker
    size: int
    other: int
    batch: int = 2
    library: str = "packages"


def found(path: str) -> Any:
    """What ``module:attribute`` names, imported now."""
    module, _, attribute = path.partition(":")
    value: Any = importlib.import_module(module)
    for part in attribute.split("."):
        value = getattr(value, part)
    return value


def of(path: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    """Builds ``module:attribute`` with these arguments; the package is imported when the network is built."""

    def build() -> nn.Module:
        made: nn.Module = found(path)(*arguments, **options)
        return made

    return build


def image(channels: int = 3) -> Maker:
    return lambda batch, size: (torch.randn(batch, channels, size, size),)


def volume(channels: int = 1) -> Maker:
    return lambda batch, size: (torch.randn(batch, channels, size, size, size),)


def sequence(width: int) -> Maker:
    """(batch, length, width)."""
    return lambda batch, size: (torch.randn(batch, size, width),)


def signal(channels: int) -> Maker:
    """(batch, channels, length)."""
    return lambda batch, size: (torch.randn(batch, channels, size),)


def rows(width: int) -> Maker:
    """(batch, width): a table, or samples of one channel; ``size`` means nothing."""
    return lambda batch, size: (torch.randn(batch, width),)


def wave() -> Maker:
    """(batch, length)."""
    return lambda batch, size: (torch.randn(batch, size) * 0.1,)


def words(vocabulary: int) -> Maker:
    """(batch, length) of token numbers."""
    return lambda batch, size: (token_numbers(vocabulary, batch, size),)


def token_numbers(vocabulary: int, batch: int, length: int) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length))
