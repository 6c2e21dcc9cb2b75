"""Ray: the same policy as here, from one process or two nodes, also when a node is killed half-way; what fails says so in one line.

Nothing here depends on how fast Ray is: nodes are small, waits are for what happens and not for a time, and limits are minutes.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxprune.driver import SearchConfig, SearchOutcome, run
from fxprune.driver.executors.base import LocalExecutor
from fxprune.driver.executors.choice import make
from fxprune.driver.problem import IntArray
from fxprune.errors import EvaluationError, SearchError
from fxprune.testing.synthetic import Chain

PATIENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it kills workers for what other programs take
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_worker_register_timeout_seconds": "180",
    "RAY_gcs_rpc_server_connect_timeout_s": "60",
    "RAY_gcs_server_request_timeout_seconds": "180",
    "RAY_enable_metrics_collection": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}
for name, value in PATIENT.items():  # Ray reads some of them when it is imported
    os.environ.setdefault(name, value)

ray: Any = pytest.importorskip("ray", reason="the ray extra is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]  # Ray's own warnings

STORE = 80 * 2**20  # bytes; Ray takes no less
CONFIG = SearchConfig(samples=4, rounds=4)


class Noted:
    """Scores by a chain and notes in ``folder`` each scoring, and each process that it was unpacked in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.chain = folder, Chain()

    def __call__(self, removed: IntArray) -> Mapping[str, float]:
        self.note("scored")
        return self.chain.score(removed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.note("unpacked")

    def note(self, what: str) -> None:
        (self.folder / f"{what}-{os.getpid()}-{time.monotonic_ns()}").touch()

    def noted(self, what: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(f"{what}-*"))


class Wrong(Noted):
    """Refuses what it is given, or takes the worker down with it."""

    def __call__(self, removed: IntArray) -> Mapping[str, float]:
        if removed[0] == 1:
            raise EvaluationError("this network gives no number")
        if removed[0] == 2:
            self.note("died")
            os._exit(1)
        return super().__call__(removed)


class Stranding(Noted):
    """From the ``half``-th scoring on, whoever scores on node ``victim`` says so and stays there; the others wait until it has."""

    def __init__(self, folder: Path, victim: str, half: int) -> None:
        super().__init__(folder)
        self.victim, self.half = victim, half

    def __call__(self, removed: IntArray) -> Mapping[str, float]:
        if len(self.noted("scored")) >= self.half:
            if ray.get_runtime_context().get_node_id() == self.victim:
                self.note("stranded")
                time.sleep(600)
            _until(lambda: self.noted("stranded"))
        return super().__call__(removed)


def _until(happened: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def same(one: SearchOutcome, other: SearchOutcome) -> bool:
    return (one.removed.tolist(), one.reward, one.evaluations) == (other.removed.tolist(), other.reward, other.evaluations)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with one worker, which this process is connected to."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    made: Any = Cluster(initialize_head=True, connect=True, head_node_args=small)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def test_workers_unpack_the_score_once_and_again_when_it_changes(cluster: Any, tmp_path: Path) -> None:
    candidates = [np.full(6, count) for count in range(6)]
    executor = make(dataclasses.replace(CONFIG, executor="ray"))
    score = Noted(tmp_path)
    for _ in range(2):
        assert executor.map(score, candidates) == LocalExecutor().map(Chain().score, candidates)
    assert len(score.noted("unpacked")) == len({name.split("-")[1] for name in score.noted("scored")})
    executor.reset()
    score.chain = Chain(sensitivity=np.zeros(6))
    assert executor.map(score, candidates) == [{"accuracy": 0.95}] * len(candidates)
    executor.close()
    assert ray.is_initialized()  # a cluster that was there before stays


def test_what_a_score_raises_comes_out_as_it_is(cluster: Any, tmp_path: Path) -> None:
    executor = make(dataclasses.replace(CONFIG, executor="ray"))
    with pytest.raises(EvaluationError) as caught:
        executor.map(Wrong(tmp_path), [np.full(6, 0), np.full(6, 1)])
    assert str(caught.value) == "this network gives no number"


def test_a_candidate_that_always_takes_its_worker_down_is_told(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.driver.executors.ray_cluster.ATTEMPTS", 1)
    executor = make(dataclasses.replace(CONFIG, executor="ray"))
    score = Wrong(tmp_path)
    with pytest.raises(SearchError, match="Ray gave up on a candidate after 2 tries") as caught:
        executor.map(score, [np.full(6, 2)])
    assert len(str(caught.value).splitlines()) == 1
    assert len(score.noted("died")) == 2


def test_a_node_killed_half_way_changes_nothing(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(Chain().problem(), CONFIG)
    victim = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    (step,) = alone.history
    half = step["rounds"][1]["evaluations"]  # after two rounds of four: the next one has a candidate for each node
    score = Stranding(tmp_path, victim.node_id, half)

    def kill() -> None:
        _until(lambda: score.noted("stranded"))
        cluster.remove_node(victim, allow_graceful=False)

    puts, real = [], ray.put

    def put(value: Any) -> Any:
        puts.append(value)
        return real(value)

    monkeypatch.setattr(ray, "put", put)
    killer = threading.Thread(target=kill)
    killer.start()
    config = dataclasses.replace(CONFIG, executor="ray")
    found = run(dataclasses.replace(Chain().problem(), score=score), config)
    killer.join()
    assert same(found, alone)
    assert score.noted("stranded")
    assert not victim.any_processes_alive()
    assert puts == [score]  # the weights went into the object store once
    assert len(score.noted("scored")) == alone.evaluations
