"""The same result whoever scores: this process, worker processes, Ray; workers that die; scores that cannot travel."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxprune.driver import SearchConfig, run
from fxprune.driver.executors.base import LocalExecutor
from fxprune.driver.executors.choice import make
from fxprune.driver.executors.processes import ProcessExecutor
from fxprune.driver.problem import IntArray
from fxprune.errors import DependencyError, SearchError
from fxprune.testing.synthetic import Chain


class Mortal:
    """Scores by a chain, but the first worker to score takes its process down with it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark
        self.chain = Chain()

    def __call__(self, removed: IntArray) -> Mapping[str, float]:
        if not self.mark.exists():
            self.mark.write_text("died")
            os._exit(1)
        return self.chain.score(removed)


def hears_the_interrupt_key(removed: IntArray) -> Mapping[str, float]:
    """Whether the signal is let through to this process; what is blocked when it starts, before it can import anything, stays so."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, []) if hasattr(signal, "pthread_sigmask") else {signal.SIGINT}
    return {"accuracy": float(signal.SIGINT not in blocked)}


def process(removed: IntArray) -> Mapping[str, float]:
    return {"accuracy": float(os.getpid())}


class Strange:
    """A score that can be sent, but not taken."""

    def __call__(self, removed: IntArray) -> Mapping[str, float]:
        return {}

    def __reduce__(self) -> Any:
        return _lost, ()


def _lost() -> None:
    raise ImportError("no such module there")


def candidates() -> list[IntArray]:
    return [np.full(6, count) for count in range(8)]


def test_worker_processes_give_the_same_policy() -> None:
    config = SearchConfig(samples=4, rounds=2)
    alone = run(Chain().problem(), config)
    shared = run(Chain().problem(), dataclasses.replace(config, jobs=2))
    assert shared.removed.tolist() == alone.removed.tolist()
    assert shared.reward == alone.reward


def test_workers_are_deaf_and_replaced_when_they_die_and_when_the_score_changes(tmp_path: Path) -> None:
    executor = ProcessExecutor(1)  # each worker imports torch: one is enough
    try:
        survived = executor.map(Mortal(tmp_path / "mark"), candidates())
        executor.reset()
        changed = executor.map(Chain(sensitivity=np.zeros(6)).score, candidates())
        executor.reset()
        heard = executor.map(hears_the_interrupt_key, candidates())
        executor.reset()
        processes = executor.map(process, candidates())
        executor.reset()
        with pytest.raises(SearchError, match="workers cannot take the score .no such module there"):
            executor.map(Strange(), candidates())
        executor.reset()
        assert executor.map(process, candidates()) == processes  # the score changes, the workers stay
    finally:
        executor.close()
    assert (tmp_path / "mark").exists()
    assert survived == LocalExecutor().map(Chain().score, candidates())
    assert changed == [{"accuracy": 0.95}] * len(candidates())
    assert heard == [{"accuracy": 0.0}] * len(candidates())
    if hasattr(signal, "pthread_sigmask"):
        assert hears_the_interrupt_key(candidates()[0]) == {"accuracy": 1.0}  # here it is


def test_a_score_that_cannot_be_sent_is_refused() -> None:
    executor = ProcessExecutor(2)
    with pytest.raises(SearchError, match="cannot be sent to workers"):
        executor.map(lambda removed: {"accuracy": 1.0}, candidates())


def test_executors_by_name() -> None:
    assert isinstance(make(SearchConfig()), LocalExecutor)
    assert isinstance(make(SearchConfig(jobs=3)), ProcessExecutor)
    with pytest.raises(SearchError, match="unknown executor 'slurm'; use local or ray"):
        make(SearchConfig(executor="slurm"))


def test_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DependencyError, match=r"pip install 'fxprune\[ray\]'"):
        make(SearchConfig(executor="ray"))
