"""Hints: what is compared inside the networks, by numbers worked out by hand, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune import DistillConfig, Hint
from fxprune.errors import InputError
from fxprune.training.hints import Hints

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 1, 2, 0])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.block = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        y: Tensor = self.head(F.relu(x + self.block(x)).mean((2, 3)))
        return y


@pytest.fixture
def teacher() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def loss_of(hint: Hint, student: nn.Module, teacher: nn.Module) -> Tensor:
    hints = Hints([hint], student, teacher)
    learner = hints.learner(lambda: X).eval()
    with torch.no_grad():
        return hints.loss(learner(X)[1], hints.ask(X)[1])


def test_kept_channels_of_a_layer_are_compared(teacher: Net) -> None:
    student = fxprune.compress(teacher, {"stem": 0.5}, X[:1]).eval()
    kept = fxprune.record(student).kept["stem.weight"][0]
    with torch.no_grad():
        theirs = teacher.stem(X)[:, kept]
        wanted = 0.25 * F.mse_loss(student.get_submodule("stem")(X), theirs)
    assert len(kept) == 6
    torch.testing.assert_close(loss_of(Hint("stem", weight=0.25), student, teacher), wanted)
    # Slicing alone changes nothing before a layer that reads removed channels.
    assert float(loss_of(Hint("stem"), student, teacher)) == pytest.approx(0, abs=1e-10)


def test_nodes_between_layers_are_compared(teacher: Net) -> None:
    student = fxprune.compress(teacher, {"stem": 0.5}, X[:1]).eval()
    kept = fxprune.record(student).kept["norm.weight"][0]
    names = [node.name for node in student.graph.nodes]
    assert "add" in names
    with torch.no_grad():
        x, z = teacher.norm(teacher.stem(X)), student.get_submodule("norm")(student.get_submodule("stem")(X))
        block = student.get_submodule("block.1")(student.get_submodule("block.0")(z))
        wanted = F.mse_loss(z + block, (x + teacher.block(x))[:, kept])
    torch.testing.assert_close(loss_of(Hint("add"), student, teacher), wanted)
    assert float(wanted) > 1e-4


def test_attention_maps(teacher: Net) -> None:
    student = fxprune.compress(teacher, {"stem": 0.5}, X[:1]).eval()
    with torch.no_grad():
        maps = [F.normalize(m(X).square().sum(1).flatten(1), dim=1) for m in (student.get_submodule("stem"), teacher.stem)]
        wanted = 3 * (maps[0] - maps[1]).square().sum(1).mean()
    torch.testing.assert_close(loss_of(Hint("stem", kind="attention", weight=3.0), student, teacher), wanted)


def test_a_student_like_the_teacher_has_nothing_to_learn(teacher: Net) -> None:
    student = fxprune.compress(teacher, 0.0, X[:1]).eval()
    for kind in ("features", "attention"):
        assert float(loss_of(Hint("relu", kind=kind), student, teacher)) == pytest.approx(0, abs=1e-10)


def test_an_adapter_is_trained_and_dropped(teacher: Net) -> None:
    class Narrow(nn.Module):  # nothing of fxprune's
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.first(x).relu().mean((2, 3)))
            return y

    torch.manual_seed(1)
    student = Narrow()
    names = set(student.state_dict())
    config = DistillConfig(epochs=30, lr=0.05, hints=[Hint("first", "stem", match="adapter", weight=5.0)], device="cpu")
    history = fxprune.distill(student, teacher, [(X, LABELS)], config=config)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert set(student.state_dict()) == names and not student.first._forward_hooks
    with pytest.raises(InputError, match=r"shapes \[4, 5, 6, 6\] in the student and \[4, 12, 6, 6\] in the teacher; use match="):
        fxprune.distill(student, teacher, [(X, LABELS)], config=DistillConfig(1, hints=[Hint("first", "stem")], device="cpu"))


def test_hints_bring_the_student_closer_inside(teacher: Net) -> None:
    def distance(hints: tuple[Hint, ...]) -> float:
        student = fxprune.compress(teacher, 0.4, X[:1])
        config = DistillConfig(epochs=40, lr=0.1, warmup=0.0, hints=hints, device="cpu", batchnorm="frozen", seed=1)
        fxprune.distill(student, teacher, [(X, LABELS)], config=config)
        return float(loss_of(Hint("add"), student.eval(), teacher))

    assert distance((Hint("add", weight=10.0),)) < 0.5 * distance(())


def test_modes_and_teacher_stay(teacher: Net) -> None:
    student = fxprune.compress(teacher, 0.4, X[:1]).train()
    student.get_submodule("norm").eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.train()
    fxprune.distill(student, teacher, [(X, LABELS)], config=DistillConfig(1, hints=[Hint("relu"), Hint("block.0")], device="cpu"))
    assert student.training and not student.get_submodule("norm").training and teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        (lambda: Hint("nowhere"), "hint 'nowhere' is no node of the teacher's graph|hint 'nowhere' is no node of the student's graph"),
        (lambda: Hint("block"), "hint 'block' is no node of the student's graph; the last node within it is 'block_2'"),
        (lambda: Hint("stem", kind="map"), "kind is one of features, attention"),
        (lambda: Hint("stem", weight=0.0), "weight 0.0; it must be above 0"),
        (lambda: Hint("stem", "head", match="adapter"), "differ in more than their channels"),
        (lambda: Hint("head", kind="attention"), "hint 'head' has no positions beside its channels"),
        (lambda: Hint("stem", "mean", kind="attention"), "hint 'stem' has no positions beside its channels"),
    ],
)
def test_what_cannot_be_compared(teacher: Net, hint: Any, message: str) -> None:
    student = fxprune.compress(teacher, 0.4, X[:1])
    with pytest.raises(InputError, match=message):
        fxprune.distill(student, teacher, [(X, LABELS)], config=DistillConfig(1, hints=[hint()], device="cpu"))


def test_a_plain_student_has_layers_alone(teacher: Net) -> None:
    with pytest.raises(InputError, match="hint 'add' is no layer of the student; name one by its path"):
        fxprune.distill(Net(), teacher, [(X, LABELS)], config=DistillConfig(1, hints=[Hint("add")], device="cpu"))
