"""Conditions that only guard a ``raise`` or an ``assert``: a run that ends goes the other way, and so does its trace."""

from __future__ import annotations

import dis
import functools
from types import CodeType, FrameType

NOT_KEPT = "a check of values, which raises an error, cannot be kept in a graph; the slim module computes without it"
OF_VALUES = "depends on the values of a tensor, not only on its shape; what only prints or logs can be left out of forward"
_LOCALS = frozenset({"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW"})
_LONGEST = 100  # instructions that make an error's text, at most


def goes_on(frame: FrameType) -> bool | None:
    """The answer with which ``frame``, which asks a condition, does not raise at once; None where either answer may go on, or neither."""
    nones = frozenset(name for name, value in frame.f_locals.items() if value is None)
    return _answers(frame.f_code, nones).get(frame.f_lasti)


def is_made_again(frame: FrameType, answer: bool) -> bool:
    """Whether ``frame`` goes on with ``answer``, and raises otherwise what the view that it makes next would: einops' check of sizes."""
    return str(frame.f_globals.get("__name__", "")).startswith("einops.") and goes_on(frame) is answer


@functools.lru_cache(maxsize=1024)
def _answers(code: CodeType, nones: frozenset[str]) -> dict[int, bool]:
    """For every instruction that asks for a truth value before a jump that decides between a raise and going on: the latter's answer.
    ``nones``: the local names that hold None, for a branch that raises where an argument was given, or was not."""
    steps = list(dis.get_instructions(code))
    at = {step.offset: number for number, step in enumerate(steps)}
    handled = _handled(code, steps)
    found = {}
    for number, step in enumerate(steps):
        if not step.opname.startswith("POP_JUMP") or not step.opname.endswith(("IF_TRUE", "IF_FALSE")) or step.argval not in at:
            continue
        jumps, falls = (_raises(steps, start, handled, at, nones) for start in (at[step.argval], number + 1))
        if jumps != falls:
            answer = step.opname.endswith("IF_TRUE") is not jumps
            asked = number - 1 if steps[number - 1].opname == "TO_BOOL" else number
            found[steps[asked].offset] = answer
            while steps[asked - 1].opname.startswith(("CALL", "PRECALL")):  # bool(x); which of the two calls depends on how often it ran
                asked -= 1
                found[steps[asked].offset] = answer
    return found


def _raises(steps: list[dis.Instruction], start: int, handled: set[int], at: dict[int, int], nones: frozenset[str]) -> bool:
    """Whether the code from ``start`` on does nothing but raise, where this code does not catch it."""
    number = start
    while number < min(start + _LONGEST, len(steps)):
        step = steps[number]
        asked = steps[number - 1]
        number += 1
        if step.opname == "RAISE_VARARGS":
            return step.offset not in handled
        if step.opname == "JUMP_FORWARD" and step.argval in at:  # to the error of a chain, ``0 <= x <= 1``
            number = at[step.argval]
            continue
        if step.opname.endswith("NONE") and "BACKWARD" not in step.opname and asked.opname in _LOCALS and step.argval in at:
            if (asked.argval in nones) is not step.opname.endswith("NOT_NONE"):
                number = at[step.argval]
            continue
        if "JUMP" in step.opname or step.opname.startswith(("STORE", "DELETE", "RETURN", "YIELD", "FOR_ITER", "SEND", "SETUP")):
            return False
    return False


def _handled(code: CodeType, steps: list[dis.Instruction]) -> set[int]:
    """The instructions whose errors this code may catch."""
    if any(step.opname.startswith("SETUP") for step in steps):  # Python 3.10 has no table of them
        return {step.offset for step in steps}
    entries = getattr(dis.Bytecode(code), "exception_entries", ())
    return {step.offset for step in steps for entry in entries if entry.start <= step.offset < entry.end}
