"""Knowledge distillation: the slim network learns from the original's responses (Hinton 2015, https://arxiv.org/abs/1503.02531)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import InputError
from fxprune.evaluation import call, device_of, evaluating, logits_of, modes_kept
from fxprune.training import History, TrainConfig, check_values, fit, resolve_device


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """How to distil; what ``TrainConfig`` says, and:

    ``temperature``: both sets of class scores are divided by it before they are compared.
    ``alpha``: the share of the labels in the loss; the teacher has the rest.
    ``replace_teacher``: a student that validates better than its teacher becomes the teacher.

    Wang 2024 (https://arxiv.org/abs/2411.06463) has temperature 2, alpha 0.25 and a tenth of the epochs for warm-up as here, but a
    learning rate of 1e-3: right for its 20 epochs after every small step, slow for a few epochs after a large one.
    """

    lr: float = 0.02
    temperature: float = 2.0
    alpha: float = 0.25
    replace_teacher: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, {"temperature": (self.temperature > 0, "above 0"), "alpha": (0 <= self.alpha <= 1, "a share from 0 to 1")})


def distill(student: nn.Module, teacher: nn.Module, train_loader: Iterable[Any], *, config: DistillConfig | None = None) -> History:
    """Train ``student`` in place to respond as ``teacher`` does; return its history, one record an epoch.

    ``train_loader`` gives batches of (inputs, labels): inputs as the network takes them (a tensor, a tuple, a dict), labels class
    numbers of shape (batch,), or (batch, ...) where the networks score every position. The teacher runs in evaluation mode and
    without gradients, and is not changed. What is kept, reported and raised is said at ``fxprune.training.fit``; an epoch's record has
    ``teacher_replaced`` where the student took over.
    """
    config = config or DistillConfig()
    if student is teacher:
        raise InputError("student and teacher are the same module; pass the original as the teacher")
    device = resolve_device(config.device)
    if device_of(teacher) != device:
        teacher = copy.deepcopy(teacher).to(device)
    with evaluating(teacher):
        score = float(config.validate(teacher)) if config.validate is not None and config.replace_teacher else None
    with modes_kept(teacher):
        teacher.eval()
        return fit(student, train_loader, config, _Response(teacher, score, config))


class _Response:
    """``(1 - a) T^2 KL(teacher_T || student_T) + a CE``, as in Wang 2024, sec. 3.4."""

    def __init__(self, teacher: nn.Module, score: float | None, config: DistillConfig) -> None:
        self.teacher, self.score, self.config = teacher, score, config

    def loss(self, logits: Tensor, inputs: Any, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = logits_of(call(self.teacher, inputs))
        if wanted.shape != logits.shape:
            raise InputError(f"the teacher's class scores have shape {tuple(wanted.shape)}, the student's {tuple(logits.shape)}")
        return response_loss(logits, wanted, labels, self.config.temperature, self.config.alpha)

    def validated(self, model: nn.Module, score: float) -> dict[str, Any]:
        if self.score is None or score <= self.score:
            return {}
        self.teacher, self.score = copy.deepcopy(model).eval().requires_grad_(False), score
        return {"teacher_replaced": True}


def response_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    """The loss between class scores of shape (batch, classes, ...) and labels of shape (batch, ...); the mean over all positions."""
    classes = student.shape[1]
    student, teacher = (scores.movedim(1, -1).reshape(-1, classes) for scores in (student, teacher))
    ours, wanted = (F.log_softmax(scores / temperature, 1) for scores in (student, teacher))
    divergence = F.kl_div(ours, wanted, reduction="batchmean", log_target=True) * temperature**2
    return (1 - alpha) * divergence + alpha * F.cross_entropy(student, labels.flatten())
