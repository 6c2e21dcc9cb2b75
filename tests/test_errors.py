"""Errors in a line: what they say first, and lists that are cut."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.data import readers
from fxprune.errors import EvaluationError, FileError, InputError, few, first_line, in_a_line
from fxprune.training import loop


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (RuntimeError("\n  \n"), "RuntimeError"),
        (KeyError("name"), "'name'"),
        (OSError("\n first\nsecond"), "first"),
    ],
)
def test_first_line(error: BaseException, said: str) -> None:
    assert first_line(error) == said


def test_what_an_error_says_with_its_type_and_place() -> None:
    try:
        torch.zeros(2)[5]
    except IndexError as error:
        assert in_a_line(error).startswith("IndexError: ") and f"({Path(__file__).name}:" in in_a_line(error)
    assert in_a_line(ValueError()) == "ValueError: no message"


@pytest.mark.parametrize(("count", "text"), [(0, ""), (2, "a, b"), (3, "a, b, c"), (5, "a, b, c and 2 more")])
def test_few(count: int, text: str) -> None:
    assert few("abcde"[:count]) == text
    assert few(("x", "y"), 1) == "x and 1 more"


def raise_silently(*_: object) -> Any:
    raise ValueError


def test_an_error_without_text_is_still_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first line used to be asked for where there was none: an IndexError instead of the message."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    with pytest.raises(EvaluationError, match="ValueError: no message"):
        fxprune.search(model, x, raise_silently, config=fxprune.SearchConfig(targets={"macs": 0.5}, steps=1, samples=1))
    with pytest.raises(InputError, match="cannot be read from .*: ValueError"):
        readers._torchvision_part("CIFAR10", raise_silently, tmp_path)
    data = [(x, torch.zeros(2, dtype=torch.long))]
    config = fxprune.DistillConfig(epochs=1, checkpoint_dir=tmp_path)
    fxprune.distill(copy.deepcopy(model), model, data, config=config)
    monkeypatch.setattr(loop.Run, "_restore", raise_silently)
    with pytest.raises(FileError, match="cannot go on from .*: ValueError; give the same model"):
        fxprune.distill(copy.deepcopy(model), model, data, config=replace(config, resume=True))
