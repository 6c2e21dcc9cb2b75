"""Errors in a line: what they say first, and lists that are cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.data import readers
from fxprune.errors import EvaluationError, FileError, FxPruneError, InputError, few, first_line, in_a_line, kind_of, shown
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


@pytest.mark.parametrize(
    ("value", "called"),
    [
        (None, "None"),
        (3, "an int"),
        ("x", "a str"),
        (np.zeros(2), "an ndarray"),
        (nn.LSTM(1, 1), "an LSTM"),
        (nn.GRU(1, 1), "a GRU"),
        (nn.Embedding(1, 1), "an Embedding"),
        (nn.Linear, "the class Linear"),
    ],
)
def test_what_a_value_is(value: object, called: str) -> None:
    assert kind_of(value) == called


def test_values_are_shown_where_they_are_short() -> None:
    assert [shown(value) for value in (0.5, "half", None, True)] == ["0.5", "'half'", "None", "True"]
    assert [shown(value) for value in (torch.randn(9), "x" * 99)] == ["a Tensor", "a str"]


M, X = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (lambda: fxprune.compress(M, X, 0.5), "policy is a Tensor; pass a sparsity"),  # type: ignore[arg-type]
    (lambda: fxprune.compress(M, None, X), "policy is None; pass a sparsity"),  # type: ignore[arg-type]
    (lambda: fxprune.compress(M, {"0": X}, X), "sparsity of group '0' is a Tensor"),  # type: ignore[dict-item]
    (lambda: fxprune.compress(M, 0.5, X, loss=3), "loss is an int; pass a function"),  # type: ignore[arg-type]
    (lambda: fxprune.Policy(0.5), "sparsity of the policy is 0.5; it must be a mapping"),  # type: ignore[arg-type]
    (lambda: fxprune.Policy({}, options=[]), "options of the policy is a list; it must be a mapping"),  # type: ignore[arg-type]
    (lambda: fxprune.Policy.uniform(M, 0.5), "graph is a Sequential; pass what fxprune.analyze"),  # type: ignore[arg-type]
    (lambda: fxprune.Policy.from_zeros(M), "graph is a Sequential; pass what fxprune.analyze"),
    (lambda: fxprune.regularize(M, 0.1), "graph is a Sequential; pass what fxprune.analyze"),  # type: ignore[arg-type]
    (lambda: fxprune.regularize(fxprune.analyze(M, X), "x"), "strength is 'x'"),  # type: ignore[arg-type]
    (lambda: fxprune.register_criterion("x"), "cannot register a str; pass a fxprune.Criterion"),  # type: ignore[arg-type]
    (lambda: fxprune.load(M, "a.safetensors"), "model is a str; pass a torch.nn.Module"),  # type: ignore[arg-type]
    (lambda: fxprune.load("a.safetensors", nn.Linear), "model is the class Linear; pass"),  # type: ignore[arg-type]
    (lambda: fxprune.save("a.safetensors", M), "slim is a str; pass"),  # type: ignore[arg-type]
    (lambda: fxprune.search(M, X, 5), "evaluate is 5; pass a function of the slim module"),  # type: ignore[arg-type]
    (lambda: fxprune.search(M, X, len, config=0.5), "config is a float; pass fxprune.SearchConfig"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_wrong_argument_is_named_in_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(FxPruneError) as caught:
        call()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


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
