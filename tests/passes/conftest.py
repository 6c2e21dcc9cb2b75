"""The networks here are small and odd: at a random sparsity some lose nothing, which is no fault of theirs or of the compiler's."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxprune.passes.coupling import walk
from fxprune.passes.rewriting import slimmer

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::fxprune.PruningWarning"))


@pytest.fixture(autouse=True)
def rules_do_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """For users an error inside a rule locks what it touches (tests/test_failing_rules.py); in these tests it is an error."""
    monkeypatch.setattr(walk, "FAULTS", ())
    monkeypatch.setattr(slimmer, "FAULTS", ())
