"""fxprune: structured pruning as a torch.fx compiler pass."""

from fxprune.api import analyze, compress, record
from fxprune.errors import FxPruneError, VerificationError
from fxprune.passes.rules import register_op
from fxprune.policies import Policy

__all__ = ["FxPruneError", "Policy", "VerificationError", "analyze", "compress", "record", "register_op"]
