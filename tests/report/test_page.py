"""The report page: whole, self-contained, escaped, with figures and with tables that say the same."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.report import page as webpage
from fxprune.report import plots as figures
from fxprune.report.page import coupling_page
from fxprune.report.search_page import layers_of, search_page
from tests.report.pages import coupling, history, result

FIGURES = {"before-after", "sparsity-plot", "rewards", "round-costs", "candidates", "layer-macs", "layer-params", "coupling"}
VOID = {"meta", "link", "input", "img", "br"}


class Outline(HTMLParser):
    """Collects what matters of a page, and that every element that is opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.data: dict[str, str] = {}
        self.within = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [known["id"] or ""] if "id" in known else []
        self.within = known.get("id") or "" if tag == "script" else ""
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] == ["script"]:
            self.data[self.within] = self.data.get(self.within, "") + data
        elif self.stack[-1:] != ["style"]:
            self.text += data


@pytest.fixture
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)


@pytest.mark.parametrize("targets", [["macs=0.5"], ["sparsity=0.3"], ["macs=0.7,0.5", "params=0.6"]])
def test_page_is_whole_self_contained_and_escaped(targets: list[str]) -> None:
    pytest.importorskip("plotly", reason="the search extra is not installed")
    outline = Outline(search_page(result(*targets), history(2)))
    assert not outline.stack
    assert all(link.startswith("#") or link == "data:," for link in outline.links)
    assert len(outline.ids) == len(set(outline.ids))
    assert all(link[1:] in outline.ids for link in outline.links if link.startswith("#"))
    assert set(json.loads(outline.data["figures"])) == FIGURES <= set(outline.ids)
    assert "img" not in outline.tags and "i" not in outline.tags and "net" not in outline.tags
    for expected in (
        *("my.module:<net>", "It went <well>.", "98.61 % (-0.28)", "stem.0[0:8]", "6 of 24", "fxprune-search --model"),
        *("<i>mid</i></script>", "24 → 18", "locked: it reaches the network's output", "0.7100", "<img src=x onerror=alert(1)>"),
    ):
        assert expected in outline.text


def test_the_table_says_what_training_brought() -> None:
    assert "before training" not in Outline(search_page(result(), history())).text
    found = result()
    found["rows"][-1]["untrained"] = 0.9752
    text = Outline(search_page(found, history())).text
    assert "before training" in text and "97.52 % (-1.37)" in text


def test_figures_hold_what_was_found() -> None:
    pytest.importorskip("plotly", reason="the search extra is not installed")
    drawn = json.loads(Outline(search_page(result(), history())).data["figures"])
    bars, diamonds = drawn["sparsity-plot"]["data"]
    assert bars["x"] == [25.0, 0.0]
    assert diamonds["x"] == pytest.approx([100 * 7 / 24, 0.0])
    shown = {one["meta"]["kind"]: one["x"] for one in drawn["candidates"]["data"] if one["visible"]}
    assert shown == {"target": [0.5, 0.5], "way": [0.75], "front": [0.5, 0.75]}
    assert [one["name"] for one in drawn["round-costs"]["data"]] == ["macs", "params", "sparsity"]
    assert drawn["round-costs"]["layout"]["shapes"][0]["y0"] == 0.5
    marks = [one for one in drawn["coupling"]["data"] if "customdata" in one]
    assert {one["name"]: len(one["x"]) for one in marks} == {"writes": 3, "reads": 2}
    assert "&lt;i&gt;mid&lt;/i&gt;&lt;/script&gt;" in marks[0]["hovertext"][1]
    before, after = drawn["layer-macs"]["data"]
    assert before["x"] == [4000, 80] and after["x"] == [2500, 80]


def test_the_best_so_far_begins_anew_with_each_step() -> None:
    pytest.importorskip("plotly", reason="the search extra is not installed")
    _, best, _ = json.loads(figures.rewards(history(2), "accuracy"))["data"]
    assert best["y"] == [0.7, 0.7, None, 0.7, 0.7, None]


def test_without_plotly_the_tables_stay_and_a_line_says_why(without_plotly: None) -> None:
    html = search_page(result(), history())
    outline = Outline(html)
    assert not outline.stack and "script" not in outline.tags
    assert "pip install 'fxprune[search]'" in outline.text and webpage.NO_FIGURES in outline.text
    for expected in ("98.61 %", "6 of 24", "0.7100", "4.00 k", "locked: it reaches the network's output"):
        assert expected in outline.text


def test_a_run_of_an_earlier_version_still_has_a_page() -> None:
    """It kept neither layers nor coupling, nor the costs of its rounds."""
    old = {name: value for name, value in result().items() if name not in ("coupling", "layers")}
    rounds = [{"reward": 0.7, "accuracy": 0.7, "evaluations": 5}]
    outline = Outline(search_page(old, [{**history()[0], "rounds": rounds}]))
    assert not outline.stack and "6 of 24" in outline.text and "a new run has them" in outline.text
    assert layers_of(old) == []


def test_page_without_any_round() -> None:
    empty = [{**history()[0], "rounds": [], "candidates": []}]
    assert "scored no candidates" in search_page(result(), empty)


@pytest.mark.parametrize("cost", ["macs", "sparsity"])
def test_the_front_holds_what_nothing_beats(cost: str) -> None:
    found = figures.scored(history())
    for one in figures.front(found, cost):
        sign = -1 if cost == "sparsity" else 1
        assert not any(sign * other[cost] <= sign * one[cost] and other["accuracy"] > one["accuracy"] for other in found)


def test_the_page_of_a_coupling_graph_alone(tmp_path: Any) -> None:
    pytest.importorskip("plotly", reason="the search extra is not installed")
    outline = Outline(coupling_page("a graph", coupling()))
    assert not outline.stack and "2 groups prunable with 32 units, 1 groups locked" in outline.text
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    slim = fxprune.compress(model, 0.5, torch.randn(1, 3, 8, 8))
    fxprune.visualize(slim, file=tmp_path / "slim.html")
    assert set(json.loads(Outline((tmp_path / "slim.html").read_text(encoding="utf-8")).data["figures"])) == {"coupling"}


def test_the_styles_and_scripts_are_in_the_package() -> None:
    assert "prefers-color-scheme:dark" in webpage._style()
    assert "http" not in webpage._asset("page.js") + webpage._asset("page.css")
