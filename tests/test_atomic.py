"""Files that are there whole or not at all."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fxprune.atomic import remove, replace_tensors, replace_text, replaced
from fxprune.errors import FileError, PolicyError


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyError), replaced(target) as part:
        part.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with replaced(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_text_makes_its_folder_and_says_what_is_wrong(tmp_path: Path) -> None:
    replace_text(tmp_path / "deep" / "a.txt", "é")
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "é"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write .*file/a.txt: .*; choose a folder that can be written"):
        replace_text(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(PolicyError, match="cannot write the policy to "):
        replace_text(tmp_path / "file" / "a.txt", "x", "the policy", PolicyError)


def test_tensors_have_the_rights_of_any_file_and_leave_no_folder(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    (tmp_path / "a.safetensors.part").mkdir()  # by a writer that was killed
    replace_tensors(target, {"x": torch.arange(3)})
    (tmp_path / "other").touch()
    assert load_file(target)["x"].tolist() == [0, 1, 2]
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    with pytest.raises(RuntimeError):
        shared = torch.zeros(4)
        replace_tensors(target, {"x": shared, "y": shared})
    assert load_file(target)["x"].tolist() == [0, 1, 2] and not list(tmp_path.glob("*.part"))


def test_remove_takes_files_folders_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "in").touch()
    (tmp_path / "file").touch()
    for name in ("folder", "file", "absent"):
        remove(tmp_path / name)
    assert not list(tmp_path.iterdir())
