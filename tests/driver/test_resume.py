"""Nothing is lost: a search killed after any round, or in the middle of one, ends as the uninterrupted one does, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fxprune.driver import Problem, SearchConfig, SearchOutcome, run
from fxprune.driver.problem import IntArray
from fxprune.errors import SearchError
from fxprune.testing.synthetic import Chain


class Killed(BaseException):
    """Stands for a kill: nothing in the search may catch it."""


def dying(problem: Problem, after: int) -> Problem:
    """The same problem, whose score kills the process on its ``after``-th call."""
    calls = 0

    def score(removed: IntArray) -> Mapping[str, float]:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return problem.score(removed)

    return dataclasses.replace(problem, score=score)


def told(outcome: SearchOutcome) -> Any:
    """All of an outcome but the clock."""
    records = json.loads(json.dumps([outcome.state(), *(point.state() for point in outcome.pareto)]))
    for record in records:
        for step in record["history"]:
            del step["seconds"]
            step.pop("recover_seconds", None)
    return records


CONFIGS: dict[str, dict[str, Any]] = {
    "rl-pruner": {"steps": 3, "epsilon": 0.9, "epsilon_share": 1.0, "depth": 2},
    "paper": {"step_by": "units", "steps": None, "step_ratio": 0.1, "noise": 0.04, "noise_relative": False, "clip": 0.25},
    "random": {"strategy": "random"},
    "pareto": {"targets": "macs=0.7,0.4"},
    "uniform": {"strategy": "uniform"},
    "optuna": {"strategy": "optuna:TPESampler"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_resumed_search_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    if name == "optuna":
        pytest.importorskip("optuna", reason="the optuna extra is not installed")
    config = SearchConfig(**{"samples": 3, "rounds": 3, "seed": 5, **CONFIGS[name]})
    whole = run(Chain().problem(), config)
    for after in range(0, whole.evaluations, 4):
        folder = tmp_path / str(after)
        with pytest.raises(Killed):
            run(dying(Chain().problem(), after), config, checkpoint_dir=folder)
        assert told(run(Chain().problem(), config, checkpoint_dir=folder, resume=True)) == told(whole)


def test_killed_again_and_again(tmp_path: Path) -> None:
    config = SearchConfig(samples=3, rounds=3, steps=3)
    whole = run(Chain().problem(), config)
    scored = resumed = 0
    while True:
        try:
            ended = run(dying(Chain().problem(), 5), config, checkpoint_dir=tmp_path, resume=resumed > 0)
            break
        except Killed:
            resumed += 1
            scored += 5
    assert resumed >= 3
    assert told(ended) == told(whole)
    assert scored <= 3 * whole.evaluations  # only the round that was cut is scored again


def test_a_finished_search_resumes_to_its_outcome_without_scoring(tmp_path: Path) -> None:
    config = SearchConfig(samples=3, rounds=2)
    whole = run(Chain().problem(), config, checkpoint_dir=tmp_path)
    assert told(run(dying(Chain().problem(), 0), config, checkpoint_dir=tmp_path, resume=True)) == told(whole)


def test_the_first_checkpoint_is_there_before_any_score(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(dying(Chain().problem(), 0), SearchConfig(seed=3), checkpoint_dir=tmp_path)
    state = json.loads((tmp_path / "search.json").read_text())
    assert state["config"]["seed"] == 3
    assert state["evaluations"] == 0


def test_recovered_weights_are_kept(tmp_path: Path) -> None:
    class Trained:
        """A network whose training adds to its accuracy."""

        def __init__(self) -> None:
            self.gain = 0.0
            self.chain = Chain()

        def problem(self) -> Problem:
            return dataclasses.replace(
                self.chain.problem(),
                score=lambda removed: {"accuracy": self.chain.score(removed)["accuracy"] + self.gain},
                recover=self.recover,
                save_weights=self.save,
                load_weights=self.load,
            )

        def recover(self, removed: IntArray) -> None:
            self.gain += 0.001 * float(removed.sum())

        def save(self, path: Path) -> None:
            path.write_text(repr(self.gain))

        def load(self, path: Path) -> None:
            self.gain = float(path.read_text())

    config = SearchConfig(samples=3, rounds=2, steps=4, recover_every=1)
    whole = run(Trained().problem(), config)
    for after in range(3, whole.evaluations, 5):
        folder = tmp_path / str(after)
        with pytest.raises(Killed):
            run(dying(Trained().problem(), after), config, checkpoint_dir=folder)
        (folder / "weights-0-9.part").mkdir()  # in which weights were being written
        assert told(run(Trained().problem(), config, checkpoint_dir=folder, resume=True)) == told(whole)
        assert len(list(folder.glob("weights-*"))) == 1


class Timed:
    """A network whose latency comes out differently whenever it is measured."""

    def __init__(self, first: float) -> None:
        self.next, self.chain, self.seen = first, Chain(), set[tuple[int, ...]]()
        self.wholes: dict[str, float] = {}

    def problem(self) -> Problem:
        return dataclasses.replace(self.chain.problem(), cost=lambda removed: Costs(self, removed), measured=self.wholes)


class Costs(Mapping[str, float]):
    def __init__(self, timed: Timed, removed: IntArray) -> None:
        self.timed, self.removed, self.known = timed, removed, timed.chain.cost(removed)

    def __getitem__(self, name: str) -> float:
        if name != "latency":
            return self.known[name]
        self.timed.wholes.setdefault("latency", self.timed.next)
        self.timed.next += 1e-6
        self.timed.seen.add(tuple(self.removed.tolist()))
        return self.known[name] + self.timed.next

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


def test_what_was_measured_before_the_checkpoint_is_not_measured_again(tmp_path: Path) -> None:
    config = SearchConfig(targets="latency=0.6", samples=3, rounds=3, steps=3)
    with pytest.raises(Killed):
        run(dying(Timed(0.0).problem(), 20), config, checkpoint_dir=tmp_path)
    kept = json.loads((tmp_path / "search.json").read_text())["measured"]
    again = Timed(0.001)
    whole = run(again.problem(), config, checkpoint_dir=tmp_path, resume=True)
    assert again.wholes == kept["wholes"] == {"latency": 0.0}
    before = {tuple(key) for key, _ in kept["shares"]}
    assert len(before) > 20
    assert again.seen
    assert not before & again.seen
    finished = Timed(0.002)
    assert told(run(finished.problem(), config, checkpoint_dir=tmp_path, resume=True)) == told(whole)
    assert not finished.seen


def test_executor_and_jobs_may_change_across_a_resume_but_nothing_else(tmp_path: Path) -> None:
    config = SearchConfig(samples=3, rounds=2)
    run(Chain().problem(), config, checkpoint_dir=tmp_path)
    run(Chain().problem(), dataclasses.replace(config, jobs=2), checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(SearchError, match="another config: seed was 0 and is now 1"):
        run(Chain().problem(), dataclasses.replace(config, seed=1), checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(SearchError, match="another units"):
        run(Chain((8, 8, 8, 8, 8, 8)).problem(), config, checkpoint_dir=tmp_path, resume=True)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="no search to resume"):
        run(Chain().problem(), SearchConfig(), checkpoint_dir=tmp_path, resume=True)
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(SearchError, match="not a checkpoint of this version"):
        run(Chain().problem(), SearchConfig(), checkpoint_dir=tmp_path, resume=True)
    (tmp_path / "search.json").write_text('{"format": ')
    with pytest.raises(SearchError, match="is not a checkpoint"):
        run(Chain().problem(), SearchConfig(), checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(SearchError, match="needs checkpoint_dir"):
        run(Chain().problem(), SearchConfig(), resume=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SearchError, match="cannot write .*file"):
        run(Chain().problem(), SearchConfig(), checkpoint_dir=tmp_path / "file")
