"""The record as JSON: nothing is lost, nothing damaged is taken."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxprune
from fxprune.errors import FileError
from fxprune.files.record_json import decode_record, encode_record
from fxprune.index_lists import indices, ranges
from fxprune.policies import Policy
from fxprune.records import Profile, PruningRecord


def example() -> PruningRecord:
    kept = torch.tensor([0, 1, 2, 5, 9])
    return PruningRecord(
        kept={"conv.weight": {0: kept, 1: torch.tensor([3])}, "conv.bias": {0: kept}},
        removed_units={"conv": torch.tensor([3, 4, 6, 7, 8])},
        policy=Policy({"conv": 0.5}, {"tensor": [1, 3], "dtype": "float32"}, {"attention": "auto"}, {"seed": 3}),
        repair="bn",
        before=Profile(100, 50, 200, 300, {"conv": {"macs": 100, "params": 50}}),
        after=Profile(40, 20, 80, 120, {"conv": {"macs": 40, "params": 20}}),
        renumbered=("index",),
        notes=("a note",),
    )


@settings(deadline=None)
@given(st.sets(st.integers(0, 300)))
def test_ranges_come_back(numbers: set[int]) -> None:
    values = torch.tensor(sorted(numbers), dtype=torch.int64)
    back = indices(ranges(values))
    assert back.dtype == torch.int64 and torch.equal(back, values)


def test_ranges_are_short_and_readable() -> None:
    assert ranges(torch.tensor([0, 1, 2, 3, 7, 9, 10])) == "0-3,7,9-10"
    assert ranges(torch.arange(1000)) == "0-999"


@pytest.mark.parametrize("text", ["a", "1,1", "3,2", "5-4", "-1", "1-", "1,,2", "1.5", None, 3.5, "²"])
def test_damaged_ranges_are_refused(text: Any) -> None:
    with pytest.raises(FileError, match="no ascending list of ranges"):
        indices(text)


def test_a_record_survives_json() -> None:
    record = example()
    back = decode_record(json.loads(json.dumps(encode_record(record))))
    assert {n: {d: v.tolist() for d, v in dims.items()} for n, dims in back.kept.items()} == {
        "conv.weight": {0: [0, 1, 2, 5, 9], 1: [3]},
        "conv.bias": {0: [0, 1, 2, 5, 9]},
    }
    assert back.removed_units["conv"].tolist() == [3, 4, 6, 7, 8]
    assert (back.policy, back.repair, back.before, back.after) == (record.policy, "bn", record.before, record.after)
    assert (back.renumbered, back.notes) == (("index",), ("a note",))


def test_equal_lists_are_written_once() -> None:
    assert encode_record(example())["lists"] == ["0-2,5,9", "3", "3-4,6-8"]


def without(data: dict[str, Any], *path: str) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(data))
    place = copied
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return copied


@pytest.mark.parametrize("path", [("kept",), ("lists",), ("policy",), ("policy", "sparsity"), ("before", "macs"), ("after",), ("notes",)])
def test_a_missing_part_is_named(path: tuple[str, ...]) -> None:
    with pytest.raises(FileError, match=f"its record is damaged: '{path[-1]}' is missing"):
        decode_record(without(encode_record(example()), *path))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("kept", [1]),
        ("kept", {"conv": {"zero": 0}}),
        ("kept", {"conv": {"0": 7}}),
        ("before", {"macs": "many"}),
        ("policy", {"sparsity": 3}),
    ],
)
def test_a_damaged_part_is_refused(part: str, value: Any) -> None:
    with pytest.raises(FileError, match="its record is damaged"):
        decode_record({**encode_record(example()), part: value})


class Branching(nn.Module):
    """A branch on the batch, so that the record has a note of the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        found: torch.Tensor = self.b(y if x.shape[0] > 3 else -y)
        return found


def test_the_pickled_record_of_a_kept_class_names_nothing_of_fxprune() -> None:
    slim = fxprune.compress(Branching(), 0.5, torch.randn(2, 4), keep_class=True)
    record = fxprune.record(slim)
    assert record.notes
    assert b"fxprune" not in pickle.dumps(record)
