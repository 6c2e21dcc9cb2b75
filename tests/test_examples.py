"""Every example runs, as a user would run it, with a small budget."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Packages that are no part of the set-up, and whose own warnings are theirs
NEEDS = {"llama": "transformers", "yolo": "ultralytics", "distil_yolo": "ultralytics", "from_onnx": "onnx2torch"}


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    package = NEEDS.get(path.stem)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    environment = {**os.environ, "FXPRUNE_EXAMPLE_BUDGET": "small", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error" if package is None else "ignore", str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip(), "an example shows something"


COLOURED = """
import torch

def make():
    classes = torch.arange(48) % 4
    images = (classes.view(-1, 1, 1, 1) / 4).expand(48, 3, 32, 32) * torch.rand(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(images, classes), torch.utils.data.TensorDataset(images[:8], classes[:8])
"""


def test_the_whole_road_on_images_like_those_of_cifar10(tmp_path: Path) -> None:
    (tmp_path / "coloured.py").write_text(COLOURED, encoding="utf-8")
    environment = {**os.environ, "FXPRUNE_EXAMPLE_BUDGET": "small", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "cifar10_end_to_end.py"), "coloured:make"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "distilled" in done.stdout and (tmp_path / "slim.safetensors").exists() and (tmp_path / "policy.json").exists()
