"""One process and two come to the same weights where the batches are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fxprune.training.processes import Shares, rows_of
from tests.training.two_processes import CASES, distilled

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes on the CPU made."""
    out = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "tests.training.two_processes", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("kind", CASES)
def test_two_processes_come_to_what_one_does(kind: str, two: Path, tmp_path: Path) -> None:
    distilled(kind, tmp_path)
    alone, history = load_file(tmp_path / f"{kind}-0.safetensors"), json.loads((tmp_path / f"{kind}-0.json").read_text())
    for rank in (0, 1):
        together = load_file(two / f"{kind}-{rank}.safetensors")
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(history, json.loads((two / f"{kind}-{rank}.json").read_text()), strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4)


def test_both_processes_end_with_the_same_bits(two: Path) -> None:
    for kind in CASES:
        first, second = (load_file(two / f"{kind}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_go_on_where_they_were_cut(two: Path) -> None:
    for rank in (0, 1):
        whole, again = (load_file(folder / f"shuffled-{rank}.safetensors") for folder in (two, two / "cut"))
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        stories = [json.loads((folder / f"shuffled-{rank}.json").read_text()) for folder in (two, two / "cut")]
        for one, other in zip(*stories, strict=True):
            assert one == pytest.approx(other, rel=1e-9)


def test_processes_that_are_given_other_batches_are_told(two: Path) -> None:
    for rank in (0, 1):
        assert "the loader gives each process other batches" in (two / f"other-{rank}.txt").read_text()


def test_parameters_without_a_gradient_have_to_be_told(two: Path) -> None:
    for rank in (0, 1):
        first, second = json.loads((two / f"unused-{rank}.json").read_text())
        assert "some parameters got no gradient (idle), and" in first and "set unused_parameters=True" in first and second == ""


def test_the_rows_of_a_batch() -> None:
    assert rows_of(({"a": torch.tensor(1.0), "b": torch.zeros(5, 2)}, torch.zeros(5))) == 5
    (part,) = Shares([(torch.zeros(3, 2), torch.zeros(3))], 0, 1, torch.device("cpu"))
    assert part.rows == part.total == 3
