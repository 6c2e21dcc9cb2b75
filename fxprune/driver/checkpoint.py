"""Checkpoints: one JSON file, replaced whole after every round, from which a search goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fxprune.atomic import replace_text
from fxprune.errors import SearchError

FORMAT = "fxprune-search/2"
NAME = "search.json"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to the folder's checkpoint. A kill at any moment leaves the old file or the new one, never half of one."""
    text = json.dumps({"format": FORMAT, **state})  # floats by repr, so they come back bit for bit
    replace_text(folder / NAME, text, kind=SearchError)


def exists(folder: Path) -> bool:
    """Whether the folder has a checkpoint."""
    return (folder / NAME).exists()


def load(folder: Path) -> dict[str, Any]:
    """Read the folder's checkpoint. Raises ``SearchError`` when there is none or it is not one of ours."""
    path = folder / NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SearchError(f"no search to resume in {folder}: {path.name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise SearchError(f"{path} is not a checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise SearchError(f"{path} is not a checkpoint of this version; it should say format {FORMAT!r}")
    return state
