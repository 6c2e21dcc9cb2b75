"""Files that are there whole or not at all: written beside their place, and put into it in one step."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fxprune.errors import FileError, FxPruneError, first_line


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, beside ``path``: at the end of the block it takes the place of ``path``, and after an error it is removed."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def replace_text(path: Path, text: str, what: str = "", kind: type[FxPruneError] = FileError) -> None:
    """Write a text file whole, forced to the disk, its folder made where it is missing. Raises ``kind``; ``what`` names the file's part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part, part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        named = f"{what} to {path}" if what else str(path)
        raise kind(f"cannot write {named}: {error.strerror or first_line(error)}; choose a folder that can be written") from error


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole. Who may read it is for the umask to say. Raises what safetensors raises, and ``OSError``.

    It is written in a folder of its own: safetensors writes through a temporary file, which only its owner may read, and whose name
    nobody knows once the process has been killed. With the folder the next write removes it.
    """
    scratch = path.with_name(path.name + ".part")
    part = scratch / path.name
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        save_file(dict(tensors), part, None if metadata is None else dict(metadata))
        part.chmod(mode)
        os.replace(part, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, or the folder in which a write was going on when it was killed."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
