"""The report page of a search: one HTML file that needs nothing else, legible in light and dark, narrow and wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fxprune.charts import Series, chart
from fxprune.results import Row, bytes_text, count_text, latency_text

Record = Mapping[str, Any]

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#59636e;--line:#d5dae0;--card:#f6f8fa;--c0:#0b62c4;--c1:#b35900;
  --c2:#137a3f;--c3:#8a2f9e}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e8ebee;--soft:#a3adb8;--line:#3a424c;--card:#1d2227;--c0:#6bb0ff;
  --c1:#ffab5c;--c2:#62cf8f;--c3:#d993ea}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--bg);color:var(--fg);font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.5rem 0}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
p,li{max-width:46rem}
.soft,.empty{color:var(--soft)}
.charts{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
figure{margin:0;padding:.75rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem}
figcaption{font-weight:600;margin-bottom:.5rem}
svg{width:100%;height:auto;display:block}
svg text{font-size:12px;fill:var(--soft)}
svg .axis{fill:var(--fg)}
.grid{stroke:var(--line)}
.line{fill:none;stroke-width:2}
.dot{stroke:var(--card);stroke-width:.5}
.line.s0{stroke:var(--c0)}
.line.s1{stroke:var(--c1);stroke-dasharray:6 3}
.line.s2{stroke:var(--c2);stroke-dasharray:2 3}
.line.s3{stroke:var(--c3)}
.dot.s0{fill:var(--c0)}
.dot.s1{fill:var(--c1)}
.dot.s2{fill:var(--c2)}
.dot.s3{fill:var(--c3)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:.5rem 0 0;padding:0;font-size:.875rem}
.key{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin-right:.35rem}
.key.s0{background:var(--c0)}
.key.s1{background:var(--c1)}
.key.s2{background:var(--c2)}
.key.s3{background:var(--c3)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .75rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
thead th{border-bottom-width:2px}
.bars{width:100%}
.bars td:first-child{font-family:ui-monospace,monospace;font-size:.85rem}
.bar{min-width:9rem;width:40%}
.bar span{display:block;height:.8rem;border-radius:.2rem;background:var(--c0);min-width:1px}
.bar i{display:block;height:.25rem;margin-top:2px;background:var(--c1);border-radius:.2rem;min-width:1px}
pre{overflow-x:auto;padding:.75rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem}
summary{cursor:pointer;font-weight:600}
:focus-visible{outline:3px solid var(--c0);outline-offset:2px}
"""


def page(result: Record, history: Sequence[Record]) -> str:
    """The page for a search's result and its history, as the session writes them (``result.json``, ``history.jsonl``)."""
    rows = [Row(**row) for row in result["rows"]]
    targets = " ".join(result["targets"])
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>fxprune: {escape(result['model'])}, {escape(targets)}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{escape(result['model'])} at {escape(targets)}</h1>",
        f'<p class="soft">{escape(result["summary"])}</p>',
        _section("Before and after", _before_after(rows)),
        _section("What went from each group", _bars(result["groups"])),
        _section("The search", _charts(history, str(result["targets"][0]).partition("=")[0])),
        _section("To repeat it", _repeat(result)),
        "</main></body></html>\n",
    ]
    return "".join(parts)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _before_after(rows: Sequence[Row]) -> str:
    first = rows[0]

    def share(value: float, whole: float, row: Row) -> str:
        return "" if row is first or not whole else f' <span class="soft">{100 * value / whole:.1f} %</span>'

    lines = [
        [
            escape(row.name),
            f"{100 * row.accuracy:.2f} %",
            count_text(row.macs) + share(row.macs, first.macs, row),
            count_text(row.params) + share(row.params, first.params, row),
            latency_text(row.latency) + share(row.latency, first.latency, row),
            bytes_text(row.bytes) + share(row.bytes, first.bytes, row),
        ]
        for row in rows
    ]
    return _table(["network", "test accuracy", "MACs", "parameters", "latency", "size on disk"], lines)


def _bars(groups: Sequence[Record]) -> str:
    lines = []
    for group in groups:
        share, even = group["removed"] / group["units"], group["uniform"] / group["units"]
        bar = f'<span style="width:{100 * share:.1f}%"></span><i style="width:{100 * even:.1f}%"></i>'
        lines.append([escape(group["name"]), f"{group['removed']} of {group['units']}", f"{100 * share:.0f} %", bar])
    table = _table(["group", "units removed", "sparsity", "found, and below it uniform"], lines, "bars")
    return table.replace("<td><span style", '<td class="bar"><span style')


def _charts(history: Sequence[Record], cost: str) -> str:
    rounds = [one for record in history for one in record["rounds"]]
    scored = [float(one["evaluations"]) for one in rounds]
    rewards, accuracies = [one["reward"] for one in rounds], [one["accuracy"] for one in rounds]
    series = [Series("reward of the round's best", scored, rewards), Series("best so far", scored, _running_best(rewards), 2, dots=False)]
    if accuracies != rewards:
        series.append(Series("accuracy of the round's best", scored, accuracies, 1))
    title = "Reward and accuracy of each round's best candidate over the networks scored"
    figures = [("Rounds", chart(series, x_label="networks scored", y_label="reward", title=title))]
    if len(history) > 1:
        steps = [float(i) for i in range(len(history) + 1)]
        names = list(dict.fromkeys([cost, "macs", "params"]))
        series = [Series(name, steps, [_start(name), *(record[name] for record in history)], i) for i, name in enumerate(names)]
        title = "Costs of the network after each step, as shares of the original"
        figures.append(("Steps", chart(series, x_label="step", y_label="share of the original", title=title)))
    figures.append(("All candidates, before any training", _scatter(history, cost)))
    drawn = "".join(f"<figure><figcaption>{caption}</figcaption>{body}</figure>" for caption, body in figures)
    lines = [[f"{r['step']}", f"{r['evaluations']}", f"{r['reward']:.4f}", f"{r['accuracy']:.4f}", f"{r[cost]:.4f}"] for r in history]
    table = _table(["step", "networks scored", "reward", "accuracy", escape(cost)], lines)
    return f'<div class="charts">{drawn}</div><details><summary>The steps as a table</summary>{table}</details>'


def _scatter(history: Sequence[Record], cost: str) -> str:
    candidates = [one for record in history for one in record["candidates"]]
    on_target, on_the_way = ([one for one in candidates if one["on_target"] is met] for met in (True, False))
    if not on_the_way:  # all have the target's cost: another one tells them apart
        cost = "params" if cost != "params" else "macs"
    front = _front(candidates, cost)
    series = [
        Series(name, [one[cost] for one in chosen], [one["accuracy"] for one in chosen], style, line=name == "Pareto front", dots=style < 2)
        for name, chosen, style in (("on target", on_target, 0), ("on the way", on_the_way, 1), ("Pareto front", front, 2))
        if chosen
    ]
    return chart(series, x_label=cost, y_label="accuracy", title=f"Accuracy of every candidate against its {cost}, before any training")


def _start(name: str) -> float:
    return 0.0 if name == "sparsity" else 1.0


def _running_best(values: Sequence[float]) -> list[float]:
    best: list[float] = []
    for value in values:
        best.append(max(value, best[-1]) if best else value)
    return best


def _front(candidates: Sequence[Record], cost: str) -> list[Record]:
    """Candidates than which none is both cheaper and more accurate, the cheapest first; for sparsity, more is cheaper."""
    sign = -1 if cost == "sparsity" else 1
    front: list[Record] = []
    for one in sorted(candidates, key=lambda c: (sign * c[cost], -c["accuracy"])):
        if not front or one["accuracy"] > front[-1]["accuracy"]:
            front.append(one)
    return front


def _repeat(result: Record) -> str:
    options = [[escape(str(name)), escape(str(value))] for name, value in result["options"].items()]
    return (
        f"<p>The search:</p><pre tabindex='0'>{escape(result['command'])}</pre>"
        f"<p>The result, in Python:</p><pre tabindex='0'>{escape(result['load'])}</pre>"
        f"<details><summary>All options</summary>{_table(['option', 'value'], options)}</details>"
    )
