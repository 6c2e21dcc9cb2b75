"""Imports by name: what a user's ``package.module:name`` stands for, and packages that only some features need."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from fxprune.errors import FAULTS, DependencyError, FxPruneError, InputError, first_line

# What is imported under another name than it is installed by.
_DISTRIBUTIONS = {"PIL.Image": "pillow", "sklearn.datasets": "scikit-learn", "torch.utils.tensorboard": "tensorboard", "yaml": "PyYAML"}


def by_path(path: str, what: str, kind: type[FxPruneError] = InputError) -> Any:
    """The object at ``package.module:name`` (or ``package.module.name``); modules of the working directory are found too.

    ``what`` says in errors what the path was to give: "model", "reward". Raises ``kind`` in one line, with near names where there are some.
    """
    module, separator, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not (module and separator and attribute):
        raise kind(f"{what} {path!r} is not of the form package.module:name")
    if os.getcwd() not in sys.path:  # a console script's own folder stands there instead
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except (*FAULTS, SyntaxError) as error:
        advice = "; run from the folder that holds it" if isinstance(error, ModuleNotFoundError) else ""
        raise kind(f"{what} {path!r}: cannot import {module!r}: {first_line(error)}{advice}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise kind(f"{what} {path!r}: {module!r} has no {attribute!r}{suggestion(part, dir(found))}")
        found = getattr(found, part)
    return found


def call_factory(spec: str, what: str, factory: Callable[..., Any], **options: Any) -> Any:
    """Call the user's ``factory`` with those of ``options`` that it takes; its failure is one ``InputError``."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # built in, without a signature
        parameters = ()  # type: ignore[assignment]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in parameters}
    try:
        return factory(**{k: v for k, v in options.items() if v is not None and (takes_any or k in taken)})
    except FAULTS as error:
        raise InputError(f"{what} {spec!r}: calling it failed: {type(error).__name__}: {first_line(error)}") from error


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not among ``known``, with the nearest ones."""
    return InputError(f"unknown {kind} {name!r}{suggestion(name, known)}")


def needed(package: str, use: str, extra: str) -> Any:
    """Import ``package``, which the extra ``extra`` installs (empty: its own name does). Raises ``DependencyError`` with the command.

    ``use``: what needs it, as the first words of the message: "export to onnx", "--config".
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.split(".")[0]
        called = _DISTRIBUTIONS.get(package, top)
        wanted = f"'fxprune[{extra}]'" if extra else called
        other = "" if (error.name or top).split(".")[0] == top else f" ({first_line(error)})"
        raise DependencyError(f"{use} needs {called}: pip install {wanted}{other}") from error


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "; did you mean a or b?" of the nearest of ``known``, or nothing where none is near."""
    close = difflib.get_close_matches(name, list(known), 3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
