"""Notes are data: what reads them asks for the kind, whatever the sentence says."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.passes.ir.notes import Note, NoteKind


class Noted(nn.Module):
    """A layer, and one thing that ``what`` names and a graph cannot keep."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls = what, 0
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("on", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.what == "size":
            x = x * {4: 1.0, 2: 2.0}.get(x.shape[0], 3.0)
        if self.what == "value" and bool(self.on):
            x = x.relu()
        if self.what == "draw":
            x = x * random.random()
        if self.what == "dtype" and x.dtype == torch.float32:
            x = x.relu()
        if self.what == "state":
            self.calls = len(x)
        out: Tensor = self.last(x)
        return out


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("size", NoteKind.SIZE),
        ("value", NoteKind.VALUE),
        ("draw", NoteKind.VALUE),
        ("dtype", NoteKind.DTYPE),
        ("state", NoteKind.STATE),
    ],
)
def test_a_trace_notes_what_it_lost_by_kind(what: str, kind: NoteKind) -> None:
    notes = fxprune.analyze(Noted(what), torch.randn(4, 6)).notes
    assert {note.kind for note in notes} >= {kind}
    assert all(isinstance(note, Note) for note in notes)
    assert all(str(note) == (f"{note.where}: {note.detail}" if note.where else note.detail) for note in notes)


def test_nothing_lost_is_no_note() -> None:
    assert fxprune.analyze(Noted("nothing"), torch.randn(4, 6)).notes == ()


def test_a_layer_with_hooks_for_gradients_is_lost() -> None:
    net = Noted("nothing")
    net.first.register_full_backward_hook(lambda *_: None)
    (note,) = fxprune.analyze(net, torch.randn(4, 6)).notes
    assert note.kind is NoteKind.LOST and "'first'" in note


def test_a_note_stays_whole_when_copied() -> None:
    note = Note(NoteKind.SIZE, "a number was specialised", "net.py:3")
    for twin in (copy.deepcopy(note), copy.copy(note)):
        assert twin == note == "net.py:3: a number was specialised" and (twin.kind, twin.detail, twin.where) == (
            NoteKind.SIZE,
            "a number was specialised",
            "net.py:3",
        )
