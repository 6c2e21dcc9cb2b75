"""A pruned YOLO learns from its labels and from the full one at once: ``python examples/distil_yolo.py [folder]``.

``fxprune.distill`` takes any loss, ``loss(output, teacher's output, batch)``. This one is ultralytics' own detection loss of the batch's
boxes, and beside it what the full network says of every place: the logits of the classes, and the distributions over the sides of the
boxes where the full network sees something. Images are drawn on the spot (examples/yolo.py). Install ``fxprune[ultralytics,train]``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from yolo import IMAGES, PLAIN, SIZE, draw, drawn, score  # type: ignore[import-not-found]

import fxprune
from fxprune import DistillConfig

SMALL = os.environ.get("FXPRUNE_EXAMPLE_BUDGET") == "small"
EPOCHS, DISTILLED = (2, 3) if SMALL else (25, 15)


def batches(images: Tensor, rows: list[Tensor], size: int = 16) -> list[dict[str, Tensor]]:
    """Batches as ultralytics' losses read them: boxes by middle and size, as shares of the image."""
    labels = torch.stack([one[0, :1] for one in rows]).float()
    corners = torch.stack([one[0, 1:] for one in rows]).float() / SIZE
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    return [
        {"img": x, "cls": c, "bboxes": b, "batch_idx": torch.arange(len(x)).float()}
        for x, c, b in zip(images.split(size), labels.split(size), boxes.split(size), strict=True)
    ]


def detection_loss(student: Any) -> Any:
    """What ``DistillConfig(loss=...)`` takes: the student's output in training, the teacher's in evaluation, and the batch."""
    criterion = student.init_criterion()
    bins = student.model[-1].reg_max

    def loss(output: dict[str, Any], taught: Any, batch: dict[str, Tensor]) -> Tensor:
        labelled, _ = criterion(output, batch)  # of boxes, classes and distributions, each times the batch's size
        raw = taught[1]  # beside the decoded boxes
        seen = raw["scores"].sigmoid().amax(1, keepdim=True)  # (batch, 1, places)
        classes = F.binary_cross_entropy_with_logits(output["scores"], raw["scores"].sigmoid(), reduction="none").sum((1, 2))
        ours, wanted = (one.unflatten(1, (4, bins)) for one in (output["boxes"], raw["boxes"]))
        sides = F.kl_div(ours.log_softmax(2), wanted.log_softmax(2), log_target=True, reduction="none").sum(2)
        total: Tensor = labelled.sum() / len(batch["img"]) + classes.mean() + (sides * seen).sum((1, 2)).mean()
        return total

    return loss


def main(folder: Path) -> None:
    from ultralytics import YOLO
    from ultralytics.cfg import get_cfg

    data = draw(folder / "data")
    yolo = YOLO("yolo11n.yaml")
    settings = {
        "data": str(data),
        "imgsz": SIZE,
        "batch": 16,
        "workers": 0,
        "device": "cpu",
        "verbose": False,
        "plots": False,
        "val": False,
    }
    yolo.train(**settings, **PLAIN, epochs=EPOCHS, optimizer="AdamW", lr0=0.003, warmup_epochs=1, seed=0, amp=False, project=str(folder))
    model: Any = yolo.model.float().eval().requires_grad_(True)
    images, boxes = drawn(folder / "data", "val")

    def f1(network: torch.nn.Module) -> float:
        """Boxes found with the right label at an overlap of 0.5, as F1."""
        with torch.no_grad():
            found: float = score(network.eval()(images)[0], boxes)
        return found

    slim: Any = fxprune.compress(model, "macs=0.5", torch.rand(1, 3, SIZE, SIZE), round_to=8, keep_class=True)
    record = fxprune.record(slim)
    print(f"macs {record.before.macs} -> {record.after.macs}; F1 {f1(model):.3f} of the full network, {f1(slim):.3f} right after pruning")

    slim.args = get_cfg()  # the weights of ultralytics' losses
    train = batches(*drawn(folder / "data", "train"))
    config = DistillConfig(
        epochs=DISTILLED, optimizer="torch.optim.AdamW", lr=0.002, loss=detection_loss(slim), inputs=lambda batch: batch["img"], validate=f1
    )
    history = fxprune.distill(slim, model, train, config=config)
    losses = [one["loss"] for one in history if "loss" in one]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} on {IMAGES['train']} images; F1 {f1(slim):.3f} after distillation")
    assert type(slim) is type(model) and losses[-1] < losses[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        # Its settings stay out of the home folder, and it asks no server for anything.
        os.environ.update(YOLO_CONFIG_DIR=scratch, YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "runs")
