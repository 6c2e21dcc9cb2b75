"""The surface: the names that ``fxprune`` offers, what importing it loads, and the tree of its errors."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fxprune
from fxprune import errors

PACKAGE = Path(fxprune.__file__).parent
CONTRACT = {
    *("analyze", "compress", "record", "visualize", "profile", "search", "distill", "save", "load"),
    *("Policy", "register_op", "FxPruneError", "VerificationError"),
}


def made_here(thing: object) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("fxprune")


def test_all_names_what_is_public_and_nothing_else() -> None:
    loaded = {name for name, thing in vars(fxprune).items() if not name.startswith("_") and made_here(thing)}
    assert loaded <= set(fxprune.__all__)
    assert all(made_here(getattr(fxprune, name)) for name in fxprune.__all__)  # those that are loaded later, too
    assert list(fxprune.__all__) == sorted(fxprune.__all__)


def test_all_holds_the_contract() -> None:
    assert set(fxprune.__all__) >= CONTRACT
    assert all(getattr(fxprune, name) is not None for name in fxprune.__all__)


def test_no_submodule_bears_the_name_of_a_public_function() -> None:
    # Importing it would put the module in the function's place.
    submodules = {path.stem for path in PACKAGE.iterdir()}
    assert not submodules & {name for name in fxprune.__all__ if callable(getattr(fxprune, name))}


def test_every_public_function_and_class_says_what_it_is() -> None:
    silent = [name for name in fxprune.__all__ if callable(getattr(fxprune, name)) and not getattr(fxprune, name).__doc__]
    assert not silent


def test_importing_fxprune_leaves_what_is_slow_alone() -> None:
    late = ("torchvision", "rich", "fxprune.driver", "fxprune.report", "fxprune.cli", "sklearn")
    code = f"import sys, fxprune; print([m for m in {late} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_imported_while_tracing_patches_the_builtins() -> None:
    """A module of torch's that is imported then keeps the patched ones: ExecuTorch's exporter failed by it."""
    code = """if True:
        import builtins, sys, torch, fxprune
        found = []
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if builtins.isinstance.__module__ != "builtins":
                    found.append(name)
        sys.meta_path.insert(0, Finder())
        layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)]
        fxprune.compress(torch.nn.Sequential(*layers), 0.5, torch.randn(2, 3, 8, 8))
        print(found)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_m_fxprune_tells_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fxprune", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("fxprune", run_name="__main__")
    assert not stopped.value.code and capsys.readouterr().out.strip() == f"fxprune {fxprune.__version__}"


def test_the_exception_tree_is_drawn_as_it_is() -> None:
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"[├└]── (\w+) +\S", errors.__doc__))
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    made = {name: kind for name, kind in kinds.items() if not issubclass(kind, Warning)}
    assert drawn == set(made) - {"FxPruneError"}
    assert all(kind.__bases__ == (errors.FxPruneError,) for name, kind in made.items() if name != "FxPruneError")
    assert errors.FxPruneError.__bases__ == (Exception,)


FUNCTIONS = [name for name in fxprune.__all__ if inspect.isfunction(getattr(fxprune, name))]
CLASSES = [name for name in fxprune.__all__ if dataclasses.is_dataclass(getattr(fxprune, name))]


def section(text: str, title: str) -> str:
    """The indented lines under a heading of a Google-style docstring."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", inspect.cleandoc(text) + "\n", re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_say_their_arguments_result_and_errors(name: str) -> None:
    function = getattr(fxprune, name)
    signature = inspect.signature(function)
    said = re.findall(r"^    \*{0,2}(\w+): \S", section(function.__doc__, "Args"), re.MULTILINE)
    assert said == list(signature.parameters)
    raised = re.findall(r"^    (\w+): \S", section(function.__doc__, "Raises"), re.MULTILINE)
    assert raised and set(raised) <= set(vars(errors)), "errors of fxprune, each with when it comes"
    assert section(function.__doc__, "Returns") or signature.return_annotation in (None, "None")


@pytest.mark.parametrize("name", CLASSES)
def test_public_classes_say_their_fields(name: str) -> None:
    kind = getattr(fxprune, name)
    inherited = {field.name for base in kind.__mro__[1:] if dataclasses.is_dataclass(base) for field in dataclasses.fields(base)}
    own = {field.name for field in dataclasses.fields(kind)} - inherited
    said = set(re.findall(r"``(\w+)``", kind.__doc__)) | set(re.findall(r"^    (\w+): \S", section(kind.__doc__, "Args"), re.MULTILINE))
    assert own <= said, f"{name} says nothing of {sorted(own - said)}"


def test_the_reference_has_every_public_name() -> None:
    pages = (PACKAGE.parent / "docs" / "reference").glob("*.md")
    listed = {name for page in pages for name in re.findall(r"^::: fxprune\.(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)}
    assert listed - {"errors"} == set(fxprune.__all__)


def test_the_glossary_has_the_words_that_results_use() -> None:
    text = (PACKAGE.parent / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\*\*(\w+)\*\*", text))
    assert {"label", "unit", "group", "class", "pin", "note", "part", "mode", "record", "policy"} <= words
