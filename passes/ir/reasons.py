"""Why channels stay: facts with a kind, whose text is for people. Nothing reads the wording."""

from __future__ import annotations

from enum import Enum
from typing import Any


class ReasonKind(Enum):
    """What holds channels, or fixes the size of a tensor."""

    OPERATION = "the operation needs all of the channels together"
    INPUT = "a tensor that comes from outside"
    OUTPUT = "a tensor that goes outside"
    PARAMETER = "a parameter, buffer or constant"
    COMPUTED = "the result of an operation"
    FIXED_SIZE = "the size of something without channels"
    SINGLE_UNIT = "everything is tied into one unit"
    IGNORED = "the user said so"
    NO_RULE = "an operation without a rule"
    RULE_FAILED = "a rule that raised an error"
    UNTRACED = "code that could not be traced"
    UNUSED = "nothing reads it"
    PYTHON = "Python code reads the values"
    STRUCTURE = "a dimension that is never pruned: a vocabulary, a kernel's width"
    COMPUTED_INDEX = "an index that the graph computes"
    ASSIGNED = "a write into a part"
    WRITTEN_IN_PLACE = "a strided write in place"
    TWO_INDICES = "two lists index at once"
    FLAT = "a movement over the flattened tensor"
    FOLDED = "other channels on the same axis"
    STATISTIC = "a statistic over channels"
    CHOICE = "a choice among channels, or the positions of what was chosen"
    EXPERTS = "experts, which go whole where experts=True says so"


class Reason(str):
    """Why channels stay, why a tensor has a fixed size, or what pruning them changes.

    As a string it is the sentence for people. ``detail``: the sentence without place and cause. ``operation``, ``where``: the operation
    that holds the channels and its line. ``because``: the reason that this one rests on. ``name``: of the input or the parameter it is
    about. ``part``: the part of the model, where only parts could be traced. ``exact``: of a statistic, whether ``norms="exact"`` keeps it.
    ``masked``: of a statistic, the norms for which it is that of the original where removed channels count as minus infinity (nobody
    chooses them, and they have no share of a softmax).
    """

    kind: ReasonKind
    detail: str
    operation: str
    where: str
    because: Reason | None
    name: str
    part: str
    exact: bool
    masked: frozenset[str]

    def __new__(
        cls,
        kind: ReasonKind,
        detail: str,
        *,
        operation: str = "",
        where: str = "",
        because: Reason | None = None,
        name: str = "",
        part: str = "",
        exact: bool = False,
        masked: frozenset[str] = frozenset(),
    ) -> Reason:
        place = f" at {operation}" + (f" ({where})" if where else "") if operation else ""
        made = super().__new__(cls, f"{detail} ({because})" + place if because else detail + place)
        made.kind, made.detail, made.operation, made.where, made.because = kind, detail, operation, where, because
        made.name, made.part, made.exact, made.masked = name, part, exact, masked
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {key: getattr(self, key) for key in ("operation", "where", "because", "name", "part", "exact", "masked")}
        return (self.kind, self.detail), named

    @property
    def general(self) -> str:
        """The sentence without the place and the name of a part, equal for all groups that are held for the same reason."""
        text = f"{self.detail} ({self.because})" if self.because else self.detail
        return text.replace(f"of {self.root.part!r}, a part", "of a part") if self.root.part else text

    @property
    def root(self) -> Reason:
        """The reason at the end of the chain of causes."""
        return self if self.because is None else self.because.root


_AS_IT_MUST = frozenset({ReasonKind.SINGLE_UNIT, ReasonKind.STRUCTURE, ReasonKind.UNUSED})


def is_as_it_must_be(reason: Reason) -> bool:
    """Whether channels stay for this reason in every network: outputs, inputs, a vocabulary, what is a single unit, what nothing reads."""
    ends = reason.kind is ReasonKind.OUTPUT or reason.root.kind is ReasonKind.INPUT
    return reason.kind in _AS_IT_MUST or (ends and not reason.root.part)
