"""The pages in a headless Chromium: no console error, every figure drawn, hovering, filters, zoom, in light and dark, at two widths."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fxprune.report.page import coupling_page
from fxprune.report.search_page import search_page
from tests.report.pages import coupling, history, result

pytestmark = pytest.mark.browser
pytest.importorskip("plotly", reason="the search extra is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium of the system's, or else playwright's own."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    with playwright.sync_playwright() as engine:
        try:
            chromium = engine.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser is found: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    made = {"search": search_page(result(), history(2)), "coupling": coupling_page("a graph", coupling())}
    return {name: _written(folder / f"{name}.html", html) for name, html in made.items()}


def _written(path: Path, html: str) -> str:
    path.write_text(html, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser: Any, pages: dict[str, str]) -> Iterator[Open]:
    """Opens a page; afterwards nothing may have been said on the console nor asked of the network."""
    said: list[str] = []
    contexts = []

    def open_page(name: str = "search", width: int = 1600, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.extend([] if request.url.startswith(("file:", "data:", "blob:")) else [request.url]))
        page.goto(pages[name])
        page.wait_for_function("[...document.querySelectorAll('.plot')].every(one => one.querySelector('.main-svg'))")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_every_figure_is_drawn_in_the_colours_and_the_width_of_the_screen(opened: Open, width: int, scheme: str) -> None:
    page = opened(width=width, scheme=scheme)
    assert page.locator(".js-plotly-plot").count() == 8
    for box in (one.bounding_box() for one in page.locator(".js-plotly-plot").all()):
        assert box["width"] > 250 and box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Text stands out from what it stands on: WCAG asks for 4.5.
    assert page.evaluate(CONTRAST) >= 4.5
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (scheme == "light")


CONTRAST = """() => {
  const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = light(getComputedStyle(document.querySelector("figure")).backgroundColor);
  const texts = document.querySelectorAll(".legendtext, .xtick text, .ytick text, .xtitle, .ytitle");
  const words = [...texts].map((one) => light(getComputedStyle(one).fill));
  return Math.min(...words.map((word) => (Math.max(word, ground) + 0.05) / (Math.min(word, ground) + 0.05)));
}"""


def test_colours_follow_the_system(opened: Open) -> None:
    page = opened()
    colour = "document.querySelector('#rewards .legendtext').style.fill"
    before = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{colour} !== '{before}'")
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"{colour} === '{before}'")


@pytest.mark.parametrize("name", ["search", "coupling"])
def test_hovering_a_mark_shows_its_members(opened: Open, name: str) -> None:
    page = opened(name)
    page.locator("#coupling").scroll_into_view_if_needed()
    mark = page.locator("#coupling .scatterlayer .points path").first
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    shown = page.locator("#coupling .hovertext")
    shown.wait_for()
    text = " ".join(shown.all_text_contents())
    assert "18 of 24 units" in text and "<i>mid</i>" in text


def test_candidates_are_filtered(opened: Open) -> None:
    page = opened()
    points = page.locator("#candidates .scatterlayer .trace")
    assert points.count() == 3
    page.get_by_label("on target only").check()
    page.wait_for_function("document.querySelectorAll('#candidates .scatterlayer .trace').length === 2")
    page.locator("#cost").select_option("params")
    page.wait_for_function("document.querySelector('#candidates .xtitle').textContent.includes('params')")
    assert points.count() == 2


def test_names_are_found(opened: Open) -> None:
    page = opened()
    page.get_by_text("The groups as a table").click()
    rows = page.locator("#coupled tbody tr")
    assert sum(row.is_visible() for row in rows.all()) == 3
    page.get_by_label("Find a layer or group").fill("stem")
    page.wait_for_function("document.getElementById('found').textContent === '2 of 5 marks shown'")
    assert [row.inner_text().split("\t")[0] for row in rows.all() if row.is_visible()] == ["stem.0[0:8]"]
    page.get_by_label("Find a layer or group").fill("")
    page.get_by_label("prunable only").check()
    page.wait_for_function("document.getElementById('found').textContent === '4 of 5 marks shown'")
    assert sum(row.is_visible() for row in rows.all()) == 2


def test_zoom_by_buttons_and_by_keys(opened: Open) -> None:
    page = opened()

    def span() -> float:
        low, high = page.evaluate("document.getElementById('coupling')._fullLayout.yaxis.range")
        return abs(float(high) - float(low))

    whole = span()
    page.locator('button[data-zoom="+"]').click()
    assert span() == pytest.approx(0.7 * whole)
    page.get_by_text("Show all", exact=True).click()
    assert span() == pytest.approx(whole)
    page.locator("#coupling").focus()
    page.keyboard.press("+")
    assert span() == pytest.approx(0.7 * whole)
    page.keyboard.press("0")
    assert span() == pytest.approx(whole)


def test_no_button_sends_a_figure_anywhere(opened: Open) -> None:
    page = opened()
    buttons = page.locator("#coupling .modebar-btn")
    titles = [button.get_attribute("data-title") or "" for button in buttons.all()]
    assert len(titles) == 6 and "Download plot as a PNG" in titles
    assert not any(word in title.lower() for title in titles for word in ("share", "cloud", "studio", "send"))


def test_everything_is_reached_by_the_keyboard(opened: Open) -> None:
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    seen = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"coupling", "candidates", "rewards", "cost", "on-target", "find", "prunable", "SUMMARY", "BUTTON", "PRE"} <= seen
