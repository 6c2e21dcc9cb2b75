"""One thread for all tests: linear algebra differs in bits between one and two, and small networks are no faster with more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables of layers go to a folder of this run, and none is read that another one measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist (``-n auto --dist loadgroup``) a file's tests stay on one worker, one after another.

    So what a module makes is made once, and no two tests that kill processes, measure time or start clusters in one file meet. The tests
    of ``passes``, thousands of small ones, are dealt out one by one.
    """
    for item in items:
        if item.path.is_relative_to(FOLDER) and item.path.relative_to(FOLDER).parts[0] != "passes":
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(FOLDER))))
