"""The vocabulary of the analysis: labels in a union-find, and the Value that stands for a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from fxprune.passes.ir.nested import collect
from fxprune.passes.ir.reasons import Reason

Vector = npt.NDArray[np.int64]


class Labels:
    """A union-find over channel labels, vectorised; the root of a class is its smallest label, so the order of unions is without effect."""

    def __init__(self) -> None:
        self._parent: Vector = np.arange(1024, dtype=np.int64)
        self._yields = np.zeros(1024, dtype=bool)  # of a class: whether nothing but expansions and factories made its labels
        self.count = 0
        self.pins: list[tuple[Vector, Reason]] = []
        self.inexact: list[tuple[Vector, Reason]] = []

    def new(self, size: int, soft: bool = False) -> Vector:
        """``size`` labels; ``soft`` ones yield where their class meets a fixed size."""
        start, self.count = self.count, self.count + size
        if self.count > len(self._parent):
            grown = np.arange(max(self.count, 2 * len(self._parent)), dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            yields = np.zeros(len(grown), dtype=bool)
            yields[: len(self._yields)] = self._yields
            self._parent, self._yields = grown, yields
        self._yields[start : self.count] = soft
        return np.arange(start, self.count, dtype=np.int64)

    def find(self, vector: Vector) -> Vector:
        parent = self._parent
        root = parent[vector]
        while True:
            up = parent[root]
            if (up == root).all():
                break
            root = up
        parent[vector] = root
        return root

    def unite(self, a: Vector, b: Vector) -> None:
        if a is b:
            return
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            hard = ~(self._yields[a] & self._yields[b])
            self._yields[a[hard]] = self._yields[b[hard]] = False
            # Several pairs may name one root: it takes the smallest partner, and the next round unites the others.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def yields(self, vector: Vector) -> bool:
        """Whether all labels are soft, and have met none that are not."""
        return bool(self._yields[self.find(vector)].all())

    def pin(self, vector: Vector, reason: Reason) -> None:
        self.pins.append((vector, reason))

    def units(self, vector: Vector) -> int:
        return len(np.unique(self.find(vector)))


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What the walk knows of a tensor.

    ``shape``: its sizes on the example. ``axes``: axis -> one label per index, for the axes that carry channels.
    ``zero``: the axes along which a removed slice holds zeros in the zeroed original (the oracle needs that where two activations meet).
    ``why``: why the axes without labels have a fixed size. ``picks``: the labels that the numbers in the tensor are positions among, of a
    choice (the indices of a top-k); None where they are no such positions.
    ``gone``: labels such that the tensor holds zeros alone where all of them go (an expert's share of a token); None where there are none.
    ``empty``: likewise, where positions in it are none then (the tokens that chose an expert).
    """

    is_tensor: ClassVar[bool] = True  # one part of what a network returns, whatever its fields
    shape: tuple[int, ...]
    axes: dict[int, Vector]
    zero: frozenset[int]
    why: Reason
    picks: Vector | None = None
    gone: frozenset[int] | None = None
    empty: frozenset[int] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)


def lift(value: Any, why: Reason) -> Any:
    if isinstance(value, torch.Tensor):
        return Value(tuple(value.shape), {}, frozenset(), why)
    if isinstance(value, dict):
        return {k: lift(v, why) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(lift(v, why) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)([lift(v, why) for v in value]) if not isinstance(value, torch.Size) else value
    return value


def values(nested: Any) -> list[Value]:
    found: list[Value] = []
    collect(nested, Value, found)
    return found
