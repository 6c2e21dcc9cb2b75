"""Draws the pictures of the documentation: python docs/pictures/make.py.

Coupling graphs are drawn by fxprune itself, of the networks that stand in docs/concepts/coupling.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

import fxprune
from fxprune.colours import COLOURS

DOCS = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WIDTH, HEIGHT, GAP = 150, 58, 34  # pixels of a box, and between boxes

COMPILER = (
    ("your module", "left as it was"),
    ("trace", "training and evaluation"),
    ("couple", "labels to groups"),
    ("plan", "policy, importance"),
    ("rewrite", "weights and literals"),
    ("verify", "the zeroing oracle"),
)
SEARCH = (
    ("analyse once", "groups and costs"),
    ("ask", "units per group"),
    ("slice", "a slim candidate"),
    ("repair, score", "held-out images"),
    ("tell", "the policy moves"),
    ("distil", "from the original"),
)


def main(folder: Path = DOCS / "pictures") -> None:
    names: dict[str, Any] = {"__name__": "pictures"}
    for block in BLOCK.findall((DOCS / "concepts" / "coupling.md").read_text(encoding="utf-8")):
        exec(compile(block, "coupling.md", "exec"), names)
    residual = fxprune.analyze(names["Residual"]().eval(), torch.randn(1, 3, 8, 8))
    fxprune.visualize(residual, file=folder / "residual.svg")
    fxprune.visualize(names["heads"], file=folder / "attention.svg")
    (folder / "compiler.svg").write_text(chain(COMPILER), encoding="utf-8")
    (folder / "search.svg").write_text(chain(SEARCH, back=(4, 1)), encoding="utf-8")


def chain(boxes: Sequence[tuple[str, str]], back: tuple[int, int] | None = None) -> str:
    """Boxes with a name and a remark, an arrow from each to the next, and one ``back`` from a box to an earlier one."""
    width, height = len(boxes) * (WIDTH + GAP) - GAP + 16, HEIGHT + 16 + (34 if back else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<style>{_style()}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0 8 4 0 8z"/></marker></defs>',
    ]
    for number, (name, remark) in enumerate(boxes):
        x, middle = 8 + number * (WIDTH + GAP), 8 + number * (WIDTH + GAP) + WIDTH // 2
        parts.append(f'<rect x="{x}" y="8" width="{WIDTH}" height="{HEIGHT}" rx="8"/>')
        parts.append(f'<text class="name" x="{middle}" y="33" text-anchor="middle">{escape(name)}</text>')
        parts.append(f'<text class="soft" x="{middle}" y="52" text-anchor="middle">{escape(remark)}</text>')
        if number:
            parts.append(f'<path class="arrow" d="M{x - GAP} {8 + HEIGHT // 2}H{x - 2}"/>')
    if back:
        start, end = (8 + number * (WIDTH + GAP) + WIDTH // 2 for number in back)
        parts.append(f'<path class="arrow" d="M{start} {8 + HEIGHT}V{height - 10}H{end}V{10 + HEIGHT}"/>')
    return "".join([*parts, "</svg>\n"])


def _style() -> str:
    def colours(which: int) -> str:
        by = {name: pair[which] for name, pair in COLOURS.items()}
        box = f"rect{{fill:{by['card']};stroke:{by['c0']}}}text{{fill:{by['fg']}}}.soft{{fill:{by['soft']}}}"
        return f"{box}.arrow{{stroke:{by['soft']}}}.tip{{fill:{by['soft']}}}"

    words = "text{font:13px system-ui,sans-serif}text.name{font-weight:bold;font-size:15px}"
    arrow = ".arrow{fill:none;stroke-width:2;marker-end:url(#tip)}"
    return f"{words}{arrow}{colours(0)}@media(prefers-color-scheme:dark){{{colours(1)}}}"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
