"""Who may import whom, read from the source: a room never imports one to its right, and no imports run in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fxprune"

# A room is a folder or, at the top of ``fxprune`` and of ``passes``, a module. It may import itself and every room above it.
ROOMS = (
    "errors",
    "passes.compat",
    "atomic",
    "imports",
    "index_lists",
    "example_inputs",
    "evaluation",
    "zeros",
    "policies",
    "records",
    "attached",
    "passes.base",
    "passes.collector",
    "passes.ir",
    "passes.labels",
    "passes.rules",
    "passes.tracing",
    "passes.coupling",
    "passes.planning",
    "passes.rewriting",
    "passes.verify",
    "passes.pipeline",
    "recording",
    "costs",
    "repair",
    "importance",
    "files",
    "allocation",
    "exporting",
    "timing",
    "training",
    "compression",
    "api",
    "searching",
    "testing",
    "report",
    "cli",
    "__main__",
)
# Beside the order: what each of these may import, apart from itself. From ``api`` on every room may import them.
ASIDE = {
    "driver": {"errors", "atomic", "imports", "policies", "records"},
    "models": {"errors", "imports"},
    "data": {"errors", "imports"},
}
WIDEST = 16  # modules that may lie side by side in one folder


def modules() -> dict[str, Path]:
    """Module name below ``fxprune`` -> file, through the link to ``passes`` too."""
    found = {}
    for top, first in ((PACKAGE, ()), (ROOT / "passes", ("passes",))):
        for path in top.rglob("*.py"):
            parts = (*first, *path.relative_to(top).with_suffix("").parts)
            if first or parts[0] != "passes":
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports: at its top, inside functions, and under ``if TYPE_CHECKING``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full.removeprefix("fxprune.") in MODULES else node.module or ""


def own_imports(name: str) -> Iterator[tuple[int, str]]:
    for line, target in imported(MODULES[name]):
        short = target.removeprefix("fxprune.")
        if target.startswith("fxprune.") and short in MODULES and short != name:
            yield line, short


def room_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "passes" else parts[0]


def allowed(importer: str, target: str) -> bool:
    if importer == target:
        return True
    if importer in ASIDE:
        return target in ASIDE[importer]
    if target in ASIDE:
        return ROOMS.index(importer) >= ROOMS.index("api")
    return ROOMS.index(target) < ROOMS.index(importer)


def circles(arrows: Mapping[str, Sequence[str]]) -> list[list[str]]:
    graph = nx.DiGraph((source, target) for source, targets in arrows.items() for target in targets)
    return sorted(sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"", "passes"}))
def test_left_never_imports_right(name: str) -> None:
    mine = room_of(name)
    assert mine in ROOMS or mine in ASIDE, f"fxprune.{name} lies in no room yet: give it one in {Path(__file__).name}"
    wrong = [f"{MODULES[name]}:{line}: {name} imports {target}" for line, target in own_imports(name) if not allowed(mine, room_of(target))]
    assert not wrong, "\n".join(wrong)


def test_no_imports_run_in_a_circle() -> None:
    found = circles({name: [target for _, target in own_imports(name)] for name in MODULES})
    assert not [part for part in found if not any(name.startswith("passes.tracing.") for name in part)]


def test_the_folders_of_tests_are_named_as_the_rooms() -> None:
    rooms = {room.split(".")[0] for room in (*ROOMS, *ASIDE)}
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert folders <= rooms, sorted(folders - rooms)


def private_names_of_torch(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of what a file takes from torch that torch keeps to itself: by an import, or from torch by its dotted name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            full = ast.unparse(node)
            names = [f"torch.{full}" if full.split(".")[0] in ("nn", "fx", "F") else full]
        for name in names:
            first, *rest = name.split(".")
            if first == "torch" and any(part.startswith("_") and not part.startswith("__") for part in rest):
                yield getattr(node, "lineno", 0), name


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"passes.compat"}))
def test_private_names_of_torch_are_in_one_place(name: str) -> None:
    found = [f"{MODULES[name]}:{line}: {full}" for line, full in private_names_of_torch(MODULES[name])]
    assert not found, f"take it from fxprune.passes.compat: {found}"


def test_private_names_would_be_noticed(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    taken = "torch._C._nn, nn.modules.conv._ConvNd, nn.ReLU"
    file.write_text(f"import torch\nfrom torch.utils._pytree import tree_map\nfrom torch import nn\na = {taken}\n")
    assert {name for _, name in private_names_of_torch(file)} == {
        "torch.utils._pytree.tree_map",
        "torch._C._nn",
        "torch._C",
        "torch.nn.modules.conv._ConvNd",
    }


def test_no_folder_is_a_drawer() -> None:
    held: dict[Path, int] = {}
    for path in MODULES.values():
        held[path.parent] = held.get(path.parent, 0) + (path.name != "__init__.py")
    assert {folder: count for folder, count in held.items() if count > WIDEST} == {}


def test_the_face_of_a_room_is_for_others() -> None:
    """A module that imports its own package's ``__init__`` would run in a circle as soon as that imports the module."""
    names = [(name, target) for name in MODULES for _, target in own_imports(name)]
    wrong = [name for name, target in names if name.startswith(f"{target}.") and MODULES[target].stem == "__init__"]
    assert not wrong


def test_the_rule_would_notice() -> None:
    assert not allowed("errors", "api") and not allowed("passes.rules", "passes.rewriting") and not allowed("driver", "passes.coupling")
    assert not allowed("data", "costs") and not allowed("passes.coupling", "driver") and not allowed("training", "report")
    assert allowed("cli", "driver") and allowed("passes.coupling", "passes.rules") and allowed("api", "driver") and allowed("cli", "data")
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [["a", "b", "c"]] and not circles({"a": ["b"], "b": ["c"]})


def test_type_imports_count() -> None:
    source = ROOT / "fxprune" / "__init__.py"
    assert "if TYPE_CHECKING:\n    from fxprune.driver import SearchConfig" in source.read_text(encoding="utf-8")
    assert "fxprune.driver" in {target for _, target in imported(source)}


def everything() -> list[Path]:
    return [p for folder in ("fxprune", "passes", "tests", "examples", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_only_the_terminal_imports_rich() -> None:
    users = {name for name, path in MODULES.items() for _, target in imported(path) if target.split(".")[0] == "rich"}
    assert users <= {"report.terminal", "cli.command"}


def test_nobody_imports_passes_by_its_folder() -> None:
    wrong = [f"{path}:{line}" for path in everything() for line, target in imported(path) if target.split(".")[0] == "passes"]
    assert not wrong, f"write fxprune.passes: {wrong}"
