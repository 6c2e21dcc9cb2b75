"""Networks of ultralytics keep their class, in the forms of their code that a trace does not meet too, and load without fxprune."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
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


SMALL_RTDETR: dict[str, Any] = {
    "nc": 2,
    "scales": {"l": [1.0, 1.0, 1024]},
    "backbone": [
        [-1, 1, "HGStem", [16, 24]], [-1, 2, "HGBlock", [24, 32, 3]], [-1, 1, "DWConv", [48, 3, 2, 1, False]],
        [-1, 2, "HGBlock", [24, 48, 3]], [-1, 1, "DWConv", [64, 3, 2, 1, False]], [-1, 2, "HGBlock", [32, 64, 5, True, False]],
        [-1, 1, "DWConv", [96, 3, 2, 1, False]], [-1, 2, "HGBlock", [48, 96, 5, True, False]],
    ],
    "head": [
        [-1, 1, "Conv", [64, 1, 1, None, 1, 1, False]], [-1, 1, "AIFI", [96, 8]], [-1, 1, "Conv", [64, 1, 1]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]], [5, 1, "Conv", [64, 1, 1, None, 1, 1, False]], [[-2, -1], 1, "Concat", [1]],
        [-1, 2, "RepC3", [64]], [-1, 1, "Conv", [64, 1, 1]], [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [3, 1, "Conv", [64, 1, 1, None, 1, 1, False]], [[-2, -1], 1, "Concat", [1]], [-1, 2, "RepC3", [64]],
        [-1, 1, "Conv", [64, 3, 2]], [[-1, 15], 1, "Concat", [1]], [-1, 2, "RepC3", [64]], [-1, 1, "Conv", [64, 3, 2]],
        [[-1, 10], 1, "Concat", [1]], [-1, 2, "RepC3", [64]], [[19, 22, 25], 1, "RTDETRDecoder", ["nc", 64, 20, 4, 8, 2]],
    ],
}  # fmt: skip
ENCODED = "model.8*"  # what AIFI reads: it computes its position embedding of the number of channels


def example() -> Any:
    path = Path(__file__).resolve().parents[1] / "examples" / "yolo.py"
    spec = importlib.util.spec_from_file_location("yolo_example", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_rt_detr_in_its_own_trainer(tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle, the class, a step in training, an epoch in RTDETRTrainer, ONNX, and RTDETR("best.pt") without fxprune."""
    monkeypatch.setenv("FXPRUNE_EXAMPLE_BUDGET", "small")
    monkeypatch.chdir(tmp_path)
    given = example()
    data = given.draw(tmp_path / "data")
    onnxruntime = pytest.importorskip("onnxruntime")
    ultralytics = pytest.importorskip("ultralytics")
    base = importlib.import_module("ultralytics.models.rtdetr.train").RTDETRTrainer
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64)
    model: Any = tasks.RTDETRDetectionModel(SMALL_RTDETR, verbose=False).eval()
    graph = fxprune.analyze(model, x, attention="heads", ignore=ENCODED)
    fxprune.compress(graph, 0.25, x, norms="exact", verify=True)
    slim: Any = fxprune.compress(graph, 0.25, x, keep_class=True, verify=True)
    assert type(slim) is type(model)
    record = fxprune.record(slim)
    assert record.after.params < 0.7 * record.before.params
    wanted = as_graph(model, x, slim, attention="heads", ignore=ENCODED)
    assert equal(slim(x)[0], wanted(x)[0])
    cfg = tmp_path / "rtdetr-small.yaml"
    cfg.write_text(json.dumps(SMALL_RTDETR))  # yaml reads it
    more = ultralytics.RTDETR(str(cfg))
    more.model = slim
    settings = {"data": str(data), "imgsz": 64, "batch": 16, "workers": 0, "device": "cpu", "verbose": False, "plots": False}
    more.train(
        **settings, **given.PLAIN, epochs=1, amp=False, deterministic=False, project=str(tmp_path), name="slim",
        trainer=given.trainer_of(slim, base),
    )  # fmt: skip
    assert sum(p.numel() for p in more.model.parameters()) == record.after.params
    best = tmp_path / "slim" / "weights" / "best.pt"
    more.export(format="onnx", imgsz=64, device="cpu", simplify=False)
    found = onnxruntime.InferenceSession(str(best.with_suffix(".onnx"))).run(None, {"images": x[:1].numpy()})[0]
    with torch.no_grad():
        assert torch.allclose(more.model.float().eval()(x[:1])[0], torch.from_numpy(found), atol=1e-4)
    script = (
        "import sys; sys.modules['fxprune'] = None\n"
        "from ultralytics import RTDETR\n"
        f"print(sum(p.numel() for p in RTDETR({str(best)!r}).model.parameters()))\n"
    )
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.strip().splitlines()[-1] == str(record.after.params)


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
