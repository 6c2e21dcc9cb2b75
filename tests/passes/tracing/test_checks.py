"""Checks of values that raise are left out of the graph, with a note; conditions that decide anything else stop the trace as ever."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError, UnsupportedError
from fxprune.passes.ir.notes import NoteKind
from fxprune.testing import assert_sound
from tests.passes import asserting


def raises(x: Tensor, y: Tensor) -> Tensor:
    if torch.isnan(x).any():
        raise ValueError(f"not a number among {x.shape[0]} samples")
    return y


def raises_otherwise(x: Tensor, y: Tensor) -> Tensor:
    if not torch.isfinite(x).all():
        raise ValueError("not a number")
    elif bool((x > 99).any()) or (x < -99).any():
        raise ValueError("too large")
    return y


def counts(x: Tensor, y: Tensor) -> Tensor:
    place = x[:, :, 0] > 0
    rows = y[place]
    if rows.shape[0] != place.sum():
        raise ValueError(f"{rows.shape[0]} rows for {place.sum()} places")
    return y.masked_scatter(place.unsqueeze(-1), rows * 2)


def promises(x: Tensor, y: Tensor) -> Tensor:
    torch._check_tensor_all(x < 99)
    torch._check(x.shape[0] > 0, lambda: "no samples")
    torch._assert((x < 99).all(), "too large")
    return y


def catches(x: Tensor, y: Tensor) -> Tensor:
    try:
        if (x > 0).any():
            raise ValueError("positive")
    except ValueError:
        y = y * 2
    return y


def decides(x: Tensor, y: Tensor) -> Tensor:
    if (x > 0).any():
        y = y * 2
    return y


def returns_or_decides(x: Tensor, y: Tensor) -> Tensor:
    if (x > 0).any():
        return y
    y = y * 2
    raise ValueError(f"negative: {y.shape}")


class Checked(nn.Module):
    def __init__(self, check: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.check, self.a, self.b = check, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.check(x, self.a(x)))


@pytest.mark.parametrize("check", [raises, raises_otherwise, counts, promises])
def test_checks_of_values_are_left_out(check: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Checked(check).eval(), torch.randn(2, 5, 6)
    with torch.no_grad():
        for _ in range(50):  # Python puts other instructions in place of those of code that runs often
            model(x)
    graph = assert_sound(model, x, removes=("a.weight",))
    notes = [note for note in graph.traced.notes if note.kind is NoteKind.LOST]
    assert notes and all("test_checks.py" in note and "a check of values" in note for note in notes)


@pytest.mark.parametrize("check", [catches, decides, returns_or_decides])
def test_conditions_that_decide_what_is_computed_stop_the_trace(check: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(TraceError, match=r"test_checks.py:\d+: a condition depends on the values of a tensor"):
        fxprune.analyze(Checked(check).eval(), torch.randn(2, 5, 6))


def guarded(x: Tensor, mask: Tensor | None, other: Tensor | None = None) -> Tensor:
    """A branch that makes what was not given, and raises where it was (as PyPOTS has it)."""
    if torch.isnan(x).any():
        if mask is None:
            mask = torch.isnan(x)
        else:
            raise ValueError("a mask is given, but there are numbers that are none")
    if (x > 99).any():
        if other is not None:
            x = x + other
        else:
            raise ValueError("too large")
    return x if mask is None else x * mask


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> Any:
        return self.c(self.b(self.a(guarded(x, mask, other)).relu()).relu())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 asks for None in other instructions")
def test_a_branch_that_raises_for_the_arguments_of_the_example() -> None:
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(2, 5, 8)
    graph = assert_sound(model, (x, torch.ones(2, 5, 8)), removes=("a.weight", "b.weight", "c.weight"))
    notes = [note for note in graph.traced.notes if "a check of values" in note]
    assert [note.kind for note in notes] == [NoteKind.LOST] * 2 == [NoteKind.LOST] * (
        len(graph.traced.notes) - 1
    ) and not graph.traced.parts
    for given in ((x,), (x, torch.ones(2, 5, 8), x)):  # here the branches do something
        with pytest.raises(TraceError, match=r"test_checks.py:\d+: a condition depends on the values"):
            fxprune.analyze(model, given)


def of_channels(_: Tensor, y: Tensor) -> Tensor:
    torch._check(y.shape[2] == 8, lambda: "eight channels")
    return y


def test_a_class_whose_checks_ask_for_its_channels_is_not_kept() -> None:
    model, x = Checked(of_channels).eval(), torch.randn(2, 5, 6)
    assert fxprune.compress(model, 0.5, x)(x).shape == (2, 5, 3)
    with pytest.raises(UnsupportedError, match="eight channels"):
        fxprune.compress(model, 0.5, x, keep_class=True)


def read_before(x: Tensor, y: Tensor) -> Tensor:
    fine, count = torch.isfinite(y).all().item(), int((y > 1e9).sum())
    if not fine or count > 0:
        raise ValueError(f"{count} are too large")
    return y


def clamps(x: Tensor, y: Tensor) -> Tensor:
    if x.max().item() > 1:
        y = y.clamp(max=1.0)
    return y


@pytest.mark.parametrize("check", [asserting.reads, asserting.compares, read_before])
def test_checks_of_numbers_that_are_read_are_left_out(check: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Checked(check).eval(), torch.randn(2, 5, 6)
    with torch.no_grad():
        for _ in range(50):
            model(x)
    graph = assert_sound(model, x, removes=("a.weight",))
    notes = [note for note in graph.traced.notes if note.kind is NoteKind.LOST]
    assert notes and all(("test_checks.py" in note or "asserting.py" in note) and "a check of values" in note for note in notes)


def test_a_branch_on_a_number_that_is_read_is_refused() -> None:
    with pytest.raises(TraceError, match=r"test_checks.py:\d+: a condition depends on the values of a tensor.*can be left out of forward"):
        fxprune.analyze(Checked(clamps).eval(), torch.randn(2, 5, 6))
