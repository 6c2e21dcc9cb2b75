"""Any Optuna sampler as a strategy (`optuna:TPESampler`). Needs the `optuna` extra."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fxprune.driver.problem import IntArray
from fxprune.driver.simplex import on_simplex
from fxprune.driver.strategies.base import Scored, Strategy
from fxprune.errors import DependencyError, SearchError, first_line
from fxprune.imports import needed


class OptunaStrategy(Strategy):
    """A group's weight in the allocation is one float parameter from 0 to 1; each allocation is projected onto the budget.

    Optuna's samplers keep generators of their own that cannot be read out. So the state is the list of rewards told, and a restored
    strategy runs a fresh study from the same seed and tells it the same rewards again, which costs no scoring. With
    ``SearchConfig.storage`` the study is kept there for Optuna's own tools, under ``study_name``; a study of ours by that name is replaced.
    """

    def start(self) -> None:
        self.optuna = _optuna()
        name = str(self.config.strategy).partition(":")[2]
        sampler = _sampler(self.optuna, name, self.config.seed)
        if self.config.storage is None:
            self.study = self.optuna.create_study(direction="maximize", sampler=sampler)
        else:
            self.study = _stored(self.optuna, self.config.storage, f"fxprune {name} {self.budget} seed={self.config.seed}", sampler)
        self.trials: list[Any] = []
        self.told: list[list[float]] = []

    def propose(self) -> list[IntArray]:
        if self.step >= self.steps():
            return []
        self.trials = [self.study.ask() for _ in range(self.config.samples)]
        return [self.budget.project(self.space.zeros(), on_simplex(w * self.space.units, self.config.floor)) for w in self._weights()]

    def learn(self, outcomes: Sequence[Scored]) -> None:
        self._tell([outcome.reward for outcome in outcomes])

    def steps(self) -> int:
        return self.config.rounds * (self.config.steps or 1)

    def memory(self) -> dict[str, Any]:
        return {"told": self.told}

    def recall(self, memory: dict[str, Any]) -> None:
        self.start()
        for rewards in memory["told"]:
            self.trials = [self.study.ask() for _ in rewards]
            self._weights()
            self._tell(rewards)

    def _weights(self) -> list[Any]:
        names = self.space.names
        return [np.array([trial.suggest_float(name, 0.0, 1.0) for name in names]) for trial in self.trials]

    def _tell(self, rewards: Sequence[float]) -> None:
        for trial, reward in zip(self.trials, rewards, strict=True):
            self.study.tell(trial, reward)
        self.told.append([float(reward) for reward in rewards])


def named(name: str) -> type[Strategy]:
    """The strategy class for `optuna:NAME`; raises now if Optuna, the sampler or what it needs is missing, not half-way."""
    optuna = _optuna()
    study = optuna.create_study(sampler=_sampler(optuna, name, 0))
    try:
        for _ in range(2):  # some samplers load what they need when they have seen a trial
            trial = study.ask()
            study.tell(trial, trial.suggest_float("a", 0.0, 1.0) + trial.suggest_float("b", 0.0, 1.0))
    except ImportError as error:
        raise DependencyError(f"Optuna's {name} needs another package: {error}; install it with pip") from error
    return OptunaStrategy


def _optuna() -> Any:
    optuna = needed("optuna", "an optuna strategy", "optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _stored(optuna: Any, storage: str, study_name: str, sampler: Any) -> Any:
    """A fresh study in ``storage``. Raises ``SearchError`` where it cannot be opened, or a study of that name is not ours."""
    databases = importlib.import_module("sqlalchemy.exc")  # a dependency of Optuna's, which does not wrap all its errors
    try:
        if study_name in optuna.get_all_study_names(storage):
            if "fxprune" not in optuna.load_study(study_name=study_name, storage=storage).user_attrs:
                raise SearchError(f"the storage {storage!r} holds a study {study_name!r} that fxprune did not make; name another storage")
            optuna.delete_study(study_name=study_name, storage=storage)
        study = optuna.create_study(direction="maximize", sampler=sampler, storage=storage, study_name=study_name)
    except (optuna.exceptions.OptunaError, ImportError, ValueError, databases.SQLAlchemyError) as error:
        raise SearchError(f"Optuna cannot use the storage {storage!r}: {first_line(error)}") from error
    study.set_user_attr("fxprune", True)
    return study


def _sampler(optuna: Any, name: str, seed: int) -> Any:
    kind = getattr(optuna.samplers, name, None)
    if kind is None or not name.endswith("Sampler"):
        known = ", ".join(sorted(n for n in dir(optuna.samplers) if n.endswith("Sampler") and n != "BaseSampler"))
        raise SearchError(f"Optuna has no sampler {name!r}; it has {known}")
    try:
        return kind(seed=seed)
    except ImportError as error:
        raise DependencyError(f"Optuna's {name} needs another package: {error}") from error
    except TypeError as error:
        raise SearchError(f"Optuna's {name} cannot be made from a seed alone ({error}); choose another sampler") from error
