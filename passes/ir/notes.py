"""What a user should know of a trace or a rewrite: sentences with a kind. Nothing reads the wording."""

from __future__ import annotations

from enum import Enum
from typing import Any


class NoteKind(Enum):
    """What a note is about."""

    SIZE = "the slim module holds for the sizes of the example alone"
    VALUE = "the slim module holds for the values that a tensor had, or for what was drawn"
    DTYPE = "the slim module holds for the example's dtype"
    STATE = "state that forward keeps or sets"
    LOST = "something of the model that a graph does not keep"
    MODE = "training and evaluation mode"
    PARTS = "only parts of the model were traced"
    OUTPUTS = "what the slim module returns with fewer channels than the original"
    ATTRIBUTE = "an attribute of the user's class that was set"


class Note(str):
    """One note. As a string it is the sentence for people; ``detail`` is the sentence without the place, ``where`` file:line or empty."""

    kind: NoteKind
    detail: str
    where: str

    def __new__(cls, kind: NoteKind, detail: str, where: str = "") -> Note:
        made = super().__new__(cls, f"{where}: {detail}" if where else detail)
        made.kind, made.detail, made.where = kind, detail, where
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.kind, self.detail, self.where)
