"""Scoring on a Ray cluster, somebody else's or one started here. Needs the `ray` extra."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from typing import Any

from fxprune.driver.executors.base import ATTEMPTS
from fxprune.driver.problem import IntArray, Metrics, Score
from fxprune.errors import SearchError, first_line
from fxprune.imports import needed


class RayExecutor:
    """Scores as Ray tasks, on the cluster that ``RAY_ADDRESS`` or a running Ray names, or on one of ``jobs`` processes started here.

    ``score``, with the weights and the calibration data in it, goes into the object store once, and each worker process takes it from
    there once; a candidate travels as its vector. Ray runs a task again whose worker or node died.
    """

    def __init__(self, jobs: int) -> None:
        self.ray: Any = needed("ray", "executor ray", "ray")
        self._own = not self.ray.is_initialized()
        if self._own:
            self._connect(jobs)
        self._task = self.ray.remote(num_cpus=1, max_retries=ATTEMPTS)(_score_as_task)
        self._stored: Any = None

    def _connect(self, jobs: int) -> None:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        mine = signal.getsignal(signal.SIGTERM)
        try:
            self.ray.init(address="auto", **quiet)
        except ConnectionError as error:
            named = os.environ.get("RAY_ADDRESS")
            if named:
                raise SearchError(f"no Ray cluster answers at RAY_ADDRESS={named}; unset it to start one here") from error
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is started here sends nothing anywhere
            self.ray.init(num_cpus=jobs, include_dashboard=False, **quiet)
        finally:
            if callable(mine) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, mine)  # Ray's own handler would end the process with its exit status

    def map(self, score: Score, candidates: Sequence[IntArray]) -> list[Metrics]:
        errors = self.ray.exceptions
        try:
            if self._stored is None:
                self._stored = self.ray.put(score)
            boxed = [self._stored]  # in a list, or Ray would unpack it, and the network be analysed again, for every candidate
            return list(self.ray.get([self._task.remote(boxed, candidate) for candidate in candidates]))
        except errors.RayTaskError as error:
            raise error.cause from None  # what the score raised, as it would be raised here
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SearchError(f"the score cannot be sent to workers ({error}); use executor local with jobs=1") from error
        except errors.RayError as error:
            tries = f"after {ATTEMPTS + 1} tries: {first_line(error)}"
            raise SearchError(f"Ray gave up on a candidate {tries}; its workers may be out of memory") from error

    def reset(self) -> None:
        self._stored = None

    def close(self) -> None:
        self._stored = None
        if self._own and self.ray.is_initialized():
            self.ray.shutdown()


_held: dict[str, Score] = {}  # in a worker process: the score that it took last, by its place in the object store


def _score_as_task(boxed: list[Any], candidate: IntArray) -> Metrics:
    (stored,) = boxed
    if stored.hex() not in _held:
        _held.clear()
        _held[stored.hex()] = importlib.import_module("ray").get(stored)
    return dict(_held[stored.hex()](candidate))
