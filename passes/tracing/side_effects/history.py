"""What a trace starts from: the state before the model's first call, or the one that earlier calls left."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fxprune.passes.ir.skeleton import Skeleton
from fxprune.passes.tracing.recorder import Recorder
from fxprune.passes.tracing.side_effects.isolation import isolated
from fxprune.passes.tracing.side_effects.memos import ABSENT, caches, forget, forgotten, has_tensors, own_objects, rebound
from fxprune.passes.tracing.side_effects.reachable import Reach, reachable


@dataclass(frozen=True)
class History:
    """``first``: (module or object of its own, attribute -> value before the first call). ``empty``, ``globals``: see ``isolated``."""

    reach: Reach
    first: list[tuple[Any, dict[str, Any]]]
    empty: list[Any]
    globals: list[tuple[dict[str, Any], str, Any]]
    blank: bool = False

    def forget(self) -> None:
        """Give the modules of the skeleton what they held before the first call."""
        for module, values in self.first:
            forget(module, values, self.blank)

    def isolated(self, tracer: Recorder) -> AbstractContextManager[None]:
        return isolated(tracer, self.reach, self.empty, self.globals)


def past(skeleton: Skeleton, wanted: bool) -> list[History]:
    """Where to start from, best first; the last one is the state as it is."""
    if skeleton.past is not None:  # of a model that is traced in parts
        return list(skeleton.past) if wanted else skeleton.past[-1:]
    reach = reachable(skeleton.module_names)
    kept = History(reach, [], [], [])
    if not wanted:
        return [kept]
    modules = list(skeleton.module_names)
    first = [(m, values) for m in modules if (values := forgotten(m, reach))]
    objects = {id(o): o for m in modules for o in own_objects(m)}
    first += [(o, values) for o in objects.values() if (values := forgotten(o, reach)) and has_tensors([o.__dict__[n] for n in values])]
    empty, bound = caches(reach), rebound(reach)
    skeleton.has_history = bool(first or empty or bound)
    found = [kept]
    if skeleton.has_history:
        found = [History(reach, first, empty, bound), kept]
        if any(value is ABSENT for _, values in first for value in values.values()):
            found.insert(1, History(reach, first, empty, bound, blank=True))
    skeleton.past = found
    return list(found)
