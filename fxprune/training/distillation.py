"""Knowledge distillation: the slim network learns from the original's responses (Hinton 2015, https://arxiv.org/abs/1503.02531), from
features inside it, and from what a loss of the user's own says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import InputError
from fxprune.evaluation.accuracy import labelled, logits_of
from fxprune.evaluation.callers_modes import in_plain_modes
from fxprune.evaluation.copying import copied
from fxprune.evaluation.running import call, device_of, evaluating, modes_kept, set_training, to_device
from fxprune.passes.compat import tree_leaves
from fxprune.training.config import History, TrainConfig, check_values
from fxprune.training.fitting import fit
from fxprune.training.hints import Hint, Hints
from fxprune.training.objective import Objective, Whole
from fxprune.training.processes import agreed

__all__ = ["DistillConfig", "Hint", "distill", "response_loss"]


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """How to distil; what ``TrainConfig`` says, and:

    ``temperature``: both sets of class scores are divided by it before they are compared.
    ``alpha``: weight of the loss against the labels; the loss against the teacher has ``1 - alpha``.
    ``loss``: called in place of both with the student's output, the teacher's and the batch; gives a scalar, a mean over the batch.
    ``hints``: places inside the two networks that are compared too, each added with its weight.
    ``inputs``: batch -> what goes into the networks; by default the first of a pair.
    ``replace_teacher``: a student that validates better than its teacher becomes the teacher; not with ``hints`` or ``cache_teacher``,
    which hold to the one they began with.
    ``cache_teacher``: keep the teacher's outputs of every batch, in main memory, rather than run it in every epoch: for loaders that give
    the same batches in the same order every time; one that does not is noticed.

    Wang 2024 (https://arxiv.org/abs/2411.06463) has temperature 2, alpha 0.25 and a tenth of the epochs for warm-up as here, but a
    learning rate of 1e-3: right for its 20 epochs after every small step, slow for a few epochs after a large one.
    """

    lr: float = 0.02
    temperature: float = 2.0
    alpha: float = 0.25
    replace_teacher: bool = True
    loss: Callable[[Any, Any, Any], Tensor] | None = None
    hints: Sequence[Hint] = ()
    inputs: Callable[[Any], Any] | None = None
    cache_teacher: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, {"temperature": (self.temperature > 0, "above 0"), "alpha": (0 <= self.alpha <= 1, "a share from 0 to 1")})


@in_plain_modes
def distill(student: nn.Module, teacher: nn.Module, train_loader: Iterable[Any], *, config: DistillConfig | None = None) -> History:
    """Train ``student`` in place to respond as ``teacher`` does.

    Started by ``accelerate launch`` or ``torchrun``, every process takes its share of every batch. What is kept and reported is said at
    ``fxprune.training.fitting.fit``.

    Args:
        student: the slim module; it is trained in place.
        teacher: the original. It runs in evaluation mode and without gradients, and is not changed.
        train_loader: gives batches of (inputs, labels): inputs as the network takes them (a tensor, a tuple, a dict), labels class numbers
            of shape (batch,), or (batch, ...) where the networks score every position. The class scores are the output itself, its
            ``logits``
            or ``out``, or its first tensor. With ``config.loss`` outputs and batches may be of any form.
        config: epochs, learning rate, temperature, hints and the rest.

    Returns:
        The history: one record an epoch, with ``teacher_replaced`` where the student took over.

    Raises:
        InputError: the two are one module, a batch is not a pair, or an option does not fit.
        EvaluationError: the loss is not finite, or an output has no class scores.
        FileError: the checkpoint cannot be written, or belongs to another training.
        DependencyError: accelerate is not installed.
    """
    config = config or DistillConfig()
    if student is teacher:
        raise InputError("student and teacher are the same module; pass the original as the teacher")
    with modes_kept(teacher):
        set_training(teacher, False)
        return fit(student, train_loader, config, _Distillation(teacher, config))


class _Distillation(Objective):
    """The teacher, and the losses against it."""

    def __init__(self, teacher: nn.Module, config: DistillConfig) -> None:
        super().__init__(config.ignore_index)
        self.teacher, self.config = teacher, config
        self.hints: Hints | None = None
        self.score: float | None = None
        self.replaced = False
        self.cache: dict[int, tuple[Tensor, Any]] = {}

    def learner(self, model: nn.Module, loader: Iterable[Any], device: torch.device) -> nn.Module:
        config = self.config
        if device_of(self.teacher) != torch.empty(0, device=device).device:  # "cuda" is one of several
            self.teacher = copied(self.teacher).to(device)
        if config.validate is not None and config.replace_teacher and not config.hints and not config.cache_teacher:
            with evaluating(self.teacher):
                self.score = agreed(float(config.validate(self.teacher)), device)
        if not config.hints:
            return Whole(model)
        self.hints = Hints(config.hints, model, self.teacher)
        return self.hints.learner(lambda: to_device(self.inputs(next(iter(loader))), device))

    def inputs(self, batch: Any) -> Any:
        if self.config.inputs is not None:
            return self.config.inputs(batch)
        if self.config.loss is not None and isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0]
        try:
            return labelled(batch)[0]
        except InputError as error:
            raise InputError(f"{error}, or pass inputs= and loss= to say what of it goes where") from error

    def loss(self, outcome: Any, batch: Any, number: int) -> Tensor:
        output, features = outcome if self.hints is not None else (outcome, None)
        wanted, wanted_features = self._taught(self.inputs(batch), number)
        if self.config.loss is not None:
            loss = self.config.loss(output, wanted, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise InputError("the loss gave no scalar tensor; it must return the mean over the batch")
        else:
            loss = self._response(logits_of(output), logits_of(wanted), batch)
        return loss if self.hints is None else loss + self.hints.loss(features or (), wanted_features)

    def _response(self, logits: Tensor, wanted: Tensor, batch: Any) -> Tensor:
        if wanted.shape != logits.shape:
            raise InputError(f"the teacher's class scores have shape {tuple(wanted.shape)}, the student's {tuple(logits.shape)}")
        return response_loss(logits, wanted, self._labels(batch), self.config.temperature, self.config.alpha, self.ignore_index)

    def _labels(self, batch: Any) -> Tensor:
        if self.config.inputs is None or (isinstance(batch, (tuple, list)) and isinstance(batch[-1], Tensor)):
            labels: Tensor = batch[-1]
            return labels
        if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
            found: Tensor = batch["labels"]
            return found
        raise InputError('a batch has no labels: its last entry, or "labels" of a mapping; pass loss= for a loss without them')

    def right(self, outcome: Any, batch: Any) -> tuple[Tensor, Tensor] | None:
        if self.config.loss is not None:  # its outputs and labels mean what the user means
            return None
        labels = self._labels(batch)
        logits = logits_of(outcome[0] if self.hints is not None else outcome)
        return (logits.argmax(1) == labels).sum(), (labels != self.ignore_index).sum()

    @torch.no_grad()
    def _taught(self, inputs: Any, number: int) -> tuple[Any, Any]:
        """The teacher's output and features, from the cache where there are some."""
        if not self.config.cache_teacher:
            return self._asked(inputs)
        mark = _mark(inputs)
        if number not in self.cache:
            self.cache[number] = (mark, to_device(self._asked(inputs), "cpu"))
        kept, answers = self.cache[number]
        if not torch.equal(kept, mark):
            raise InputError(
                f"batch {number + 1} is not what it was in an earlier epoch, so the teacher's outputs cannot be kept; "
                "set cache_teacher=False, or shuffle=False and no augmentation"
            )
        found: tuple[Any, Any] = to_device(answers, mark.device)
        return found

    def _asked(self, inputs: Any) -> tuple[Any, Any]:
        return (call(self.teacher, inputs), None) if self.hints is None else self.hints.ask(inputs)

    def validated(self, model: nn.Module, score: float) -> dict[str, Any]:
        if self.score is None or score <= self.score:
            return {}
        self.teacher, self.score, self.replaced = copied(model).eval().requires_grad_(False), score, True
        return {"teacher_replaced": True}

    def state(self) -> dict[str, Any]:
        return {"score": self.score, "teacher": self.teacher.state_dict() if self.replaced else None}

    def restore(self, state: Mapping[str, Any], model: nn.Module) -> None:
        self.score = state["score"]
        if state["teacher"] is not None:
            self.teacher, self.replaced = copied(model).eval().requires_grad_(False), True
            self.teacher.load_state_dict(state["teacher"])


def _mark(inputs: Any) -> Tensor:
    """Numbers that tell one batch from another, one for each row of each tensor; places weigh differently, so a mirror image is another."""
    rows = [leaf.double().reshape(len(leaf), -1) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    return torch.cat([one @ torch.linspace(1, 2, one.shape[1], dtype=one.dtype, device=one.device) for one in rows])


def response_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, ignore_index: int = -100) -> Tensor:
    """``(1 - a) T^2 KL(teacher_T || student_T) + a CE`` (Wang 2024, sec. 3.4), of class scores of shape (batch, classes, ...) and labels
    of shape (batch, ...); the mean over all positions, those labelled ``ignore_index`` left out of the cross-entropy."""
    classes = student.shape[1]
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = (scores.to(wide).movedim(1, -1).reshape(-1, classes) for scores in (student, teacher))
    ours, wanted = (F.log_softmax(scores / temperature, 1) for scores in (student, teacher))
    divergence = F.kl_div(ours, wanted, reduction="batchmean", log_target=True) * temperature**2
    return (1 - alpha) * divergence + alpha * F.cross_entropy(student, labels.flatten(), ignore_index=ignore_index)
