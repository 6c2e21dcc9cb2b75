"""Networks that hypothesis composes: an entry, blocks in various arrangements, a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.composing import as_people_write, attention, by_values, older_code, sequence, writes_and_weights
from tests.passes.composing.blocks import BLOCKS, conv_norm

__all__ = [
    "BLOCKS",
    "ENTRIES",
    "FORMS",
    "HEADS",
    "HISTORIES",
    "Composed",
    "Spec",
    "attention",
    "writes_and_weights",
    "as_people_write",
    "by_values",
    "older_code",
    "sequence",
]

FORMS = ("plain", "residual", "concat", "twice", "both", "input", "siamese", "earlier", "in_place")
HEADS = ("pool", "flatten", "last", "map", "several", "dict", "dataclass", "tied", "embedding")
ENTRIES = ("image", "pair", "tokens", "keywords")
HISTORIES = ("none", "ran", "ran elsewhere", "compressed", "compressed elsewhere")  # what happened to the model before
SIDE, WORDS, WIDEST = 8, 11, 64


@dataclass(frozen=True)
class Spec:
    """A network to be built: the stem's width, then blocks (name, variant, form), then a head; its inputs; how attention is pruned.

    ``batch`` and ``side`` are the example's sizes and may be one; ``history`` is what was done with the model before it is looked at.
    """

    stem: int
    blocks: tuple[tuple[str, int, str], ...]
    head: str
    entry: str = "image"
    attention: str = "auto"
    batch: int = 2
    side: int = SIDE
    history: str = "none"

    def inputs(self, batch: int = 0, side: int = 0) -> Any:
        """Inputs of the example's sizes, or of others."""
        side = side or self.side
        batch = max(batch or self.batch, 2 if side == 1 else 1)  # a batch norm that trains needs two values of a channel
        if self.entry == "tokens":
            return (torch.randint(0, WORDS, (batch, side * side)),)
        images = torch.randn(batch, 3, side, side), torch.randn(batch, 3, side, side)
        return {"image": images[:1], "pair": images, "keywords": {"x": images[0], "other": images[1]}}[self.entry]


@dataclass
class Result:
    logits: Tensor
    features: Tensor


class Composed(nn.Module):
    """The network of a ``Spec``; blocks that do not fit where they stand are left out."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = nn.Embedding(WORDS, spec.stem) if spec.entry == "tokens" else conv_norm(3, spec.stem)
        c, side = spec.stem, spec.side
        self.blocks = nn.ModuleList()
        self.forms: list[str] = []
        for name, variant, form in spec.blocks:
            made = BLOCKS[name](c, side, variant)
            if made is None or made[1] > WIDEST:
                continue
            module, width, size = made
            form = self._fitting(form, c == width, side == size)
            self.blocks.append(module)
            self.forms.append(form)
            c, side = {"concat": width + c, "input": width + 3}.get(form, width), size
        self.mix = nn.Conv2d(c, 7, 1)
        self.fc = nn.Linear(7 * side * side if spec.head in ("flatten", "last") else 7, spec.stem if spec.head == "tied" else 3)
        if spec.head == "tied":
            self.words = self.stem if spec.entry == "tokens" else nn.Embedding(WORDS, spec.stem)
        self.side = side

    def _fitting(self, form: str, same_width: bool, same_side: bool) -> str:
        if form == "input":
            return form if self.spec.entry != "tokens" else "plain"
        if form == "concat":
            return form if same_side else "plain"
        if form == "siamese":
            return form
        return form if same_width and same_side else "plain"

    def _entered(self, x: Tensor) -> Any:
        if self.spec.entry != "tokens":
            return self.stem(x)
        side = self.spec.side  # a text has the example's length
        return self.stem(x).transpose(1, 2).reshape(x.shape[0], -1, side, side)

    def _joined(self, form: str, module: nn.Module, x: Any, given: Tensor, first: Tensor) -> Any:
        if form == "siamese":
            return module(x) - module(x.flip(3)).abs()
        if form == "in_place":
            x = x.clone()
            x += module(x)
            return x
        y = module(x)
        if form == "residual":
            return x + y
        if form == "concat":
            return torch.cat([x, y], 1)
        if form == "twice":
            return module(y)
        if form == "both":
            return F.relu(y) * x
        if form == "input":
            return torch.cat([y, F.interpolate(given, size=y.shape[2:])], 1)
        if form == "earlier" and y.shape == first.shape:
            return y + first
        return y

    def forward(self, x: Tensor, other: Any = None) -> Any:
        given = x
        x = first = self._entered(given)
        if other is not None:
            x = x + self.stem(other) * 0.5
        for module, form in zip(self.blocks, self.forms, strict=True):
            x = self._joined(form, module, x, given, first)
        return self._read(x)

    def _read(self, x: Tensor) -> Any:
        head = self.spec.head
        x = F.relu(self.mix(x))
        if head == "map":
            return x
        if head == "flatten":
            return self.fc(x.reshape(-1, 7 * self.side * self.side))
        if head == "last":
            return self.fc(x.permute(0, 2, 3, 1).flatten(1))
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        y = self.fc(pooled)
        if head == "tied":
            words: Any = self.words
            return F.linear(y, words.weight)
        if head == "embedding":
            return F.normalize(y, dim=-1)
        return {"several": (y, [x, pooled]), "dict": {"logits": y, "inner": {"map": x}}, "dataclass": Result(y, x)}.get(head, y)
