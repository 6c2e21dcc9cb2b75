"""Calibration batches cut into three sets: those that are fitted, those that say how strongly, and those that judge the result; and what
takes too much memory at once, cut into portions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxprune.errors import FAULTS
from fxprune.passes.compat import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

T = TypeVar("T")
FIT, TUNE, JUDGE = range(3)
PIECES = 5  # a fifth of the samples to choose the strength by, a fifth to judge by
MANY = 20  # batches from which on a tenth is enough


@dataclass(frozen=True)
class Piece:
    """Inputs of one call of the network, how many samples they hold, and what they are for: ``FIT``, ``TUNE`` or ``JUDGE``."""

    inputs: Any
    samples: int
    role: int


def pieces(batches: Sequence[Any], run: Callable[[Any], Any]) -> list[Piece]:
    """The inputs of ``batches`` as pieces of all three roles, as far as there are enough of them.

    Fewer than ``PIECES`` batches are cut along their first axis, where ``run``, the original network, gives the same on the parts as on the
    whole: elsewhere what is left out would be read by what is fitted.
    """
    inputs = list(batches)
    if len(inputs) < PIECES:
        parts = -(-PIECES // max(1, len(inputs)))
        cut = [_cut(one, parts) for one in inputs]
        if all(len(one) > 1 for one in cut) and _independent(inputs[0], run):
            inputs = [part for one in cut for part in one]
    count = len(inputs)
    roles = [FIT] * count
    if count >= 2:
        every = MANY // 2 if count >= MANY else min(PIECES, count)
        for i in range(count):
            if i % every == every - 1:
                roles[i] = JUDGE
            elif i % every == every // 2 and every > 2:
                roles[i] = TUNE
    return [Piece(one, samples(one), role) for one, role in zip(inputs, roles, strict=True)]


def samples(inputs: Any) -> int:
    """The first size of the first tensor with axes; 1 where there is none."""
    first = next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim), None)
    return 1 if first is None else max(1, first.shape[0])


def portions(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """``items`` in their order, as many at a time as have ``most`` bytes together, at least one; ``size``: the bytes of one."""
    portion: list[T] = []
    taken = 0
    for item in items:
        needed = size(item)
        if portion and taken + needed > most:
            yield portion
            portion, taken = [], 0
        portion.append(item)
        taken += needed
    if portion:
        yield portion


def _cut(inputs: Any, parts: int) -> list[Any]:
    leaves, structure = tree_flatten(inputs)
    sizes = {t.shape[0] for t in leaves if isinstance(t, Tensor) and t.ndim}
    if len(sizes) != 1 or (size := sizes.pop()) < 2:
        return [inputs]
    step = -(-size // min(parts, size))
    return [
        tree_unflatten([t[i : i + step] if isinstance(t, Tensor) and t.ndim else t for t in leaves], structure)
        for i in range(0, size, step)
    ]


def _independent(inputs: Any, run: Callable[[Any], Any]) -> bool:
    """Whether samples along the first axis do not see each other, tried on the first four."""
    few = tree_map_only(Tensor, lambda t: t[:4] if t.ndim else t, inputs)
    try:
        together, *apart = ([t for t in tree_leaves(run(one)) if isinstance(t, Tensor)] for one in (few, *_cut(few, 2)))
        return len(apart) > 1 and all(_same(one, torch.cat([part[i] for part in apart])) for i, one in enumerate(together))
    except FAULTS:
        return False


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(a.abs().max()) if a.numel() else 1.0
    return bool(torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4 * max(scale, 1e-6)))
