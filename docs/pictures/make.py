"""Draws the pictures of the documentation, with fxprune itself: python docs/pictures/make.py. The networks stand in docs/concepts/coupling.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

import fxprune

DOCS = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main(folder: Path = DOCS / "pictures") -> None:
    names: dict[str, Any] = {"__name__": "pictures"}
    for block in BLOCK.findall((DOCS / "concepts" / "coupling.md").read_text(encoding="utf-8")):
        exec(compile(block, "coupling.md", "exec"), names)
    residual = fxprune.analyze(names["Residual"]().eval(), torch.randn(1, 3, 8, 8))
    fxprune.visualize(residual, file=folder / "residual.svg")
    fxprune.visualize(names["heads"], file=folder / "attention.svg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
