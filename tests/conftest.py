"""One thread for all tests: linear algebra differs in bits between one and two, and small networks are no faster with more."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxprune.exporting.formats import FORMATS
from fxprune.importance.registry import CRITERIA
from fxprune.repair.registry import REPAIRS

torch.set_num_threads(1)
FOLDER = Path(__file__).parent


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test registers goes with it."""
    kept = [dict(one) for one in (CRITERIA, REPAIRS, FORMATS)]
    yield
    for one, before in zip((CRITERIA, REPAIRS, FORMATS), kept, strict=True):
        one.clear()  # type: ignore[attr-defined]
        one.update(before)  # type: ignore[attr-defined]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tables of layers go to a folder of the test's own: none reads what another one measured, or made up."""
    folder: Path = item.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    os.environ["FXPRUNE_CACHE"] = str(folder / "caches" / hashlib.sha256(item.nodeid.encode()).hexdigest()[:16])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist (``-n auto --dist loadgroup``) a file's tests stay on one worker, one after another.

    So what a module makes is made once, and no two tests that kill processes, measure time or start clusters in one file meet. The tests
    of ``passes``, thousands of small ones, are dealt out one by one.
    """
    for item in items:
        if item.path.is_relative_to(FOLDER) and item.path.relative_to(FOLDER).parts[0] != "passes":
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(FOLDER))))
