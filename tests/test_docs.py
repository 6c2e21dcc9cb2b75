"""The documentation: its code runs, its pictures are those that the program draws, its site builds without a warning."""

from __future__ import annotations

import importlib.util
import linecache
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python(?: title=\"(\S+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """The Python blocks of a page: the file that the block stands for, if it has a title, the number of lines above it, its code."""
    text = page.read_text(encoding="utf-8")
    return [(match.group(1) or "", text.count("\n", 0, match.start(2)), match.group(2)) for match in FENCE.finditer(text)]


WITH_CODE = [page for page in PAGES if blocks(page)]


def test_code_is_found() -> None:
    assert ROOT / "README.md" in WITH_CODE and ROOT / "docs" / "index.md" in WITH_CODE


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks share a namespace, as for somebody who reads from top to bottom, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": f"page_{page.stem.replace('-', '_')}"}
    before = set(sys.modules)
    for title, above, block in blocks(page):
        if title:
            (tmp_path / title).write_text(block, encoding="utf-8")
            continue
        code = "\n" * above + block  # line numbers in errors are those of the page
        linecache.cache[str(page)] = (len(code), None, code.splitlines(keepends=True), str(page))
        try:
            exec(compile(code, str(page), "exec"), names)
        finally:
            linecache.checkcache(str(page))
    for name in set(sys.modules) - before:  # another page may have a file of the same name
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_pictures_are_what_the_program_draws(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "pictures" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    drawn, kept = ({path.name: without_words(path) for path in folder.glob("*.svg")} for folder in (tmp_path, ROOT / "docs" / "pictures"))
    assert drawn and drawn == {name: kept.get(name) for name in drawn}, "run: python docs/pictures/make.py"


def without_words(path: Path) -> str:
    """A picture without what it says when a mark is pointed at: reasons may be reworded."""
    return re.sub("<title>.*?</title>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.docs
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings", "mkdocs_awesome_nav"):
        pytest.importorskip(module, reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site" / "reference").rglob("*.html"))
    for name in ("fxprune.compress", "fxprune.analyze", "fxprune.visualize", "fxprune.search"):
        assert f'id="{name}"' in reference, f"the reference lacks {name}"
