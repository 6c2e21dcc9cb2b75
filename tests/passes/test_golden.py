"""What the analysis finds in each network of the zoo, word for word. ``python -m tests.passes.golden`` writes the files again."""

from __future__ import annotations

import pytest

from fxprune.passes.ir.reasons import ReasonKind
from tests.passes.golden import COMMAND, FOLDER, graph_of, report
from tests.passes.zoo.networks import ZOO

# Words of the reasons of operations that need all channels together: any other reason has a kind that says what to do.
NEEDS_ALL = ("slides along it", "sampl", "fills a whole tensor", "a diagonal", "runs along", "mixed", "index of a maximum")


@pytest.mark.parametrize("name", sorted(ZOO))
def test_coupling_report(name: str) -> None:
    file = FOLDER / f"{name}.txt"
    assert file.exists(), f"no golden report; look at the groups, then run: {COMMAND} {name}"
    found = report(name)
    plain = [g.reason for g in graph_of(name).groups if g.kind is ReasonKind.OPERATION]
    assert all(any(words in reason for words in NEEDS_ALL) for reason in plain), f"which advice fits? {plain}"
    assert found == file.read_text(encoding="utf-8"), f"the groups changed; if they should, run: {COMMAND} {name}"


def test_every_file_has_its_network() -> None:
    assert sorted(f.stem for f in FOLDER.glob("*.txt")) == sorted(ZOO)
