"""The table of transformers' families on its page says what is so."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("torchao")
families = pytest.importorskip("benchmarks.families")

QUICK = ("Llama",)  # the others take a quarter of a minute each
ROWS = families.read()


def test_every_family_has_its_row() -> None:
    assert list(ROWS) == list(families.FAMILIES) and all(list(row) == list(families.CHECKS) for row in ROWS.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in families.FAMILIES])
def test_what_the_table_says_of_a_family(name: str) -> None:
    assert families.row(families.FAMILIES[name]) == ROWS[name]


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{families.BEGIN}\nold\n{families.END}\nafter\n", encoding="utf-8")
    rows = {"Llama": dict.fromkeys(families.CHECKS, "yes"), "T5": {**dict.fromkeys(families.CHECKS, ""), "oracle": "no: a reason"}}
    families.write(rows, page)
    assert families.read(page) == rows and page.read_text().startswith("before\n") and page.read_text().endswith("after\n")


def test_a_check_that_fails_is_a_cell() -> None:
    trial = {"class": lambda _: (_ for _ in ()).throw(ValueError("no such thing\nmore"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "CHECKS", trial)
        assert families.row(families.FAMILIES["GPT2"]) == {"class": "ValueError: no such thing"}
