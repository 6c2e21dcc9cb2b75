"""The report page of a search, from what the session wrote: ``result.json`` and ``history.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fxprune.report import plots as figures
from fxprune.report.formatting import Row, accuracy_text, bytes_text, count_text, latency_text
from fxprune.report.lane_layout import BOTH, WRITES
from fxprune.report.page import Line, Page, coupling_section, table

Record = Mapping[str, Any]
METRIC = "accuracy"
SPREAD = 0.03  # a cost that varies by less is the same for all candidates, to the eye


def search_page(result: Record, history: Sequence[Record]) -> str:
    """The page for a search's result and its history."""
    rows = [Row(**row) for row in result["rows"]]
    page = Page(f"fxprune: {result['model']} at {' '.join(result['targets'])}")
    page.section("result", "Before and after", _before_after(page, rows))
    page.section("sparsity", "Sparsity per layer", _sparsity(page, result))
    page.section("search", "The search", _search(page, result, history))
    page.section("costs", "Costs per layer", _costs(page, result))
    if "coupling" in result:
        page.section("coupled", "The coupling graph", coupling_section(page, result["coupling"]))
    page.section("repeat", "To repeat it", _repeat(result))
    return page.html(result["summary"])


def _before_after(page: Page, rows: Sequence[Row]) -> str:
    first = rows[0]

    def share(value: float, whole: float, row: Row) -> str:
        return "" if row is first or not whole else f" ({100 * value / whole:.1f} %)"

    trained = any(row.untrained is not None for row in rows)
    lines = [
        [
            row.name,
            accuracy_text(row.accuracy, row, first),
            *([accuracy_text(row.untrained, row, first)] if trained else []),
            count_text(row.macs) + share(row.macs, first.macs, row),
            count_text(row.params) + share(row.params, first.params, row),
            latency_text(row.latency) + share(row.latency, first.latency, row),
            bytes_text(row.bytes) + share(row.bytes, first.bytes, row),
        ]
        for row in rows
    ]
    heads = ["network", "test accuracy", *(["before training"] if trained else []), "MACs", "parameters", "latency", "size on disk"]
    shown = table(heads, lines, kind="plain")
    drawn = "" if page.reason else figures.before_after(rows)
    return shown + ("" if page.reason or len(rows) < 2 else page.figure("before-after", "What is left of each cost", drawn, ""))


def layers_of(result: Record) -> list[dict[str, Any]]:
    """The layers that write channels: "name", "channels", "kept", and the share that "uniform" takes (None where it is not known)."""
    even = {group["name"]: group["uniform"] / group["units"] for group in result["groups"]}
    layers: dict[str, dict[str, Any]] = {}
    for group in result.get("coupling", {"groups": []})["groups"]:
        for mark in group["marks"]:
            if mark["role"] in (WRITES, BOTH) and mark["total"]:
                one = layers.setdefault(mark["layer"], {"name": mark["layer"], "channels": 0, "kept": 0, "uniform": 0.0, "free": False})
                one["channels"] += mark["total"]
                one["kept"] += mark["kept"]
                one["uniform"] += even.get(group["name"], 0.0) * mark["total"]
                one["free"] |= group["prunable"]
    order = {one["name"]: place for place, one in enumerate(result.get("coupling", {"layers": []})["layers"])}
    known = sorted(layers.values(), key=lambda one: order[one["name"]])
    return [{**one, "uniform": one["uniform"] / one["channels"]} for one in known if one["free"]]


def _sparsity(page: Page, result: Record) -> str:
    groups = [
        [
            g["name"],
            f"{g['removed']} of {g['units']}",
            f"{100 * g['removed'] / g['units']:.0f} %",
            f"{100 * g['uniform'] / g['units']:.0f} %",
        ]
        for g in result["groups"]
    ]
    by_group = table(["group", "units removed", "found", "uniform"], groups)
    layers = layers_of(result)
    if not layers:
        return by_group
    lines = [
        [
            one["name"],
            f"{one['channels']} → {one['kept']}",
            f"{100 * (1 - one['kept'] / one['channels']):.0f} %",
            f"{100 * one['uniform']:.0f} %",
        ]
        for one in layers
    ]
    by_layer = table(["layer", "output channels", "removed", "uniform"], lines)
    drawn = "" if page.reason else figures.layer_sparsity(layers)
    figure = page.figure("sparsity-plot", "Channels removed from each layer", drawn, by_layer, tall=True)
    return f"{figure}<details><summary>By group</summary>{by_group}</details>"


def _search(page: Page, result: Record, history: Sequence[Record]) -> str:
    rounds = [(record["step"], one) for record in history for one in record["rounds"]]
    if not rounds:
        return '<p class="empty">The strategy scored no candidates, so there is nothing to draw.</p>'
    costs = figures.known_costs([one for _, one in rounds])
    head = ["round", "step", "networks scored", "reward", METRIC, *costs]
    lines = [
        [f"{n}", f"{step}", f"{one['evaluations']}", f"{one['reward']:.4f}", f"{one['accuracy']:.4f}", *(f"{one[c]:.4f}" for c in costs)]
        for n, (step, one) in enumerate(rounds, 1)
    ]
    as_table = table(head, lines)
    drawn = "" if page.reason else figures.rewards(history, METRIC)
    parts = [page.figure("rewards", "Reward and accuracy over the rounds", drawn, as_table)]
    if costs and not page.reason:
        parts.append(
            page.figure("round-costs", "Costs of each round's best candidate", figures.costs(history, result["targets"]), as_table)
        )
    parts.append(_candidates(page, result, history))
    return f'<div class="figures">{"".join(parts)}</div>'


def _candidates(page: Page, result: Record, history: Sequence[Record]) -> str:
    found = figures.scored(history)
    costs = figures.known_costs(found)
    if not costs:
        return ""
    target = str(result["targets"][0]).partition("=")[0]
    # Where all candidates have the target's cost, another one tells them apart.
    spread = [cost for cost in costs if max(one[cost] for one in found) - min(one[cost] for one in found) > SPREAD]
    first = target if target in spread else (spread or costs)[0]
    choices = "".join(f"<option{' selected' if cost == first else ''}>{escape(cost)}</option>" for cost in costs)
    controls = (
        f'<div class="controls"><label>Cost <select id="cost">{choices}</select></label>'
        '<label><input type="checkbox" id="on-target"> on target only</label></div>'
    )
    best = figures.front(found, first)
    lines = [
        [f"{one['accuracy']:.4f}", *(f"{one[c]:.4f}" for c in costs), f"{one['reward']:.4f}", "yes" if one["on_target"] else "no"]
        for one in best
    ]
    as_table = table([METRIC, *costs, "reward", "on target"], lines)
    drawn = "" if page.reason else figures.candidates(history, METRIC, first)
    title = "All candidates, before any training"
    return page.figure("candidates", title, drawn, as_table, controls=controls, table_name=f"The Pareto front by {first} as a table")


def _costs(page: Page, result: Record) -> str:
    layers = result.get("layers", [])
    if not layers:
        return '<p class="empty">This run was made before costs per layer were kept; a new run has them.</p>'
    lines = [Line([one["name"], *(count_text(v) for key in ("macs", "params") for v in one[key])]) for one in layers]
    as_table = table(["layer", "MACs before", "after", "parameters before", "after"], lines)
    if page.reason:
        return as_table
    parts = [
        page.figure(f"layer-{key}", f"{label} of each layer", figures.layer_costs(layers, key, label), as_table, tall=True)
        for key, label in (("macs", "MACs"), ("params", "Parameters"))
    ]
    return f'<div class="figures">{"".join(parts)}</div>'


def _repeat(result: Record) -> str:
    options = [[str(name), _value(value)] for name, value in result["options"].items()]
    return (
        f'<p>The search:</p><pre tabindex="0">{escape(result["command"])}</pre>'
        f'<p>The result, in Python:</p><pre tabindex="0">{escape(result["load"])}</pre>'
        f"<details><summary>The whole configuration</summary>{table(['option', 'value'], options, text=(1,))}</details>"
    )


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
