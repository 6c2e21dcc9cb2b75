"""Networks of ultralytics keep their class, in the forms of their code that a trace does not meet too, and load without fxprune."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fxprune
from tests.passes.rewriting.test_keep_class import as_graph

X = torch.rand(1, 3, 64, 64)
NETWORKS = {
    "yolov8n": ("DetectionModel", "auto"),
    "yolo11n": ("DetectionModel", "auto"),
    "yolo12n": ("DetectionModel", "heads"),
    "yolo11n-seg": ("SegmentationModel", "auto"),
    "yolo11n-pose": ("PoseModel", "auto"),
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    return pytest.importorskip("ultralytics.nn.tasks")


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["yolo11n", *(pytest.param(n, marks=pytest.mark.long) for n in NETWORKS if n != "yolo11n")])
def test_the_class_stays_and_loads_elsewhere(name: str, tasks: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, attention = NETWORKS[name]
    model: nn.Module = getattr(tasks, kind)(f"{name}.yaml", verbose=False).eval()
    slim: Any = fxprune.compress(model, 0.25, X, keep_class=True, attention=attention)
    graph = as_graph(model, X, slim, attention=attention)
    assert type(slim) is type(model)
    for training in (False, True):
        assert equal(copy.deepcopy(slim).train(training)(X), graph.train(training)(X))
    with torch.no_grad():
        wanted = slim.eval()(X)
        module: Any
        for module in slim.modules():
            if hasattr(module, "forward_split"):  # what ultralytics' exporter runs in place of forward
                module.forward = module.forward_split
        assert equal(slim(X), wanted)
    for module in slim.modules():
        module.__dict__.pop("forward", None)
    torch.save({"model": slim, "train_args": {}}, tmp_path / "slim.pt")
    assert fxprune.record(torch.load(tmp_path / "slim.pt", weights_only=False)["model"]).removed_units
    script = (
        "import sys; sys.modules['fxprune'] = None\n"
        "from ultralytics import YOLO\n"
        f"print(sum(p.numel() for p in YOLO({str(tmp_path / 'slim.pt')!r}).model.parameters()))\n"
    )
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.strip().splitlines()[-1] == str(sum(p.numel() for p in slim.parameters()))


@pytest.mark.long
def test_the_example_finds_its_squares_before_and_after(tasks: Any, tmp_path: Path) -> None:
    """In full: it has to learn, and what another process loads has to have learnt as well."""
    example = Path(__file__).resolve().parents[1] / "examples" / "yolo.py"
    environment = {**os.environ, "PYTHONPATH": str(example.parents[1])}
    environment.pop("FXPRUNE_EXAMPLE_BUDGET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    found = dict(re.findall(r"mAP50 (of the full network|after training on) ([\d.]+)", done.stdout))
    assert float(found["of the full network"]) > 0.5 and float(found["after training on"]) > 0.5
    assert re.findall(r"loaded elsewhere: .* mAP50 ([\d.]+)", done.stdout)[0] == found["after training on"]
