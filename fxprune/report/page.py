"""A page that needs nothing else: one HTML file with its style, its script, plotly.js and the figures inside.

Every figure has its numbers beside it as a table: the page says the same without figures, without JavaScript, to a screen reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

from fxprune.report import plots as figures
from fxprune.report.colours import COLOURS
from fxprune.report.lane_layout import Json, folded, packed
from fxprune.report.lane_plot import coupling_figure

NO_FIGURES = "This page has no figures, only their tables"


@dataclass
class Page:
    """Sections of HTML, and what is ``drawn`` in the places they have. ``reason``: why there are no figures, or empty."""

    title: str
    sections: list[tuple[str, str, str]] = field(default_factory=list)
    drawn: dict[str, str] = field(default_factory=dict)
    reason: str = field(default_factory=figures.missing)

    def section(self, key: str, title: str, *parts: str) -> None:
        """Add a section of HTML with a heading that the navigation names."""
        self.sections.append((key, title, "".join(parts)))

    def html(self, summary: str) -> str:
        """The whole page. ``summary``: the text below its heading."""
        links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in self.sections)
        body = "".join(
            f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{escape(title)}</h2>{part}</section>'
            for key, title, part in self.sections
        )
        missing = f'<p class="note" role="note">{NO_FIGURES}: {escape(self.reason)}</p>' if self.reason else ""
        return "".join(
            [
                '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width,initial-scale=1">',
                f'<title>{escape(self.title)}</title><link rel="icon" href="data:,"><style>{_style()}</style></head><body>',
                f'<a class="skip" href="#main">Skip to the content</a><header><h1>{escape(self.title)}</h1>',
                f"<p>{escape(summary)}</p>{missing}</header>",
                f'<nav aria-label="Sections"><ul>{links}</ul></nav><main id="main" tabindex="-1">{body}</main>',
                self._scripts(),
                "</body></html>\n",
            ]
        )

    def figure(
        self,
        key: str,
        title: str,
        drawn: str,
        table: str,
        *,
        controls: str = "",
        tall: bool = False,
        table_name: str = "The same as a table",
    ) -> str:
        """A figure's place, its caption, what filters it and its table. ``drawn``: the figure as JSON, or empty where there is none."""
        text = f"<details{' open' if self.reason else ''}><summary>{escape(table_name)}</summary>{table}</details>" if table else ""
        if self.reason:
            return f"<figure><figcaption>{escape(title)}</figcaption>{text}</figure>"
        self.drawn[key] = drawn
        label = f"{title}. Keys: plus and minus zoom, arrows move, 0 shows all."
        place = f'<div class="plot" id="{key}" tabindex="0" role="group" aria-label="{escape(label)}"></div>'
        frame = f'<div class="tall">{place}</div>' if tall else place
        without = "<noscript><p>The figure needs JavaScript; the table does not.</p></noscript>"
        return f"<figure><figcaption>{escape(title)}</figcaption>{controls}{frame}{without}{text}</figure>"

    def _scripts(self) -> str:
        if not self.drawn:
            return ""
        _, library = figures.plotly()
        swaps = json.dumps(dict(COLOURS.values()))
        return (
            f'<script type="application/json" id="figures">{figures.figures_json(self.drawn)}</script>'
            f'<script type="application/json" id="colours">{swaps}</script>'
            f"<script>{library}</script><script>{_asset('page.js')}</script>"
        )


def coupling_section(page: Page, data: Json) -> str:
    """The coupling graph as lanes, with its filter, its zoom and a table of the groups. ``data``: ``report.lane_layout.coupling_data``."""
    shown = folded(data)
    drawn = "" if page.reason else coupling_figure(packed(shown))
    fewer = (
        f'<p class="soft">{len(data["layers"])} layers are drawn as {len(shown["layers"])} rows; the table has all groups.</p>'
        if len(shown["layers"]) < len(data["layers"])
        else ""
    )
    buttons = "".join(
        f'<button type="button" data-figure="coupling" data-zoom="{key}">{name}</button>'
        for key, name in (("+", "Zoom in"), ("-", "Zoom out"), ("0", "Show all"))
    )
    controls = (
        '<div class="controls"><label>Find a layer or group <input type="search" id="find" autocomplete="off"></label>'
        f'<label><input type="checkbox" id="prunable"> prunable only</label>{"" if page.reason else buttons}'
        '<span id="found" role="status" class="soft"></span></div>'
    )
    lines = [
        Line(
            (one["name"], f"{one['kept']} of {one['size']}", ", ".join(dict.fromkeys(m["layer"] for m in one["marks"])), _state(one)),
            find=" ".join([one["name"], *(m["layer"] for m in one["marks"])]),
            free=one["prunable"],
        )
        for one in data["groups"]
    ]
    groups = table(("group", "units kept", "layers", "state"), lines, text=(2, 3))
    figure = page.figure(
        "coupling",
        "What is coupled with what",
        drawn,
        groups,
        controls="" if page.reason else controls,
        tall=True,
        table_name="The groups as a table",
    )
    legend = (
        "<p>Each row is a layer, in the order of execution; each vertical line is a group of channels that go together, and joins the "
        "layers that write it (filled), read it (open) or carry it (dash). Dotted grey groups are locked. Point at a mark for its members."
        "</p>"
    )
    return legend + fewer + figure


def _state(group: Json) -> str:
    parts = ["prunable" if group["prunable"] else f"locked: {group['reason']}", *(f"note: {note}" for note in group["notes"])]
    return "; ".join(parts)


@dataclass(frozen=True)
class Line:
    """A table's row. ``find``: text that the page's filter looks through; ``free``: whether the group may be pruned."""

    cells: Sequence[str]
    find: str = ""
    free: bool = True


def table(head: Sequence[str], lines: Iterable[Line | Sequence[str]], *, text: Sequence[int] = (), kind: str = "", label: str = "") -> str:
    """A table of texts, which are escaped here; the first column names the rows. ``text``: numbers of the columns that hold sentences."""

    def opened(tag: str, column: int, scope: str = "") -> str:
        return f"<{tag}{scope}{' class=text' if column in text else ''}>"

    top = "".join(f"{opened('th', i, ' scope=col')}{escape(cell)}</th>" for i, cell in enumerate(head))
    rows = []
    for line in lines:
        row = line if isinstance(line, Line) else Line(line)
        cells = [
            f"<th scope=row>{escape(row.cells[0])}</th>",
            *(f"{opened('td', i)}{escape(c)}</td>" for i, c in enumerate(row.cells) if i),
        ]
        known = f' data-find="{escape(row.find)}" data-free="{"yes" if row.free else "no"}"' if row.find else ""
        rows.append(f"<tr{known}>{''.join(cells)}</tr>")
    name = escape(label or f"Table: {', '.join(head)}")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _style() -> str:
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_asset('page.css')}"


def _asset(name: str) -> str:
    return (files("fxprune") / "web" / name).read_text(encoding="utf-8")


def coupling_page(title: str, data: Json) -> str:
    """The page of a coupling graph alone."""
    page = Page(title)
    prunable = [group for group in data["groups"] if group["prunable"]]
    page.section("coupled", "The coupling graph", coupling_section(page, data))
    units = sum(group["size"] for group in prunable)
    return page.html(f"{len(prunable)} groups prunable with {units:,} units, {len(data['groups']) - len(prunable)} groups locked.")
