"""Text drawn with Pillow's own font: what it says, and where, is known exactly."""

from __future__ import annotations

import builtins
import keyword
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORDS = sorted({w for w in [*dir(builtins), *keyword.kwlist, *sys.stdlib_module_names] if w.isascii() and w.isalnum() and 3 < len(w) < 13})


def words(count: int, seed: int) -> list[str]:
    """Names of Python's, some with digits behind them."""
    draw = np.random.default_rng(seed)
    chosen = [WORDS[i] for i in draw.integers(len(WORDS), size=count)]
    return [f"{word}{draw.integers(10, 99)}" if draw.random() < 0.3 else word for word in chosen]


def line(text: str, height: int, width: int, draw: np.random.Generator) -> NDArray[np.uint8]:
    """One line of text, (height, width), grey: of a size, a contrast, a slant and a blur of its own."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    dark, light = int(draw.integers(0, 90)), int(draw.integers(160, 256))
    size = height * draw.uniform(0.5, 0.68)
    font = ImageFont.load_default(size)
    size *= min(1.0, 0.92 * width / font.getlength(text))
    page = Image.new("L", (width, height), light)
    ImageDraw.Draw(page).text((0.04 * width, height / 2), text, dark, ImageFont.load_default(size), anchor="lm")
    page = page.rotate(draw.uniform(-1.5, 1.5), Image.Resampling.BILINEAR, fillcolor=light)
    page = page.filter(ImageFilter.GaussianBlur(draw.uniform(0, 0.8)))
    return np.clip(np.asarray(page) + draw.normal(0, draw.uniform(0, 8), (height, width)), 0, 255).astype(np.uint8)


def lines(texts: list[str], height: int, width: int, seed: int) -> Tensor:
    """(lines, height, width), 0 to 255."""
    draw = np.random.default_rng(seed)
    return torch.stack([torch.from_numpy(line(text, height, width, draw)) for text in texts]).float()


def pages(count: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pages with five words each, (pages, side, side), 0 to 255, and where the words are, as a mask."""
    from PIL import Image, ImageDraw, ImageFont

    draw = np.random.default_rng(seed)
    sheets, masks = [], []
    for number in range(count):
        dark, light = int(draw.integers(0, 90)), int(draw.integers(160, 256))
        page, mask = Image.new("L", (side, side), light), Image.new("L", (side, side), 0)
        for row, word in enumerate(words(4, seed * 1000 + number)):
            font = ImageFont.load_default(side * draw.uniform(0.07, 0.12))
            at = (side * draw.uniform(0.04, 0.35), side * (0.06 + 0.24 * row))
            ImageDraw.Draw(page).text(at, word, dark, font)
            ImageDraw.Draw(mask).rectangle(ImageDraw.Draw(page).textbbox(at, word, font), fill=255)
        sheets.append(torch.from_numpy(np.asarray(page).copy()))
        masks.append(torch.from_numpy(np.asarray(mask) > 0))
    return torch.stack(sheets).float(), torch.stack(masks)


def likeness(found: str, wanted: str) -> float:
    """The share of characters that are right: one less the edit distance over the length of what was drawn, not below 0."""
    row = list(range(len(wanted) + 1))
    for i, one in enumerate(found, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return max(0.0, 1 - row[-1] / len(wanted))


def collapsed(indices: list[int], alphabet: list[str]) -> str:
    """What a network trained by CTC wrote: repeated symbols once, and symbol 0 for none."""
    return "".join(alphabet[one] for before, one in zip([0, *indices], indices, strict=False) if one not in (before, 0))
