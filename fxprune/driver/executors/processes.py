"""Scoring in worker processes of this machine."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from fxprune.driver.executors.base import ATTEMPTS
from fxprune.driver.problem import IntArray, Metrics, Score
from fxprune.errors import SearchError


class ProcessExecutor:
    """Scores in ``jobs`` worker processes. ``score`` is pickled once and sent to a worker that has yet to get it; a candidate travels as
    its vector.

    Workers are spawned, not forked: a fork of a process that holds an accelerator or a thread pool cannot be trusted.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._version = 0
        self._sent: bytes | None = None
        self._pool: ProcessPoolExecutor | None = None

    def map(self, score: Score, candidates: Sequence[IntArray]) -> list[Metrics]:
        done: dict[int, Metrics] = {}
        sent = self._pickled(score)
        for _ in range(ATTEMPTS):
            try:
                carrying = 0
                while len(done) < len(candidates):
                    for i, future in self._begun(sent, carrying, {i: one for i, one in enumerate(candidates) if i not in done}):
                        metrics = future.result()
                        if metrics is not None:
                            done[i] = metrics
                    carrying = self.jobs  # some worker had no score yet: as many candidates as there are workers bring it along
                return [done[i] for i in range(len(candidates))]
            except BrokenProcessPool:
                self.close()
        raise SearchError(f"worker processes died {ATTEMPTS} times over the same candidates; lower jobs, they may be out of memory")

    def reset(self) -> None:
        """The workers stay, since starting them takes longer than many a round does."""
        self._sent = None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _begun(self, sent: bytes, carrying: int, candidates: dict[int, IntArray]) -> list[tuple[int, Future[Metrics | None]]]:
        """What will be the metrics of ``candidates``, None for one that came to a worker without the score; the first ``carrying`` of them
        bring it along."""
        with _interrupt_held():
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(self.jobs, mp_context=context, initializer=_begin_worker)
            return [
                (i, self._pool.submit(_score_in_worker, self._version, sent if place < carrying else None, one))
                for place, (i, one) in enumerate(candidates.items())
            ]

    def _pickled(self, score: Score) -> bytes:
        if self._sent is None:
            try:
                self._sent = pickle.dumps(score)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise SearchError(f"the score cannot be sent to workers ({error}); use jobs=1, or functions of a module") from error
            self._version += 1
        return self._sent


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Workers that are started meanwhile never hear the interrupt key, not even while they import; here it is heard afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # else it would be started with the first worker, and let the key through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: dict[int, Score] = {}  # in a worker process: the score by its version


def _begin_worker() -> None:
    """Runs once in each worker. The interrupt key is the parent's business, which stops its workers; killed, it takes them along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _score_in_worker(version: int, sent: bytes | None, candidate: IntArray) -> Metrics | None:
    """The metrics of a candidate, or None where this worker has no score of that version and none was ``sent``."""
    if version not in _worker:
        if sent is None:
            return None
        _worker.clear()
        try:
            _worker[version] = pickle.loads(sent)  # bytes from our own parent process, never from a file
        except (pickle.UnpicklingError, AttributeError, ImportError, TypeError) as error:
            raise SearchError(f"workers cannot take the score ({error}); use jobs=1, or functions that they can import") from error
    return dict(_worker[version](candidate))
