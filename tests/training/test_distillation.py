"""Distillation: the loss against numbers worked out by hand, the teacher left alone, the student a slim graph module."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune.api import compress
from fxprune.data.datasets import load_data
from fxprune.errors import InputError
from fxprune.evaluation.accuracy import evaluate_accuracy
from fxprune.models.small import digits_net
from fxprune.training.config import TrainConfig
from fxprune.training.distillation import DistillConfig, distill, response_loss
from fxprune.training.fitting import train


def test_the_loss_by_hand() -> None:
    # Teacher (0, 2 ln 3) at T = 2: softmax of (0, ln 3) is (1/4, 3/4). Student (0, 0): (1/2, 1/2).
    # KL = 1/4 ln(1/2) + 3/4 ln(3/2); times T^2 = 4. Cross-entropy of the student: ln 2.
    log = torch.log
    three, two = torch.tensor(3.0), torch.tensor(2.0)
    divergence = 0.25 * log(torch.tensor(0.5)) + 0.75 * log(torch.tensor(1.5))
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 2 * float(log(three))]])
    for alpha in (0.0, 0.25, 1.0):
        loss = response_loss(student, teacher, torch.tensor([1]), temperature=2.0, alpha=alpha)
        torch.testing.assert_close(loss, (1 - alpha) * 4 * divergence + alpha * log(two))


def test_the_loss_of_maps_is_the_mean_over_positions() -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    labels = torch.randint(0, 3, (2, 4, 5))
    each = [
        response_loss(student[n, :, y, x][None], teacher[n, :, y, x][None], labels[n, y, x][None], 2.0, 0.3)
        for n in range(2)
        for y in range(4)
        for x in range(5)
    ]
    torch.testing.assert_close(response_loss(student, teacher, labels, 2.0, 0.3), torch.stack(each).mean())


def test_the_loss_is_least_where_the_student_answers_as_the_teacher() -> None:
    teacher = torch.randn(4, 3)
    assert float(response_loss(teacher, teacher, torch.zeros(4, dtype=torch.long), 2.0, 0.0)) == pytest.approx(0, abs=1e-6)


def noisy() -> TensorDataset:
    """Labels are noise: only the teacher knows the rule."""
    torch.manual_seed(2)
    return TensorDataset(torch.randn(256, 4), torch.randint(0, 2, (256,)))


def rule() -> nn.Module:
    teacher = nn.Linear(4, 2)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([[-2.0, -2.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]]))
        teacher.bias.zero_()
    return nn.Sequential(teacher, nn.Dropout(0.9))


def agreement(student: nn.Module, teacher: nn.Module) -> float:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((student.eval()(x).argmax(1) == teacher.eval()(x).argmax(1)).float().mean())


def test_the_student_learns_what_only_the_teacher_knows() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), rule().train()
    before = copy.deepcopy(teacher.state_dict())
    history = distill(student, teacher, DataLoader(noisy(), 32), config=DistillConfig(epochs=10, lr=0.1, alpha=0.0))
    assert agreement(student, rule()) > 0.95
    assert history[-1]["loss"] < history[0]["loss"]
    assert teacher.training and teacher[1].training  # type: ignore[index]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_better_student_becomes_the_teacher() -> None:
    torch.manual_seed(0)
    student, teacher = rule(), rule()
    scores = {id(teacher): 0.5}
    student_scores = iter([0.1, 0.6, 0.7, 0.65])

    def validate(model: nn.Module) -> float:
        return scores.get(id(model)) or next(student_scores)

    config = DistillConfig(epochs=3, validate=validate)
    history = distill(student, teacher, DataLoader(noisy(), 64), config=config)
    assert [h.get("teacher_replaced", False) for h in history] == [False, True, True, False]
    student_scores = iter([0.1, 0.6])
    kept = distill(student, teacher, DataLoader(noisy(), 64), config=DistillConfig(epochs=1, validate=validate, replace_teacher=False))
    assert not any("teacher_replaced" in h for h in kept)


Heads = namedtuple("Heads", ["logits", "aux"])


class WithHeads(nn.Module):
    """As GoogLeNet: a named tuple while training, a tensor otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aux = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return Heads(self.main(x), self.aux(x)) if self.training else self.main(x)


def test_auxiliary_heads_are_left_out() -> None:
    student = WithHeads()
    before = student.aux.weight.clone()
    distill(student, WithHeads(), DataLoader(noisy(), 64), config=DistillConfig(epochs=2, weight_decay=0.0))
    assert torch.equal(student.aux.weight, before)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x) * scale}


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_several_inputs_and_mapping_outputs(form: str) -> None:
    x, scale = torch.randn(8, 4), torch.full((8, 1), 2.0)
    inputs = (x, scale) if form == "tuple" else {"x": x, "scale": scale}
    history = distill(TwoInputs(), TwoInputs(), [(inputs, torch.arange(8) % 2)], config=DistillConfig(epochs=2))
    assert len(history) == 2


def test_a_student_and_teacher_that_do_not_match() -> None:
    batches = DataLoader(noisy(), 64)
    with pytest.raises(InputError, match=r"teacher's class scores have shape \(64, 3\), the student's \(64, 2\)"):
        distill(nn.Linear(4, 2), nn.Linear(4, 3), batches)
    model = nn.Linear(4, 2)
    with pytest.raises(InputError, match="the same module"):
        distill(model, model, batches)


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("alpha", 1.5), ("lr", -1.0)])
def test_options_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"DistillConfig.{field} is .*; it must be"):
        DistillConfig(**{field: value})  # type: ignore[arg-type]


def test_a_slim_digits_network_recovers() -> None:
    data = load_data("digits")
    torch.manual_seed(0)
    teacher = digits_net()
    train(teacher, data.batches("train", 64, training=True), config=TrainConfig(epochs=6, lr=0.1, device="cpu"))
    student = compress(teacher, 0.3, data.example())
    assert isinstance(student, fx.GraphModule)
    pruned = evaluate_accuracy(student, data.batches("validation"))
    config = DistillConfig(epochs=4, device="cpu", validate=lambda m: evaluate_accuracy(m, data.batches("validation")))
    history = distill(student, teacher, data.batches("train", 64, training=True), config=config)
    assert history[0]["validation"] == pruned
    assert evaluate_accuracy(student, data.batches("test")) > max(pruned, 0.95)
    assert student.training
