"""Every error fxprune raises on purpose.

    FxPruneError
    ├── TraceError          the model could not be traced to a graph
    ├── UnsupportedError    an operation or module cannot be pruned or rewritten as asked
    ├── InputError          an argument is missing or wrong: inputs, batches, data, devices, options
    ├── PolicyError         a policy, its file or a sparsity in it is wrong
    ├── FileError           a saved file is unreadable or does not fit the model
    ├── ExportError         another runtime or its exporter refuses a slim module
    ├── DependencyError     an optional package is not installed
    ├── SearchError         a search option is wrong, or a part of the search is used wrongly
    ├── TargetError         the search target cannot be met
    ├── EvaluationError     the user's evaluate function or training gave no usable number
    └── VerificationError   the slim module does not compute what it must

``PruningWarning`` is a ``UserWarning``. Messages are one line: what is wrong, where in the user's code, what to do next.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What a function of the user's may raise by mistake; interrupts and errors of fxprune's own are none of these.
FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError),
    *(TypeError, ValueError),
)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def kind_of(value: object) -> str:
    """What a value is, for a message that says what came in the place of something else: "an int", "the class Linear", "None"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    spelled = name[:2].isupper() or name.startswith("nd")  # read letter by letter: an LSTM, an ndarray, a UNet
    return f"{'an' if name[:1].upper() in ('AEFHILMNORSX' if spelled else 'AEIOU') else 'a'} {name}"


def shown(value: object) -> str:
    """A number or a short text as it is written in code; of anything else what it is, since its own text may take many lines."""
    written = repr(value) if value is None or isinstance(value, (bool, int, float, str)) else ""
    return written if written and len(written) <= 60 else kind_of(value)


def few(names: Sequence[str], limit: int = 3) -> str:
    """The first ``limit`` of ``names``, and how many more there are: "a, b, c and 4 more"."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def in_a_line(error: BaseException) -> str:
    """An error of the user's code in one line: its type, what it says, and the last line outside installed packages it went through."""
    said = first_line(error) if str(error).strip() else "no message"
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((one for one in reversed(frames) if "site-packages" not in one.filename), frames[-1] if frames else None)
    where = "" if frame is None else f" ({Path(frame.filename).name}:{frame.lineno})"
    return f"{type(error).__name__}: {said}{where}"


def network_without(units: int) -> str:
    """What to call a candidate of a search that lacks so many units."""
    return f"the network without {units} of its units" if units else "the original network"


class PruningWarning(UserWarning):
    """A policy removed nothing, or much less than it asks for because channels are locked; ``record(slim).notes`` has the same text."""


class FxPruneError(Exception):
    """Base of all fxprune errors."""


class TraceError(FxPruneError):
    """The model could not be traced. ``module``: the path of the module whose code was at work, where that is known. ``needs_training``:
    what that module does in training must not be left out."""

    module = ""
    needs_training = False


class UnsupportedError(FxPruneError):
    """What was asked is not supported; the message names the operation and the reason."""


class InputError(FxPruneError):
    """An argument is none that it may be: example inputs, calibration batches, a data set, a device, the name of an option's value."""


class PolicyError(FxPruneError):
    """A policy, a policy file, or a sparsity in it is wrong."""


class FileError(FxPruneError):
    """A saved file cannot be read, or does not fit the model."""


class ExportError(FxPruneError):
    """A module could not be exported, or the runtime cannot run the exported file."""


class DependencyError(FxPruneError):
    """An optional dependency is missing; the message gives the pip command."""


class SearchError(FxPruneError):
    """A search option is wrong, or a part of the search was used out of order."""


class TargetError(FxPruneError):
    """The search target cannot be met; the message names the nearest value, ``nearest`` holds the result that has it."""

    def __init__(self, message: str, nearest: Any = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class EvaluationError(FxPruneError):
    """An evaluation or a training loss was not a finite number."""


class VerificationError(FxPruneError):
    """The slim module differs from the zeroed original; the worst node is named."""
