"""Who may import whom, read from the source: left never imports right."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fxprune"

# Modules of one row may import each other and every row above.
LAYERS = (
    ("errors",),
    ("policies", "inputs", "records", "encoding", "evaluation", "likeness"),
    ("passes.rules",),
    ("passes",),
    ("patches", "moments", "playback", "consumers", "repairs", "elimination"),
    ("profiling", "costs", "scores", "rebuilding", "rebinding", "files", "runtimes", "exporting", "folding"),
    ("api",),
    (
        *("optimizers", "checkpoints", "processes", "loops", "training", "hints", "distillation"),
        *("searching", "recovery", "shrinking", "explaining"),
    ),
    ("results", "colours", "members", "lanes", "lane_svg", "figures", "lane_figure", "webpage", "search_page", "report"),
    ("display", "options", "scalars", "measuring", "arguments", "outputs", "session", "cli", "__main__"),
)
# Beside the layers: what each of these may import, apart from itself.
ASIDE = {
    "driver": {"errors", "policies", "records"},
    "data": {"errors", "policies"},
}
DATA = frozenset({"models", "images", "readers", "sources", "data"})


def modules() -> dict[str, Path]:
    """Module name below ``fxprune`` -> file, through the link to ``passes`` too."""
    files = [*PACKAGE.glob("*.py"), *(PACKAGE / "driver").rglob("*.py"), *(PACKAGE / "passes").rglob("*.py")]
    found = {}
    for path in files:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below ``node`` that can run: what stands under ``if TYPE_CHECKING`` names types and makes no dependency."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from run_nodes(child)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, at its top or inside functions."""
    for node in run_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def own_imports(name: str) -> Iterator[tuple[int, str]]:
    for line, target in imported(MODULES[name]):
        short = target.removeprefix("fxprune.")
        if target.startswith("fxprune.") and short in MODULES:
            yield line, short


def part_of(name: str) -> str:
    """The row's entry, or the part beside the layers, that a module belongs to."""
    if name in DATA:
        return "data"
    if name == "driver" or name.startswith("driver."):
        return "driver"
    entries = [entry for row in LAYERS for entry in row if name == entry or name.startswith(f"{entry}.")]
    assert entries, f"fxprune.{name} has no layer yet: give it one in {Path(__file__).name}"
    return max(entries, key=len)


def rank(part: str) -> int:
    return next(number for number, row in enumerate(LAYERS) if part in row)


def allowed(importer: str, target: str) -> bool:
    if importer == target:
        return True
    if importer in ASIDE:
        return target in ASIDE[importer]
    if target in ASIDE:
        return rank(importer) >= rank("api")
    return rank(target) <= rank(importer)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_left_never_imports_right(name: str) -> None:
    mine = part_of(name)
    wrong = [f"{MODULES[name]}:{line}: {name} imports {target}" for line, target in own_imports(name) if not allowed(mine, part_of(target))]
    assert not wrong, "\n".join(wrong)


def test_the_rule_would_notice() -> None:
    assert not allowed("errors", "api") and not allowed("passes.rules", "passes") and not allowed("driver", "passes")
    assert not allowed("data", "profiling") and not allowed("passes", "driver") and not allowed("distillation", "report")
    assert allowed("cli", "driver") and allowed("passes", "passes.rules") and allowed("api", "driver") and allowed("report", "data")


def everything() -> list[Path]:
    return [p for folder in ("fxprune", "passes", "tests", "examples", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_only_the_terminal_imports_rich() -> None:
    users = {name for name, path in MODULES.items() for _, target in imported(path) if target.split(".")[0] == "rich"}
    assert users <= {"report", "cli"}


def test_nobody_imports_passes_by_its_folder() -> None:
    wrong = [f"{path}:{line}" for path in everything() for line, target in imported(path) if target.split(".")[0] == "passes"]
    assert not wrong, f"write fxprune.passes: {wrong}"
