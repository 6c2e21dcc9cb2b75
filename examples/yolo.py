"""A YOLO of ultralytics, pruned and handed back to its own trainer: ``python examples/yolo.py [folder]``.

Images of a coloured square are drawn on the spot; nothing is downloaded. The detector learns to find them from random weights in a minute,
loses channels where they cost its validation least, goes on in ultralytics' own trainer (with its EMA, validation and checkpoints), is
exported to ONNX, and its ``slim.pt`` is loaded and validated by ``YOLO`` in a process that knows nothing of fxprune. Install
``fxprune[ultralytics]``.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fxprune
from fxprune.driver import SearchConfig

SMALL = os.environ.get("FXPRUNE_EXAMPLE_BUDGET") == "small"  # too few epochs to find anything: the road alone
SIZE, EPOCHS, MORE = (64, 2, 1) if SMALL else (64, 25, 12)
IMAGES = {"train": 32, "val": 16} if SMALL else {"train": 96, "val": 24}
# Easy images want no augmentation.
PLAIN = dict.fromkeys(("mosaic", "mixup", "hsv_h", "hsv_s", "hsv_v", "erasing", "close_mosaic"), 0)


def draw(folder: Path) -> Path:
    """Images of a square, red or green, with its box; the data set's yaml."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in IMAGES.items():
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for number in range(count):
            image = rng.integers(60, 110, (SIZE, SIZE, 3), dtype=np.uint8)
            side, label = int(rng.integers(24, 40)), int(rng.integers(2))
            x, y = (int(v) for v in rng.integers(0, SIZE - side, 2))
            image[y : y + side, x : x + side] = (255, 0, 0) if label == 0 else (0, 255, 0)
            Image.fromarray(image).save(folder / "images" / part / f"{number}.png")
            line = f"{label} {(x + side / 2) / SIZE} {(y + side / 2) / SIZE} {side / SIZE} {side / SIZE}"
            (folder / "labels" / part / f"{number}.txt").write_text(line)
    data = folder / "squares.yaml"
    data.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [red, green]\n")
    return data


def trainer_of(slim: torch.nn.Module, base: type) -> type:
    """ultralytics' trainer builds its network from a yaml, at full width; this one goes on with ``slim``."""

    class Slim(base):  # type: ignore[misc]
        def get_model(self, *_: Any, **__: Any) -> torch.nn.Module:
            return slim

    return Slim


def drawn(folder: Path, part: str) -> tuple[Tensor, list[Tensor]]:
    """The images of a part (count, 3, SIZE, SIZE), and of each the rows (label, left, top, right, bottom) in pixels."""
    from PIL import Image

    images, boxes = [], []
    for number in range(IMAGES[part]):
        images.append(torch.from_numpy(np.asarray(Image.open(folder / "images" / part / f"{number}.png")).copy()).permute(2, 0, 1) / 255)
        rows = np.loadtxt(folder / "labels" / part / f"{number}.txt", ndmin=2) * (1, SIZE, SIZE, SIZE, SIZE)
        middle, half = rows[:, 1:3], rows[:, 3:] / 2
        boxes.append(torch.from_numpy(np.hstack([rows[:, :1], middle - half, middle + half])))
    return torch.stack(images), boxes


def score(raw: Tensor, boxes: list[Tensor]) -> float:
    """F1 of what a network says, ``raw``: (images, 4 + labels, places)."""
    from ultralytics.utils.metrics import box_iou
    from ultralytics.utils.nms import non_max_suppression

    hits, said, there = 0, 0, 0
    for found, wanted in zip(non_max_suppression(raw, conf_thres=0.1, iou_thres=0.5), boxes, strict=True):
        right = (box_iou(found[:, :4], wanted[:, 1:].float()) > 0.5) & (found[:, 5:6] == wanted[:, 0])
        hits, said, there = hits + int(right.any(0).sum()), said + len(found), there + len(wanted)
    return 2 * hits / max(said + there, 1)


def main(folder: Path, name: str = "yolo11n.yaml") -> None:
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer

    data = draw(folder / "data")
    settings = {"data": str(data), "imgsz": SIZE, "batch": 16, "workers": 0, "device": "cpu", "verbose": False, "plots": False}
    run = {**settings, **PLAIN, "project": str(folder), "optimizer": "AdamW", "lr0": 0.003, "warmup_epochs": 1, "seed": 0, "amp": False}

    def validated(model: torch.nn.Module) -> float:
        """mAP at an overlap of 0.5, by ultralytics' own validation; it folds norms into the network that it is given."""
        judge = YOLO(name)
        judge.model = copy.deepcopy(model)
        return float(judge.val(**settings, project=str(folder), name="val").box.map50)

    yolo = YOLO(name)
    yolo.train(**run, epochs=EPOCHS, name="full")
    model = yolo.model.float().eval().requires_grad_(True)
    print(f"mAP50 of the full network {validated(model):.3f}")

    images, boxes = drawn(folder / "data", "val")

    def f1(candidate: torch.nn.Module) -> float:
        """Boxes found with the right label at an overlap of 0.5, as F1: what the search asks of each candidate."""
        with torch.no_grad():
            return score(candidate.eval()(images)[0], boxes)

    x = torch.rand(1, 3, SIZE, SIZE)
    config = SearchConfig(targets={"macs": 0.6}, strategy="uniform", round_to=8)
    policy = fxprune.search(model, x, f1, config=config).policy
    calibration = list(drawn(folder / "data", "train")[0].split(16))
    slim: Any = fxprune.compress(model, policy, keep_class=True, repair="bn", calibration=calibration)
    record = fxprune.record(slim)
    print(f"parameters {record.before.params} -> {record.after.params}, macs {record.before.macs} -> {record.after.macs}")
    assert type(slim) is type(model)
    print(f"mAP50 right after pruning {validated(slim):.3f}")

    more = YOLO(name)
    more.model = slim
    more.train(**run, epochs=MORE, name="slim", trainer=trainer_of(slim, DetectionTrainer))
    best = folder / "slim" / "weights" / "best.pt"
    assert sum(p.numel() for p in more.model.parameters()) == record.after.params
    print(f"mAP50 after training on {validated(more.model.float()):.3f}")

    more.export(format="onnx", imgsz=SIZE, device="cpu", simplify=False)
    print(f"written: {best.with_suffix('.onnx').name}, {best.with_suffix('.onnx').stat().st_size} bytes")

    script = (
        "import sys; sys.modules['fxprune'] = None\n"
        "from ultralytics import YOLO\n"
        f"yolo = YOLO({str(best)!r})\n"
        f"found = yolo.val(**{settings!r}, project={str(folder)!r}, name='elsewhere').box.map50\n"
        "print(f'loaded elsewhere: {sum(p.numel() for p in yolo.model.parameters())} parameters, mAP50 {found:.3f}')\n"
    )
    print(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        # Its settings stay out of the home folder, and it asks no server for anything.
        os.environ.update(YOLO_CONFIG_DIR=scratch, YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "runs")
