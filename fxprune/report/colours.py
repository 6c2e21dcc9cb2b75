"""The colours of pages and pictures, in light and in dark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By their names in the page's style sheet. Figures hold the light ones, and the page exchanges them for the dark ones.
COLOURS = {
    "bg": ("#ffffff", "#14171b"),
    "fg": ("#1b1f24", "#e8ebee"),
    "soft": ("#59636e", "#a3adb8"),
    "line": ("#d5dae0", "#3a424c"),
    "card": ("#f6f8fa", "#1d2227"),
    "c0": ("#0b62c4", "#6bb0ff"),
    "c1": ("#b35900", "#ffab5c"),
    "c2": ("#137a3f", "#62cf8f"),
    "c3": ("#8a2f9e", "#d993ea"),
    "c4": ("#a8173c", "#ff8fa3"),
    "c5": ("#0b6e78", "#5fd0d8"),
}
HUES = 6  # colours of prunable groups, by lane; this number itself stands for locked ones


def light(name: str) -> str:
    """A colour as it is on white."""
    return COLOURS[name][0]


def hue_of(group: Mapping[str, Any]) -> int:
    """The number of the colour of a group in lanes: those that lie side by side differ."""
    return int(group["lane"]) % HUES if group["prunable"] else HUES


def colour(hue: int) -> str:
    """The colour with this number, on white."""
    return light("soft" if hue == HUES else f"c{hue}")
