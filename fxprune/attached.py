"""What a slim module carries besides its weights: the record of its pruning, and which parameters its own were sliced from.

Both lie in the module's ``__dict__``, so that ``copy.deepcopy`` and pickles take them along; only this file reads and writes them there.
The pickle of a module of the user's own class must not need fxprune, so what lies there is then pickled as dicts (``files.record_json``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from fxprune.records import PruningRecord

readers: list[Callable[[Any], PruningRecord]] = []  # how a record is read that was pickled as a dict
RECORD, SOURCES = "_record", "_sources"
References = dict[str, "weakref.ref[nn.Parameter]"]


class Sources:
    """Which parameters a slim module's were sliced from: those of the module that was pruned, and those of the outermost original.

    They are held weakly, so that a slim module keeps no original alive; an optimiser holds its own. Copies share them, pickles drop them.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        parameters = () if model is None else model.named_parameters()
        self.pruned: References = {name: weakref.ref(parameter) for name, parameter in parameters}
        earlier = None if model is None else model.__dict__.get(SOURCES)
        known: References = earlier.original if isinstance(earlier, Sources) else {}
        self.original: References = known or self.pruned

    def __deepcopy__(self, memo: dict[int, Any]) -> Sources:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


def attach(module: nn.Module, record: PruningRecord, sources: Sources | None = None) -> None:
    """Make ``record`` the record of ``module``; ``sources``, where given, too."""
    module.__dict__[RECORD] = record
    if sources is not None:
        module.__dict__[SOURCES] = sources


def record_of(module: Any) -> PruningRecord | None:
    """The pruning record of a module; None for one that fxprune did not make. ``fxprune.record`` raises there instead."""
    found = getattr(module, RECORD, None)
    if isinstance(found, dict) and readers:
        found = module.__dict__[RECORD] = readers[0](found)
    return found if isinstance(found, PruningRecord) else None


def sources_of(module: nn.Module) -> Sources:
    """The parameters that those of ``module`` were sliced from; none for a module that came from a file or a pickle."""
    found = getattr(module, SOURCES, None)
    return found if isinstance(found, Sources) else Sources()
