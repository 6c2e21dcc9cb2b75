"""The executor that a configuration names."""

from __future__ import annotations

import importlib

from fxprune.driver.config import SearchConfig
from fxprune.driver.executors.base import Executor, LocalExecutor
from fxprune.driver.executors.processes import ProcessExecutor
from fxprune.errors import SearchError


def make(config: SearchConfig) -> Executor:
    """The executor that a configuration names."""
    if config.executor == "ray":
        ray: Executor = importlib.import_module("fxprune.driver.executors.ray_cluster").RayExecutor(config.jobs)
        return ray
    if config.executor != "local":
        raise SearchError(f"unknown executor {config.executor!r}; use local or ray")
    return LocalExecutor() if config.jobs == 1 else ProcessExecutor(config.jobs)
