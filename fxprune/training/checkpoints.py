"""A training's checkpoint: one file, replaced only when the new one is whole, and read without running what is in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxprune.atomic import replaced
from fxprune.errors import FileError, first_line

FORMAT = "fxprune-training/1"
NAME = "training.pt"


def write_checkpoint(folder: Path, state: Mapping[str, Any], *, check: bool) -> None:
    """Write ``state``, tensors and plain values in dicts and lists, to ``folder``. ``check``: see at once whether it can be read again.

    Raises ``FileError`` where it cannot be written, or holds what only unpickling could read, as a scheduler of the user's own may.
    """
    path = folder / NAME
    try:
        with replaced(path) as part:
            torch.save({"format": FORMAT, **state}, part)
            if check:
                torch.load(part, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise FileError(f"cannot write the checkpoint {path}: {first_line(error)}; choose a folder that can be written") from error
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise FileError(
            f"cannot keep a checkpoint: the state of the optimizer, the scheduler or the loss is more than tensors and plain values "
            f"({first_line(error)}); train without checkpoint_dir"
        ) from error


def make_folder(folder: Path) -> None:
    """Make the folder, before any work is done that it is to keep. Raises ``FileError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot keep checkpoints in {folder}: {first_line(error)}; choose a folder that can be written") from error


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What was written to ``folder``, on the CPU; None where there is nothing. Raises ``FileError`` for another file or a damaged one."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise FileError(f"cannot go on from {path}: {first_line(error)}; remove it to start again") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FileError(f"cannot go on from {path}: it is no checkpoint of this version of fxprune; remove it to start again")
    return state


def check_same(folder: Path, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``FileError`` naming the first option that differs from those of the training that was interrupted."""
    for name in sorted({*kept, *now}):
        if kept.get(name) != now.get(name):
            raise FileError(
                f"cannot go on from {folder / NAME}: {name} was {kept.get(name)!r} and is {now.get(name)!r}; "
                "give the same options, or resume=False to start again"
            )
