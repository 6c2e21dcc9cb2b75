"""The coupling graph as a still picture: SVG that needs no library, in the colours that the reader's system prefers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fxprune.report.colours import COLOURS, hue_of
from fxprune.report.lane_layout import BOTH, CARRIES, READS, ROLES, WRITES, Json

ROW, LANE, TOP, TEXT = 20, 26, 44, 7.3  # pixels: of a row, of a lane, above the first row, and across for one letter


def coupling_svg(data: Json, title: str) -> str:
    """A coupling graph in lanes (``lane_layout.packed``). To the right of a row stand the groups that begin there, with units kept."""
    names = [one["name"] for one in data["layers"]]
    left = 16 + TEXT * max(map(len, names), default=0)
    right = left + LANE * (data["lanes"] + 0.5)
    texts = _beginnings(data)
    # A picture whose words are wider than its lanes grows with its words.
    words = max((sum(len(word) + 2 for word, _ in row) for row in texts.values()), default=0)
    width, height = max(right + TEXT * words, 16 + TEXT * len(title), left + 380) + 8, TOP + ROW * len(names) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" role="img">',
        f"<title>{escape(title)}</title><style>{_style()}</style>",
        f'<rect class="bg" width="100%" height="100%"/><text class="title" x="8" y="18">{escape(title)}</text>',
        _legend(left),
    ]
    parts += [f'<text x="{left - 8:.0f}" y="{_y(row) + 4}" text-anchor="end">{escape(name)}</text>' for row, name in enumerate(names)]
    parts += _crossings(data, left)
    for group in data["groups"]:
        x = _x(group["lane"], left)
        kind = f"k{hue_of(group)}" + ("" if group["prunable"] else " locked")
        if group["bottom"] > group["top"]:
            parts.append(f'<line class="group {kind}" x1="{x}" x2="{x}" y1="{_y(group["top"])}" y2="{_y(group["bottom"])}"/>')
        parts += [_mark(mark["role"], x, _y(mark["row"]), kind, _told(group, mark)) for mark in group["marks"]]
    for row, begun in texts.items():
        spans = "".join(f'<tspan class="t{hue}">{escape(word)}  </tspan>' for word, hue in begun)
        parts.append(f'<text class="name" xml:space="preserve" x="{right:.0f}" y="{_y(row) + 4}">{spans}</text>')
    return "".join([*parts, "</svg>\n"])


def _x(lane: int, left: float) -> int:
    return round(left + LANE * (lane + 0.5))


def _y(row: int) -> int:
    return TOP + ROW * row + ROW // 2


def _beginnings(data: Json) -> dict[int, list[tuple[str, int]]]:
    """Row -> the names of the groups that begin in it, each with the number of its colour."""
    found: dict[int, list[tuple[str, int]]] = {}
    for group in data["groups"]:
        units = f"{group['kept']}/{group['size']}"
        found.setdefault(group["top"], []).append((f"{group['name']} {units if group['prunable'] else 'locked'}", hue_of(group)))
    return found


def _crossings(data: Json, left: float) -> list[str]:
    lanes: dict[int, list[int]] = {}
    for group in data["groups"]:
        for mark in group["marks"]:
            lanes.setdefault(mark["row"], []).append(group["lane"])
    return [
        f'<line class="row" x1="{_x(min(found), left)}" x2="{_x(max(found), left)}" y1="{_y(row)}" y2="{_y(row)}"/>'
        for row, found in sorted(lanes.items())
    ]


def _mark(role: str, x: float, y: float, kind: str, told: str) -> str:
    title = f"<title>{escape(told)}</title>" if told else ""
    if role == CARRIES:
        return f'<line class="mark {kind}" x1="{x - 5}" x2="{x + 5}" y1="{y}" y2="{y}">{title}</line>'
    inner = f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="2"/>' if role == BOTH else ""
    return f'<circle class="mark {"full " if role == WRITES else ""}{kind}" cx="{x}" cy="{y}" r="5">{title}</circle>{inner}'


def _told(group: Json, mark: Json) -> str:
    lines = [f"{mark['layer']} {mark['role']} {group['name']}", f"{mark['slices']}: {mark['kept']} of {mark['total']} kept"]
    lines += [f"joined by {mark['joins']}"] if mark["joins"] else []
    return "\n".join([*lines, *([] if group["prunable"] else [f"locked: {group['reason']}"]), *group["notes"]])


def _legend(left: float) -> str:
    said = {WRITES: "writes", READS: "reads", BOTH: "both", CARRIES: "carries"}
    parts, x = [], left
    for role in ROLES:
        parts.append(_mark(role, round(x + 13), 34, "k0", "") + f'<text class="soft" x="{x + 24:.0f}" y="38">{said[role]}</text>')
        x += 36 + TEXT * len(said[role])
    return "".join(parts)


def _style() -> str:
    def colours(which: int) -> str:
        by = {name: pair[which] for name, pair in COLOURS.items()}
        hues: Sequence[str] = [by[f"c{i}"] for i in range(6)] + [by["soft"]]
        return "".join(
            [
                f".bg,.mark{{fill:{by['bg']}}}text{{fill:{by['fg']}}}.soft{{fill:{by['soft']}}}.row{{stroke:{by['line']}}}",
                *(f".k{i}{{stroke:{c}}}.full.k{i},.dot.k{i}{{fill:{c}}}.t{i}{{fill:{c}}}" for i, c in enumerate(hues)),
            ]
        )

    fixed = (
        "text{font:12px ui-monospace,Menlo,Consolas,monospace}text.title{font-weight:bold}.group{stroke-width:4}.locked.group"
        "{stroke-width:2;stroke-dasharray:2 3}.mark{stroke-width:2}"
    )
    return f"{fixed}{colours(0)}@media(prefers-color-scheme:dark){{{colours(1)}}}"
