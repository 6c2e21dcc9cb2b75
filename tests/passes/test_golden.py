"""What the analysis finds in each network of the zoo, word for word. ``python -m tests.passes.golden`` writes the files again."""

from __future__ import annotations

import pytest

from tests.passes.golden import COMMAND, FOLDER, report
from tests.passes.networks import ZOO


@pytest.mark.parametrize("name", sorted(ZOO))
def test_coupling_report(name: str) -> None:
    file = FOLDER / f"{name}.txt"
    assert file.exists(), f"no golden report; look at the groups, then run: {COMMAND} {name}"
    assert report(name) == file.read_text(encoding="utf-8"), f"the groups changed; if they should, run: {COMMAND} {name}"


def test_every_file_has_its_network() -> None:
    assert sorted(f.stem for f in FOLDER.glob("*.txt")) == sorted(ZOO)
