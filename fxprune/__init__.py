"""fxprune: structured pruning of PyTorch networks as a torch.fx compiler pass.

``analyze`` finds which channels go together, ``compress`` removes them, ``search`` finds how many to take from where, ``distill`` trains
what is left, ``save`` and ``load`` keep it without pickle, ``visualize`` prints what was found, ``explain`` says what is locked and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxprune.api import analyze, compress, record
from fxprune.costs.profiling import profile
from fxprune.errors import FxPruneError, PruningWarning, VerificationError
from fxprune.evaluation.synthetic import synthetic_batches
from fxprune.exporting.folding import fold_batchnorm
from fxprune.files.applying import apply
from fxprune.files.slim_file import load, rebuild, save
from fxprune.importance.registry import Criterion, register_criterion
from fxprune.importance.sparse_training import regularize
from fxprune.passes.rules import LayerSpec, register_layer, register_op
from fxprune.policies import Policy
from fxprune.repair.registry import register_repair
from fxprune.training.distillation import DistillConfig, distill
from fxprune.training.hints import Hint
from fxprune.training.rebinding import rebind

if TYPE_CHECKING:
    from fxprune.driver import SearchConfig
    from fxprune.exporting.exporter import Exported, export
    from fxprune.exporting.formats import Format, register_format
    from fxprune.report.explaining import Explanation, explain
    from fxprune.report.visualising import visualize
    from fxprune.searching.gradual import GradualPruning
    from fxprune.searching.result import SearchResult, search
    from fxprune.searching.shrinking import shrink

__version__ = "0.1.0"

__all__ = [
    "Criterion",
    "DistillConfig",
    "Explanation",
    "Exported",
    "Format",
    "FxPruneError",
    "GradualPruning",
    "Hint",
    "LayerSpec",
    "Policy",
    "PruningWarning",
    "SearchConfig",
    "SearchResult",
    "VerificationError",
    "analyze",
    "apply",
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
    "register_criterion",
    "register_format",
    "register_layer",
    "register_op",
    "register_repair",
    "regularize",
    "save",
    "search",
    "shrink",
    "synthetic_batches",
    "visualize",
]

# rich and the search driver are loaded when they are first asked for.
_LATER = {
    "Explanation": "fxprune.report.explaining",
    "Exported": "fxprune.exporting.exporter",
    "Format": "fxprune.exporting.formats",
    "GradualPruning": "fxprune.searching.gradual",
    "SearchConfig": "fxprune.driver",
    "SearchResult": "fxprune.searching.result",
    "explain": "fxprune.report.explaining",
    "export": "fxprune.exporting.exporter",
    "register_format": "fxprune.exporting.formats",
    "search": "fxprune.searching.result",
    "shrink": "fxprune.searching.shrinking",
    "visualize": "fxprune.report.visualising",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)
