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
from fxprune.report.colours import COLOURS

DOCS = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WIDTH, HEIGHT, GAP = 172, 58, 40  # pixels of a box, and between boxes

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
    """Boxes with a name and a remark in two rows, the second from right to left, an arrow from each to the next, and one ``back``."""
    half = (len(boxes) + 1) // 2
    places = [(i, 0) for i in range(half)] + [(2 * half - 1 - i, 1) for i in range(half, len(boxes))]
    width, height = half * (WIDTH + GAP) - GAP + 16, 2 * HEIGHT + GAP + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<style>{_style()}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0 8 4 0 8z"/></marker></defs>',
    ]
    for (name, remark), (column, row) in zip(boxes, places, strict=True):
        x, y = 8 + column * (WIDTH + GAP), 8 + row * (HEIGHT + GAP)
        parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>')
        parts.append(f'<text class="name" x="{x + WIDTH // 2}" y="{y + 25}" text-anchor="middle">{escape(name)}</text>')
        parts.append(f'<text class="soft" x="{x + WIDTH // 2}" y="{y + 44}" text-anchor="middle">{escape(remark)}</text>')
    arrows = [(i, i + 1) for i in range(len(boxes) - 1)] + ([back] if back else [])
    return "".join([*parts, *(_arrow(places[a], places[b]) for a, b in arrows), "</svg>\n"])


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From the edge of a box to the near edge of a neighbour."""
    (x1, y1), (x2, y2) = ((8 + c * (WIDTH + GAP) + WIDTH // 2, 8 + r * (HEIGHT + GAP) + HEIGHT // 2) for c, r in (start, end))
    across, down = (end[0] > start[0]) - (end[0] < start[0]), (end[1] > start[1]) - (end[1] < start[1])
    x1, x2, y1, y2 = x1 + across * WIDTH // 2, x2 - across * (WIDTH // 2 + 2), y1 + down * HEIGHT // 2, y2 - down * (HEIGHT // 2 + 2)
    return f'<path class="arrow" d="M{x1} {y1}L{x2} {y2}"/>'


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
