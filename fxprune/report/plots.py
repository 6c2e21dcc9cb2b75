"""The figures of the report page, drawn by plotly from plain data: nothing here knows of networks, files or HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fxprune.errors import DependencyError
from fxprune.imports import needed
from fxprune.report.colours import light
from fxprune.report.formatting import Row, bytes_text, count_text, latency_text
from fxprune.report.lane_layout import Json

Record = Mapping[str, Any]
COSTS = ("macs", "params", "memory", "latency", "sparsity")
ROW, FRAME = 20, 110  # pixels of a row in a figure of rows, and of what surrounds them
NAME_LENGTH = 24


def plotly() -> tuple[Any, str]:
    """The module that builds figures and the text of plotly.js. Raises ``DependencyError`` where plotly is not installed."""
    graph_objects, offline = (needed(f"plotly.{name}", "drawing figures", "search") for name in ("graph_objects", "offline"))
    return graph_objects, offline.get_plotlyjs()


def missing() -> str:
    """Why no figures can be drawn, in one line, or an empty text where they can."""
    try:
        plotly()
    except DependencyError as error:
        return str(error)
    return ""


def as_json(traces: Sequence[Json], layout: Json) -> str:
    """A figure as JSON, checked by plotly's own schema."""
    graph_objects, _ = plotly()
    figure = graph_objects.Figure(data=list(traces), layout={"template": graph_objects.layout.Template(), **layout})
    text: str = figure.to_json()
    return text


def base_layout(x: str, y: str, **more: Any) -> Json:
    axis = {
        "gridcolor": light("line"),
        "linecolor": light("line"),
        "zerolinecolor": light("line"),
        "automargin": True,
        "title": {"standoff": 8},
    }
    layout: Json = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": light("fg"), "size": 13, "family": "system-ui, sans-serif"},
        "margin": {"l": 8, "r": 12, "t": 52, "b": 8},
        "legend": {"orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "x": 0, "xanchor": "left"},
        "hoverlabel": {"bgcolor": light("card"), "bordercolor": light("soft"), "font": {"color": light("fg")}, "align": "left"},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": light("soft"), "activecolor": light("fg")},
        "height": 340,
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}},
    }
    for name, value in more.items():
        layout[name] = {**layout[name], **value} if isinstance(layout.get(name), dict) else value
    return layout


def row_axis(names: Sequence[str]) -> Json:
    """An axis with one named row for each entry, the first at the top."""
    ticks = {"tickvals": list(range(len(names))), "ticktext": [escape(shortened(name)) for name in names]}
    return {**ticks, "range": [len(names) - 0.4, -0.6], "showgrid": False, "zeroline": False}


def shortened(name: str, length: int = NAME_LENGTH) -> str:
    """The end of a name, which tells layers apart better than its beginning."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def before_after(rows: Sequence[Row]) -> str:
    """Costs of each network but the first as shares of the first one's."""
    first, kinds = rows[0], (("size on disk", "bytes"), ("latency", "latency"), ("parameters", "params"), ("MACs", "macs"))
    as_text = {"bytes": bytes_text, "latency": latency_text, "params": count_text, "macs": count_text}
    traces = []
    for number, row in enumerate(rows[1:]):
        shown = [(label, figure) for label, figure in kinds if getattr(first, figure)]
        shares = [100 * getattr(row, figure) / getattr(first, figure) for _, figure in shown]
        hover = [
            f"{escape(row.name)}: {label} {as_text[figure](getattr(row, figure))} of {as_text[figure](getattr(first, figure))}"
            for label, figure in shown
        ]
        colour = light("c0") if row is rows[-1] else light(f"c{1 + number % 5}")
        bar = {"type": "bar", "orientation": "h", "name": escape(row.name), "x": shares, "y": [label for label, _ in shown]}
        text = {"text": [f"{share:.1f} %" for share in shares], "textposition": "auto", "hovertext": hover, "hoverinfo": "text"}
        traces.append({**bar, **text, "marker": {"color": colour}})
    layout = base_layout("% of the original", "", barmode="group", xaxis={"rangemode": "tozero"}, height=170 + 90 * len(traces))
    return as_json(traces, {**layout, "showlegend": True, "legend": {**layout["legend"], "traceorder": "reversed"}})


def layer_sparsity(layers: Sequence[Record]) -> str:
    """Share of each layer's output channels that went, beside that of the uniform allocation."""
    names = [one["name"] for one in layers]
    places = list(range(len(layers)))
    found = [100 * (1 - one["kept"] / one["channels"]) for one in layers]
    hover = [f"<b>{escape(one['name'])}</b><br>{one['kept']} of {one['channels']} channels kept" for one in layers]
    bars = {"type": "bar", "orientation": "h", "name": "found", "x": found, "y": places, "marker": {"color": light("c0")}}
    traces: list[Json] = [{**bars, "hovertext": hover, "hoverinfo": "text"}]
    if any(one["uniform"] is not None for one in layers):
        even = {"x": [one["uniform"] and 100 * one["uniform"] for one in layers], "y": places, "name": "uniform, same budget"}
        marker = {"color": light("c1"), "symbol": "diamond", "size": 10, "line": {"color": light("card"), "width": 1.5}}
        traces.append(
            {"type": "scatter", "mode": "markers", **even, "marker": marker, "hovertemplate": "uniform: %{x:.1f} %<extra></extra>"}
        )
    layout = base_layout("% of the layer's output channels removed", "", yaxis=row_axis(names), xaxis={"range": [0, 100]}, bargap=0.3)
    return as_json(traces, {**layout, "height": FRAME + ROW * len(names), "showlegend": True})


def layer_costs(layers: Sequence[Record], figure: str, label: str) -> str:
    """A cost of each layer before and after."""
    shown = [one for one in layers if one[figure][0] or one[figure][1]]
    places = list(range(len(shown)))
    traces = []
    for number, (name, colour) in enumerate((("before", "soft"), ("after", "c0"))):
        hover = [f"<b>{escape(one['name'])}</b><br>{label} {count_text(one[figure][0])} → {count_text(one[figure][1])}" for one in shown]
        values = [one[figure][number] for one in shown]
        bar = {"type": "bar", "orientation": "h", "name": name, "x": values, "y": places, "marker": {"color": light(colour)}}
        traces.append({**bar, "hovertext": hover, "hoverinfo": "text"})
    layout = base_layout(label, "", yaxis=row_axis([one["name"] for one in shown]), barmode="group", bargap=0.25)
    return as_json(traces, {**layout, "height": FRAME + (ROW + 6) * len(shown)})


def rewards(history: Sequence[Record], metric: str) -> str:
    """Reward and accuracy of each round's best candidate, and the best so far, over the networks scored."""
    rounds = [one for record in history for one in record["rounds"]]
    places, values = [one["evaluations"] for one in rounds], [one["reward"] for one in rounds]
    traces = [
        _line("reward of the round's best", places, values, "c0"),
        {**_line("best of the step so far", *_best(history), "c2"), "mode": "lines"},
    ]
    traces[1]["line"] = {"color": light("c2"), "shape": "hv", "dash": "dash"}
    accuracies = [one["accuracy"] for one in rounds]
    if accuracies != values:
        traces.append(_line(f"{metric} of the round's best", places, accuracies, "c1", "diamond"))
    return as_json(traces, base_layout("networks scored", "reward"))


def _best(history: Sequence[Record]) -> tuple[list[Any], list[Any]]:
    """The best reward so far within each step, over the networks scored; rewards of different steps are of different sizes."""
    x: list[Any] = []
    y: list[Any] = []
    for record in history:
        rewards = [one["reward"] for one in record["rounds"]]
        x += [*(one["evaluations"] for one in record["rounds"]), None]
        y += [*(max(rewards[: i + 1]) for i in range(len(rewards))), None]
    return x, y


def costs(history: Sequence[Record], targets: Sequence[str]) -> str:
    """What is left of each cost in each round's best candidate; the targets are marked."""
    rounds = [one for record in history for one in record["rounds"]]
    traces = []
    for number, name in enumerate(known_costs(rounds)):
        symbol = ("circle", "square", "diamond", "x", "cross")[number % 5]
        traces.append(_line(name, [one["evaluations"] for one in rounds], [one[name] for one in rounds], f"c{number}", symbol))
    shares = [float(part) for text in targets for part in text.partition("=")[2].split(",") if _is_number(part)]
    lines = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": {"color": light("soft"), "dash": "dot"}}
        for y in shares
    ]
    return as_json(traces, base_layout("networks scored", "share of the original", shapes=lines, yaxis={"rangemode": "tozero"}))


def candidates(history: Sequence[Record], metric: str, first: str) -> str:
    """Every candidate's accuracy against each of its costs, of which the page shows one, with the Pareto front of what is shown.

    Each trace's ``meta`` says its "cost" and its "kind": target, way or front. ``first``: the cost shown at the start.
    """
    traces = []
    for cost in known_costs(scored(history)):
        found = {
            "target": [one for one in scored(history) if one["on_target"]],
            "way": [one for one in scored(history) if not one["on_target"]],
        }
        found["front"] = front(scored(history), cost)
        for kind, name, colour, symbol in (
            ("target", "on target", "c0", "circle"),
            ("way", "on the way", "c1", "diamond-open"),
            ("front", "Pareto front", "c2", "circle-open"),
        ):
            chosen = found[kind]
            hover = [f"{escape(metric)} {one['accuracy']:.4f}<br>{_cost_lines(one)}<br>reward {one['reward']:.4f}" for one in chosen]
            trace = _line(name, [one[cost] for one in chosen], [one["accuracy"] for one in chosen], colour, symbol)
            trace |= {"mode": "lines+markers" if kind == "front" else "markers", "hovertext": hover, "hoverinfo": "text"}
            trace["marker"] = {**trace["marker"], "size": 11 if kind == "front" else 7}
            traces.append({**trace, "meta": {"cost": cost, "kind": kind}, "visible": cost == first})
    return as_json(traces, base_layout(f"share of the original: {first}", escape(metric)))


def scored(history: Sequence[Record]) -> list[Record]:
    """All candidates of a search."""
    return [one for record in history for one in record["candidates"]]


def known_costs(records: Iterable[Record]) -> list[str]:
    """The costs that every one of the records knows."""
    listed = list(records)
    return [name for name in COSTS if listed and all(name in one for one in listed)]


def front(found: Sequence[Record], cost: str) -> list[Record]:
    """Candidates than which none is both cheaper and more accurate, the cheapest first; for sparsity, more is cheaper."""
    sign = -1 if cost == "sparsity" else 1
    best: list[Record] = []
    for one in sorted(found, key=lambda c: (sign * c[cost], -c["accuracy"])):
        if not best or one["accuracy"] > best[-1]["accuracy"]:
            best.append(one)
    return best


def _line(name: str, x: Sequence[Any], y: Sequence[Any], colour: str, symbol: str = "circle") -> Json:
    style = {"color": light(colour)}
    marker = {**style, "symbol": symbol, "size": 7}
    return {"type": "scatter", "mode": "lines+markers", "name": escape(name), "x": list(x), "y": list(y), "line": style, "marker": marker}


def _cost_lines(one: Record) -> str:
    return "<br>".join(f"{name} {one[name]:.4f}" for name in COSTS if name in one)


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "", 1).isdecimal()


def figures_json(figures: Mapping[str, str]) -> str:
    """All figures of a page, by their ids, as one JSON text that may stand inside a script element."""
    joined = ",".join(f"{json.dumps(name)}:{text}" for name, text in figures.items())
    return f"{{{joined}}}".replace("<", "\\u003c")
