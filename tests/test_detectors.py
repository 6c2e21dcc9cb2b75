"""A detector as people write them, from the oracle to a runtime; its loss is the user's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxprune
from fxprune import DistillConfig
from tests.passes.rewriting.test_keep_class import agree
from tests.yolox_like import YOLOXLike, detection_loss

X = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def network() -> YOLOXLike:
    torch.manual_seed(0)
    return YOLOXLike().eval()


def test_a_detector_without_anchors_keeps_its_class() -> None:
    model = network()
    graph = fxprune.analyze(model, X)
    slim: Any = fxprune.compress(graph, 0.4, keep_class=True)
    fxprune.compress(graph, 0.4, X, verify=True)
    record = fxprune.record(slim)
    assert type(slim) is YOLOXLike and record.after.params < 0.5 * record.before.params
    fixed = {g.name.partition("[")[0] for g in graph.groups if not g.prunable}
    assert fixed == {"backbone.stem.conv.conv:in", "head.cls_preds.0", "head.reg_preds.0", "head.reg_preds.1"}
    agree(model, (X,), slim)
    agree(model, (X,), slim.eval())
    assert slim(torch.rand(1, 3, 128, 32)).shape == (1, 80, 9)  # grids are made for other sizes


def test_a_detector_is_distilled_with_a_loss_of_the_users_own() -> None:
    """Batches are dicts, outputs boxes; the loss is given the student's output, the teacher's and the batch."""
    model = network()
    slim = fxprune.compress(model, 0.4, X, keep_class=True)
    wanted = torch.cat([torch.rand(2, 120, 2) * 64, torch.rand(2, 120, 2) * 30 + 8, (torch.rand(2, 120, 1) > 0.8).float()], -1)
    given: list[tuple[Any, ...]] = []

    def loss(output: Tensor, taught: Tensor, batch: dict[str, Tensor]) -> Tensor:
        given.append((output.requires_grad, taught.requires_grad, sorted(batch)))
        return detection_loss(output, batch["targets"]) + 0.1 * (output[..., 5:].sigmoid() - taught[..., 5:]).square().mean()

    config = DistillConfig(epochs=12, lr=0.01, loss=loss, inputs=lambda batch: batch["images"])
    history = fxprune.distill(slim, model, [{"images": X, "targets": wanted}] * 2, config=config)
    assert history[-1]["loss"] < 0.95 * history[0]["loss"] and set(map(str, given)) == {str((True, False, ["images", "targets"]))}
    assert fxprune.record(slim).removed_units


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of the exporter
def test_a_detector_in_a_runtime(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    slim: Any = fxprune.compress(network(), 0.4, X, keep_class=True)
    done = fxprune.export(slim, tmp_path / "slim.onnx")
    session = onnxruntime.InferenceSession(str(done.path))
    found = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    assert done.difference is not None and done.difference < 1e-4
    assert torch.allclose(torch.from_numpy(found), copy.deepcopy(slim)(X), atol=1e-3)
