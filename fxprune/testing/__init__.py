"""What a strategy, an importance, a rule or a layer of your own must pass, to be called from your tests; fxprune's own pass the same.

``assert_sound`` for rules and layers, ``StrategyContract`` for strategies, ``assert_ranks`` for importances.
"""

from fxprune.testing.ranking import assert_ranks
from fxprune.testing.soundness import assert_sound
from fxprune.testing.strategies import StrategyContract

__all__ = ["StrategyContract", "assert_ranks", "assert_sound"]
