"""Running networks without changing them."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune.errors import EvaluationError, InputError
from fxprune.evaluation.accuracy import evaluate_accuracy, logits_of, recalibrate_batchnorm
from fxprune.evaluation.running import device_of, evaluating, modes_kept


def mixed() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    model[1].eval()
    model[2].eval()
    model[2][1].train()  # type: ignore[index]
    return model


def modes(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


def test_modes_come_back_module_by_module() -> None:
    model = mixed()
    before = modes(model)
    with pytest.raises(RuntimeError, match="stop"), modes_kept(model):
        model.eval()
        raise RuntimeError("stop")
    assert modes(model) == before and True in before and False in before


def test_evaluating_is_eval_mode_without_gradients() -> None:
    model = mixed()
    with evaluating(model):
        assert not any(modes(model)) and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_device_of_a_module_without_tensors_is_the_cpu() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")


@dataclass
class Answer:
    aux: Tensor
    logits: Tensor


WANTED, OTHER = torch.ones(1, 2), torch.zeros(1, 2)
Named = namedtuple("Named", ["logits", "aux"])


@pytest.mark.parametrize(
    "output",
    [
        WANTED,
        (WANTED, OTHER),
        [None, WANTED],
        Named(WANTED, OTHER),
        {"out": WANTED, "aux": OTHER},
        {"aux": OTHER, "logits": WANTED},
        {"scores": WANTED},
        Answer(OTHER, WANTED),
    ],
)
def test_logits_are_found_in_every_usual_output(output: Any) -> None:
    assert logits_of(output) is WANTED


@pytest.mark.parametrize("output", [None, "text", (), {"loss": 3.0}])
def test_an_output_without_scores_is_an_error(output: Any) -> None:
    with pytest.raises(EvaluationError, match="without a tensor of class scores"):
        logits_of(output)


class Echo(nn.Module):
    """Scores that are its inputs, and dropout that would show training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.dropout(x)
        return scores


def test_accuracy_counts_samples_not_batches() -> None:
    scores = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    labels = torch.tensor([0, 1, 2, 1, 0])
    model = Echo().train()
    assert evaluate_accuracy(model, DataLoader(TensorDataset(scores, labels), batch_size=4)) == 3 / 5
    assert model.training and model.dropout.training


def test_accuracy_of_segmentation_counts_pixels() -> None:
    scores = torch.zeros(1, 2, 2, 2)
    scores[:, 1, 0, 0] = 1
    assert evaluate_accuracy(Echo(), [(scores, torch.zeros(1, 2, 2, dtype=torch.long))]) == 3 / 4


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch to evaluate on"),
        ([torch.ones(2, 3)], "a batch is a Tensor; it must be a pair"),
        ([(1, 2, 3)], "a batch is a tuple of 3"),
    ],
)
def test_batches_that_are_none(batches: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_accuracy(Echo(), batches)


@pytest.mark.parametrize("with_labels", [True, False])
def test_recalibration_gives_the_plain_average_of_the_batches(with_labels: bool) -> None:
    norm = nn.BatchNorm2d(2, momentum=0.3)
    norm.running_mean, norm.running_var = torch.full((2,), 50.0), torch.full((2,), 9.0)
    model = nn.Sequential(norm, nn.Dropout(0.5)).eval()
    batches = [torch.randn(4, 2, 5, 5) * (n + 1) + n for n in range(3)]
    recalibrate_batchnorm(model, [(b, torch.zeros(4)) if with_labels else b for b in batches])
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    var = torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
    assert norm.running_mean is not None and norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.momentum == 0.3 and not norm.training and not model.training


def test_recalibration_sees_later_layers_through_the_batches_own_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1)).eval()
    recalibrate_batchnorm(model, [torch.randn(512, 1) * 7 + 3])
    out = model(torch.randn(512, 1) * 7 + 3).detach()
    assert abs(float(out.mean())) < 0.15 and abs(float(out.std()) - 1) < 0.15


@pytest.mark.parametrize("batches", [[], [torch.randn(4, 2, 3, 3), torch.randn(4, 5, 3, 3)]], ids=["none", "wrong shape"])
def test_recalibration_that_fails_changes_nothing(batches: list[Tensor]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(2)).train()
    model(torch.randn(8, 2, 3, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((InputError, ValueError, RuntimeError)):
        recalibrate_batchnorm(model, batches)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and model[0].momentum == 0.1


def test_recalibration_leaves_networks_without_statistics_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2))
    recalibrate_batchnorm(model, [])
    assert not model[0].state_dict().get("running_mean")
