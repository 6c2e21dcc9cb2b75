"""Numbers that code computes of sizes by more than operators: roots, roundings and extremes stay in the graph as they stand in the code.

Python wants a number of its own from ``int(x)``, so that a proxy cannot answer; what the user's code finds under such names answers
instead, for the time of a trace. Everything that no size of an input enters is computed at once, as ever.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fxprune.passes.tracing.recorder import Recorder
from fxprune.passes.tracing.side_effects.reachable import codes

OF_MATH = ("sqrt", "isqrt", "log", "log2", "log10", "exp", "pow")
_OF_MATH = tuple(getattr(math, name) for name in OF_MATH)  # as they are when no trace has replaced them
RECORDED = frozenset((int, float, max, min, *_OF_MATH))  # what a graph calls of these it was recorded to call
_CALLS = sys.version_info >= (3, 11)  # since then an opcode says whether a global is called
_BETWEEN = frozenset({"CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL", "NOP"})
_OF_TUPLES = frozenset({"LOAD_GLOBAL", "BUILD_TUPLE"})  # ``type(x) in (int, float)``


def recorded(tracer: Recorder, original: Any) -> Callable[..., Any]:
    """A function of numbers that is recorded where a size of the input is among them."""

    def call(*args: Any) -> Any:
        if tracer.recording and any(map(tracer.moves, args)):
            return tracer.create_proxy("call_function", original, args, {})
        return original(*args)

    return call


def _extreme(tracer: Recorder, original: Any) -> Callable[..., Any]:
    """``max`` or ``min`` of numbers, one by one or in a list."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.recording and len(args) == 1 and builtins.isinstance(args[0], Iterator):
            args = (list(args[0]),)  # which is read once
        parts = args if len(args) > 1 else args[0] if args and builtins.isinstance(args[0], (tuple, list)) else ()
        if tracer.recording and not kwargs and len(parts) > 1 and any(map(tracer.moves, parts)):
            return tracer.create_proxy("call_function", original, tuple(parts), {})
        return original(*args, **kwargs)

    return call


def _kind(tracer: Recorder, original: Any) -> Any:
    """``int`` or ``float``: called, and asked whether a value is one."""

    class Kind(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if tracer.recording and len(args) == 1 and not kwargs and (tracer.moves(args[0]) or tracer.follows(args[0])):
                return tracer.create_proxy("call_function", original, args, {})
            return original(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return builtins.isinstance(instance, original)

        def __subclasscheck__(cls, subclass: Any) -> bool:
            return issubclass(subclass, original)

        def __getattr__(cls, name: str) -> Any:
            return getattr(original, name)

        def __eq__(cls, other: Any) -> bool:
            return other is cls or other is original

        def __hash__(cls) -> int:
            return hash(original)

    return Kind(original.__name__, (), {})


_STAND_INS: dict[str, Callable[[Recorder, Any], Any]] = {"int": _kind, "float": _kind, "max": _extreme, "min": _extreme}


def stand_ins(tracer: Recorder, functions: Iterable[types.FunctionType]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """What to put under which name of which globals, so that ``functions`` find it rather than what is built in."""
    spaces: dict[int, tuple[dict[str, Any], set[str]]] = {}
    spared: set[tuple[int, str]] = set()
    for function in functions:
        space = function.__globals__
        _, names = spaces.setdefault(id(space), (space, set()))
        for code in codes(function.__code__):
            names |= _STAND_INS.keys() & set(code.co_names)
            spared |= {(id(space), name) for name in {"int", "float"} & set(code.co_names) if not _only_calls(code, name)}
    made = {name: make(tracer, getattr(builtins, name)) for name, make in _STAND_INS.items()}
    for key, (space, names) in spaces.items():
        yield from ((space, name, made[name]) for name in sorted(names - space.keys()) if (key, name) not in spared)
    known = {original: recorded(tracer, original) for original in _OF_MATH}
    for space, _ in spaces.values():
        for name, value in list(space.items()):
            if type(value) is types.BuiltinFunctionType and value in known:
                yield space, name, known[value]


@functools.lru_cache(4096)
def _only_calls(code: types.CodeType, name: str) -> bool:
    """Whether a stand-in can answer for a global in the code: it is called, mapped over numbers or compared, or ``isinstance`` is asked."""
    if {"isinstance", "issubclass"} & set(code.co_names):
        return True
    if not _CALLS:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in _BETWEEN]
    for at, step in enumerate(steps):
        if step.opname != "LOAD_GLOBAL" or step.argval != name or step.arg is None or step.arg & 1:
            continue
        before, after = steps[at - 1], next((one.opname for one in steps[at + 1 :] if one.opname not in _OF_TUPLES), "")
        mapped = before.opname == "LOAD_GLOBAL" and before.argval == "map" and bool((before.arg or 0) & 1)
        if not mapped and after not in ("COMPARE_OP", "CONTAINS_OP") and (after != "IS_OP" or "type" not in code.co_names):
            return False
    return True
