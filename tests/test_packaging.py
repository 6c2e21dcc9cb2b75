"""What is installed: the package list, the link to passes, and a wheel that imports from elsewhere."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def listed(option: str) -> list[str]:
    lines = setup_cfg()["options"][option].splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_every_folder_of_modules_is_listed() -> None:
    own = [path.parent.relative_to(ROOT) for path in (ROOT / "fxprune").rglob("__init__.py") if "passes" not in path.parts]
    linked = [Path("fxprune") / path.parent.relative_to(ROOT) for path in (ROOT / "passes").rglob("__init__.py")]
    assert sorted(listed("packages")) == sorted(".".join(path.parts) for path in [*own, *linked])


def test_every_module_lies_in_a_package() -> None:
    folders = {path.parent for top in ("fxprune", "passes") for path in (ROOT / top).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_passes_are_linked_and_mapped() -> None:
    link = ROOT / "fxprune" / "passes"
    assert link.is_symlink() and os.readlink(link) == "../passes"
    assert listed("package_dir") == ["fxprune = fxprune", "fxprune.passes = passes"]


def test_torch_has_a_lower_and_no_upper_bound() -> None:
    wanted = {line.split(">=")[0]: line for line in listed("install_requires")}
    assert set(wanted) == {"torch", "networkx", "numpy", "rich", "safetensors"}  # what else a feature needs is an extra
    assert all(">=" in line and "<" not in line and "==" not in line for line in wanted.values())


@pytest.mark.long
def test_the_wheel_is_whole(tmp_path: Path) -> None:
    def run(*command: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    source = tmp_path / "source"
    for name in ("fxprune", "passes"):  # a copy: setuptools leaves a build folder behind, and would take old modules from one
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [(ROOT / "fxprune", Path("fxprune")), (ROOT / "passes", Path("fxprune/passes"))]
    modules = {place / path.relative_to(top) for top, place in sources for path in top.rglob("*.py")}
    assert {str(path) for path in modules} | {"fxprune/py.typed", "fxprune/web/page.css", "fxprune/web/page.js"} <= names
    assert not any(name.startswith("passes/") for name in names)
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel))
    dotted = sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in modules if path.name != "__main__.py")
    code = f"import importlib\nfor name in {dotted!r}: importlib.import_module(name)\nimport fxprune; print(fxprune.__file__)"
    where = run("-c", code, PYTHONPATH=str(tmp_path / "site"))
    assert "usage: fxprune-search" in run(str(tmp_path / "site" / "bin" / "fxprune-search"), "--help", PYTHONPATH=str(tmp_path / "site"))
    assert Path(where.strip()).is_relative_to(tmp_path / "site")
