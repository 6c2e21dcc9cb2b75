"""Every strategy keeps the contract that ``fxprune.testing`` ships. A new one is accepted by adding its name to ``NAMES``."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxprune.driver import Scored, SearchConfig, Strategy
from fxprune.driver.budget import Budget
from fxprune.driver.problem import IntArray
from fxprune.driver.strategies import find
from fxprune.errors import SearchError
from fxprune.testing import StrategyContract
from fxprune.testing import strategies as contract
from fxprune.testing.strategies import trials
from fxprune.testing.synthetic import Chain

OPTUNA = ("optuna:TPESampler", "optuna:NSGAIISampler", "optuna:CmaEsSampler")
NAMES = ["rl-pruner", "uniform", "random", "magnitude", "tests.driver.test_strategies:Climb", *OPTUNA]


class Climb(Strategy):
    """A user's own strategy: moves one unit at a time from where the best candidate lies."""

    def start(self) -> None:
        self.best: Scored | None = None

    def propose(self) -> list[IntArray]:
        if self.step >= 6:
            return []
        base = self.budget.uniform() if self.best is None else self.best.removed
        return [self.budget.fitted(np.maximum(base + self.rng.integers(-2, 3, len(base)), 0)) for _ in range(4)]

    def learn(self, outcomes: Sequence[Scored]) -> None:
        self.best = max([*outcomes, *([self.best] if self.best else [])], key=lambda outcome: outcome.reward)

    def memory(self) -> dict[str, object]:
        return {} if self.best is None else {"removed": self.best.removed.tolist(), "reward": self.best.reward}

    def recall(self, memory: dict[str, object]) -> None:
        if memory:
            self.best = Scored(np.array(memory["removed"], dtype=np.int64), float(str(memory["reward"])), {})


def made(name: str, **options: Any) -> tuple[Strategy, Chain]:
    if name.startswith("optuna:"):
        pytest.importorskip("optuna", reason="the optuna extra is not installed")
        if "CmaEs" in name:
            pytest.importorskip("cmaes", reason="the optuna extra is not installed")
    return contract.made(name, **options)


def digest(name: str) -> str:
    """A fingerprint of a strategy's trials; run in other processes too."""
    return hashlib.sha256(json.dumps(trials(*made(name))).encode()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("promise", [name for name in vars(StrategyContract) if name.startswith("test_")])
def test_the_contract(name: str, promise: str) -> None:
    made(name)  # skips where a package is missing
    suite = StrategyContract()
    suite.strategy, suite.seeded = name, name not in ("uniform", "magnitude")
    getattr(suite, promise)()


def test_the_contract_has_all_its_promises() -> None:
    assert len([name for name in vars(StrategyContract) if name.startswith("test_")]) == 4


def test_same_trials_in_another_process_with_another_hash_seed() -> None:
    names = [name for name in NAMES if not name.startswith("optuna:") or _has_optuna()]
    code = f"from tests.driver.test_strategies import digest\nfor name in {names!r}: print(digest(name))"
    env = {**os.environ, "PYTHONHASHSEED": "4242"}  # this process has a random one
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [digest(name) for name in names]


def _has_optuna() -> bool:
    try:
        import cmaes  # noqa: F401
        import optuna  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_sampler_whose_package_is_missing_is_told_before_the_search() -> None:
    pytest.importorskip("optuna", reason="the optuna extra is not installed")
    hidden = "import sys; sys.modules['cmaes'] = None\n"  # in a process of its own: Optuna keeps what it has loaded
    code = f"{hidden}from fxprune.driver.strategies import find\nfind('optuna:CmaEsSampler')"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("fxprune.errors.DependencyError: Optuna's CmaEsSampler needs another package: ")


def test_an_optuna_study_is_kept_in_its_storage_and_replayed_there(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="the optuna extra is not installed")
    storage = f"sqlite:///{tmp_path}/study.db"
    strategy, chain = made("optuna:TPESampler", storage=storage)
    in_memory = trials(*made("optuna:TPESampler"))
    first = trials(strategy, chain, rounds=3)
    (name,) = optuna.get_all_study_names(storage)
    assert len(optuna.load_study(study_name=name, storage=storage).trials) == len(first)
    again, chain = made("optuna:TPESampler", storage=storage)
    again.restore(strategy.state())
    assert first + trials(again, chain) == in_memory
    assert len(optuna.load_study(study_name=name, storage=storage).trials) == len(in_memory)


def test_a_storage_that_optuna_cannot_use_is_told(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="the optuna extra is not installed")
    for storage in ("nonsense", f"sqlite:///{tmp_path}/no/such/folder.db"):
        with pytest.raises(SearchError, match="cannot use the storage"):
            made("optuna:TPESampler", storage=storage)
    storage = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(storage=storage, study_name="fxprune TPESampler macs=0.5 seed=7")
    with pytest.raises(SearchError, match="fxprune did not make"):
        made("optuna:TPESampler", storage=storage)


@pytest.mark.parametrize("name", ["", "rl", "optuna:NoSampler", "fxprune.testing.synthetic:Chain", "no.such.module:Thing"])
def test_unknown_strategies_are_refused_with_what_there_is(name: str) -> None:
    if name.startswith("optuna:"):
        pytest.importorskip("optuna", reason="the optuna extra is not installed")
    with pytest.raises(SearchError):
        find(name)


def test_proposals_out_of_bounds_are_caught() -> None:
    class Greedy(Strategy):
        def propose(self) -> list[IntArray]:
            return [self.space.units]

        def learn(self, outcomes: Sequence[Scored]) -> None:
            """Never reached."""

    chain = Chain()
    config = SearchConfig()
    strategy = Greedy(Budget(chain.problem().space, config.points[0]), config)
    with pytest.raises(SearchError, match="'layer0' would lose 32 units; it may lose 0 to 31"):
        strategy.ask()
