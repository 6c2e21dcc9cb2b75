"""Search strategies by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxprune.driver.strategies import optuna
from fxprune.driver.strategies.base import Scored, Strategy
from fxprune.driver.strategies.magnitude import Magnitude
from fxprune.driver.strategies.random import Random
from fxprune.driver.strategies.rl.rl_pruner import RLPruner
from fxprune.driver.strategies.table import Table
from fxprune.driver.strategies.uniform import Uniform
from fxprune.errors import SearchError
from fxprune.imports import by_path

STRATEGIES: Mapping[str, type[Strategy]] = {
    "rl-pruner": RLPruner,
    "table": Table,
    "uniform": Uniform,
    "random": Random,
    "magnitude": Magnitude,
}


def find(chosen: Any) -> type[Strategy]:
    """The strategy class for a name, `optuna:SAMPLER`, `module:Class`, or a class. Raises ``SearchError`` for anything else."""
    if isinstance(chosen, str) and chosen in STRATEGIES:
        return STRATEGIES[chosen]
    if isinstance(chosen, str) and chosen.startswith("optuna:"):
        return optuna.named(chosen.partition(":")[2])
    found = by_path(chosen, "strategy", SearchError) if isinstance(chosen, str) and ":" in chosen else chosen
    if isinstance(found, type) and issubclass(found, Strategy):
        return found
    known = ", ".join(STRATEGIES)
    raise SearchError(f"unknown strategy {chosen!r}; use one of {known}, optuna:SAMPLER, or module:Class of a fxprune.driver.Strategy")


__all__ = ["STRATEGIES", "Magnitude", "Scored", "RLPruner", "Random", "Strategy", "Table", "Uniform", "find"]
