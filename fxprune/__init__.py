"""fxprune: structured pruning of PyTorch networks as a torch.fx compiler pass.

``analyze`` finds which channels go together, ``compress`` removes them, ``search`` finds how many to take from where, ``distill`` trains
what is left, ``save`` and ``load`` keep it without pickle, ``visualize`` prints what was found, ``explain`` says what is locked and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxprune.api import analyze, compress, record
from fxprune.distillation import DistillConfig, distill
from fxprune.errors import FxPruneError, VerificationError
from fxprune.files import load, rebuild, save
from fxprune.folding import fold_batchnorm
from fxprune.hints import Hint
from fxprune.passes.rules import register_op
from fxprune.policies import Policy
from fxprune.profiling import profile
from fxprune.rebinding import rebind

if TYPE_CHECKING:
    from fxprune.display import visualize
    from fxprune.driver import SearchConfig
    from fxprune.explaining import Explanation, explain
    from fxprune.exporting import Exported, export
    from fxprune.searching import SearchResult, search
    from fxprune.shrinking import shrink

__version__ = "0.1.0"

__all__ = [
    "DistillConfig",
    "Explanation",
    "Exported",
    "FxPruneError",
    "Hint",
    "Policy",
    "SearchConfig",
    "SearchResult",
    "VerificationError",
    "analyze",
    "compress",
    "distill",
    "explain",
    "export",
    "fold_batchnorm",
    "load",
    "profile",
    "rebind",
    "rebuild",
    "record",
    "register_op",
    "save",
    "search",
    "shrink",
    "visualize",
]

# rich and the search driver are loaded when they are first asked for.
_LATER = {
    "Explanation": "fxprune.explaining",
    "Exported": "fxprune.exporting",
    "SearchConfig": "fxprune.driver",
    "SearchResult": "fxprune.searching",
    "explain": "fxprune.explaining",
    "export": "fxprune.exporting",
    "search": "fxprune.searching",
    "shrink": "fxprune.shrinking",
    "visualize": "fxprune.display",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)
