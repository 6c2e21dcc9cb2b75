"""The coupling graph as a figure that can be zoomed, its marks told apart by hovering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fxprune.errors import few
from fxprune.report.colours import HUES, colour, hue_of, light
from fxprune.report.lane_layout import BOTH, CARRIES, READS, WRITES, Json
from fxprune.report.plots import FRAME, ROW, as_json, base_layout, row_axis

Record = Mapping[str, Any]
LANES_ACROSS = 11  # the figure is at least so many lanes wide, so that few of them stay beside their layers' names


def coupling_figure(data: Json) -> str:
    """A coupling graph in lanes (``report.lane_layout.packed``): a row for each layer, a line down for each group, a mark where they meet.

    ``customdata`` of every mark: its layer and its group, which the page filters by.
    """
    traces: list[Json] = []
    across = _crossings(data)
    line = {"color": light("line"), "width": 1}
    traces.append({"type": "scatter", "mode": "lines", **across, "line": line, "hoverinfo": "skip", "showlegend": False})
    for hue in range(HUES + 1):
        chosen = [group for group in data["groups"] if hue_of(group) == hue]
        xs = [x for group in chosen for x in (group["lane"], group["lane"], None)]
        ys = [y for group in chosen for y in (group["top"], group["bottom"], None)]
        style = {"color": colour(hue), "width": 2 if hue == HUES else 4, "dash": "dot" if hue == HUES else "solid"}
        if chosen:
            traces.append({"type": "scatter", "mode": "lines", "x": xs, "y": ys, "line": style, "hoverinfo": "skip", "showlegend": False})
    for role, symbol in ((WRITES, "circle"), (READS, "circle-open"), (BOTH, "circle-dot"), (CARRIES, "line-ew-open")):
        marks = [(group, mark) for group in data["groups"] for mark in group["marks"] if mark["role"] == role]
        if not marks:
            continue
        colours = [colour(hue_of(group)) for group, _ in marks]
        marker = {"symbol": symbol, "size": 7 if role == CARRIES else 11, "color": colours, "line": {"width": 2, "color": colours}}
        places = {"x": [group["lane"] for group, _ in marks], "y": [mark["row"] for _, mark in marks]}
        known = {"customdata": [[mark["layer"], group["name"], group["prunable"]] for group, mark in marks]}
        hover = {"hovertext": [_mark_text(group, mark) for group, mark in marks], "hoverinfo": "text"}
        traces.append({"type": "scatter", "mode": "markers", "name": role, **places, **known, **hover, "marker": {**marker, "opacity": 1}})
    kinds = [one["name"] for one in data["layers"]]
    xaxis = {"visible": False, "range": [-max(0.7, 0.04 * data["lanes"]), max(data["lanes"] - 0.3, LANES_ACROSS)]}
    layout = base_layout("", "", yaxis=row_axis(kinds), xaxis=xaxis, dragmode="pan", height=FRAME + ROW * len(kinds))
    return as_json(traces, {**layout, "showlegend": True})


def _crossings(data: Json) -> Json:
    """The thin line across each row, from the first lane that it has a mark in to the last."""
    lanes: dict[int, list[int]] = {}
    for group in data["groups"]:
        for mark in group["marks"]:
            lanes.setdefault(mark["row"], []).append(group["lane"])
    rows = sorted(lanes)
    return {"x": [x for row in rows for x in (min(lanes[row]), max(lanes[row]), None)], "y": [y for row in rows for y in (row, row, None)]}


def _mark_text(group: Record, mark: Record) -> str:
    lines = [
        f"<b>{escape(mark['layer'])}</b> {mark['role']}",
        f"group <b>{escape(group['name'])}</b>: {group['kept']} of {group['size']} units",
    ]
    lines.append(f"{escape(mark['slices'])}: {mark['kept']} of {mark['total']} kept")
    lines += [f"joined by {escape(mark['joins'])}"] if mark["joins"] else []
    lines += [] if group["prunable"] else [f"locked: {escape(group['reason'])}"]
    lines += [f"note: {escape(note)}" for note in group["notes"]]
    members = list(dict.fromkeys(one["layer"] for one in group["marks"]))
    return "<br>".join(_wrapped([*lines, f"members: {escape(few(members, 5))}"]))


def _wrapped(lines: Sequence[str], width: int = 46) -> list[str]:
    """Lines short enough for a narrow screen, broken at spaces."""
    done = []
    for line in lines:
        while len(line) > width and " " in line[:width]:
            head = line[:width].rpartition(" ")[0]
            if not head:
                break
            done.append(head)
            line = line[len(head) + 1 :]
        done.append(line)
    return done
