"""The networks here are small and odd: at a random sparsity some lose nothing, which is no fault of theirs or of the compiler's."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::fxprune.PruningWarning"))
