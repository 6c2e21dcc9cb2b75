"""What a trace starts from: the state before the model's first call, or the one that earlier calls left."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from fxprune.passes.ir.contents import BAGS, attributes, has_tensors, is_object, own_objects
from fxprune.passes.ir.skeleton import Skeleton
from fxprune.passes.tracing.recorder import Recorder
from fxprune.passes.tracing.side_effects.bindings import Bindings, bound_outside
from fxprune.passes.tracing.side_effects.elsewhere import Place, rebound
from fxprune.passes.tracing.side_effects.isolation import isolated
from fxprune.passes.tracing.side_effects.memos import ABSENT, caches, forget, forgotten, tables_of
from fxprune.passes.tracing.side_effects.reachable import Reach, held, reachable

GUESSED, KNOWN, KEPT = "guessed", "known", "kept"
_BEST_FIRST = (GUESSED, KNOWN, KEPT)


@dataclass(frozen=True)
class History:
    """``first``: (module or object of its own, attribute -> value before the first call). ``empty``, ``places``: see ``isolated``.

    ``level``: whether these are "known", partly "guessed", or the state is "kept" as it is.
    """

    reach: Reach
    first: list[tuple[Any, dict[str, Any]]]
    empty: list[Any]
    places: list[Place]
    level: str = KEPT
    blank: bool = False

    def forget(self) -> None:
        """Give the modules of the skeleton what they held before the first call."""
        for module, values in self.first:
            forget(module, values, self.blank)

    def isolated(self, tracer: Recorder) -> AbstractContextManager[None]:
        return isolated(tracer, self.reach, self.empty, self.places)


def past(skeleton: Skeleton, level: str) -> list[History]:
    """Where to start from, best first, none of them better than ``level``; the last one is the state as it is."""
    if skeleton.past is None:
        skeleton.past = _found(skeleton) if level != KEPT else [History(reachable(skeleton.module_names), [], [], [])]
    known: list[History] = skeleton.past
    return [one for one in known if _BEST_FIRST.index(one.level) >= _BEST_FIRST.index(level)]


def worse(level: str) -> str:
    """The level after one where what was guessed, or known, was no cache; nothing comes after the state as it is."""
    return _BEST_FIRST[min(_BEST_FIRST.index(level) + 1, len(_BEST_FIRST) - 1)]


def _of_objects(reach: Reach, outside: Bindings) -> list[Place]:
    """What objects hold that code calls by a global name or a closure: ``TABLES.get(n)``, and a decorator that is an object."""
    found = {id(value): value for value in (held(owner, name) for owner, name in reach.places.values()) if is_object(value)}
    plain = [one for one in found.values() if not isinstance(one, BAGS) and hasattr(one, "__dict__")]
    tables = [one for one in plain if has_tensors(list(vars(one).values()))]
    return [(vars(one), name, first) for one in tables for name, first in forgotten(one, reach, outside)[0].items()]


def _found(skeleton: Skeleton) -> list[History]:
    modules = list(skeleton.module_names)
    reach = reachable(modules)
    objects = {id(o): o for m in modules for o in own_objects(m)}
    owners = [*modules, *objects.values()]
    names = set().union(*map(tables_of, owners), *(one.__dict__ for one in (*reach.classes, *reach.functions)))
    outside = bound_outside(reach.functions.items(), names)
    found = [(owner, *forgotten(owner, reach, outside)) for owner in owners]
    for number in range(len(modules), len(owners)):  # of other objects, what is no tensor may be anything
        owner, *both = found[number]
        known, guessed = ({} if not has_tensors([attributes(owner)[n] for n in one]) else one for one in both)
        found[number] = owner, known, guessed
    empty, places = caches(reach), [*rebound(reach, outside), *_of_objects(reach, outside)]
    told = History(reach, [(o, one) for o, one, _ in found if one], empty, places, KNOWN)
    guessing = History(reach, [(o, one) for o, _, one in found if one], empty, places, GUESSED)
    starts = [told] if all(one == other for _, one, other in found) else [guessing, told]
    tried: list[History] = []
    for start in starts:
        blank = replace(start, blank=True)
        if start.level == GUESSED:  # of a table nobody knows whether it was there
            tried += [blank, start]
        elif start.first or empty or places:
            absent = any(value is ABSENT for _, values in start.first for value in values.values())
            tried += [start, blank] if absent else [start]
            if start.first and (empty or places):  # what is outside of the modules may be no cache: code may refuse to do it twice
                tried.append(replace(start, empty=[], places=[]))
    skeleton.has_history = bool(tried)
    return [*tried, History(reach, [], [], [])]
