"""Supervised training in its plainest good form: SGD with momentum, linear warm-up, cosine decay, the best weights kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import EvaluationError, InputError
from fxprune.evaluation import call, device_of, evaluating, labelled, logits_of, modes_kept, to_device

History = list[dict[str, Any]]


@dataclass(frozen=True)
class Progress:
    """Where a training stands after a step. ``loss`` and ``accuracy`` (0 to 1) are means over this epoch so far.

    ``epoch`` and ``step`` count from 1; ``steps``: steps in an epoch; ``seconds_left``: until the last epoch ends.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    lr: float
    seconds_left: float


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    ``lr``: highest learning rate, reached after the share ``warmup`` of all steps, then a half cosine down to 0.
    ``clip``: largest norm of the gradient, None for no limit.
    ``device``: "auto" (a GPU where there is one), "cpu", "cuda" or any torch device.
    ``seed``: of dropout and of loaders that shuffle by torch's global generator, which is left as it was.
    ``validate``: module -> score, larger is better; called in evaluation mode before the first and after every epoch. The best weights
    are kept by it; without it, the last.
    ``on_step``: called with a ``Progress`` after every step.
    """

    epochs: int = 10
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    clip: float | None = None
    device: str = "auto"
    seed: int = 0
    validate: Callable[[nn.Module], float] | None = None
    on_step: Callable[[Progress], None] | None = None

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 0, "0 or more"),
            "lr": (self.lr > 0, "above 0"),
            "momentum": (0 <= self.momentum < 1, "from 0 to below 1"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "warmup": (0 <= self.warmup < 1, "a share from 0 to below 1"),
            "clip": (self.clip is None or self.clip > 0, "above 0, or None"),
        }
        check_values(self, checks)


class Objective(Protocol):
    """What a training minimises."""

    def loss(self, logits: Tensor, inputs: Any, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar."""

    def validated(self, model: nn.Module, score: float) -> dict[str, Any]:
        """Told each new best score; gives entries for that epoch's record."""


def check_values(config: Any, checks: dict[str, tuple[bool, str]]) -> None:
    """Raise ``InputError`` for the first field of ``config`` whose check failed."""
    for name, (good, wanted) in checks.items():
        if not good:
            raise InputError(f"{type(config).__name__}.{name} is {getattr(config, name)}; it must be {wanted}")


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is a device. Raises ``InputError`` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is unknown; use auto, cpu or cuda") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return found


def train(model: nn.Module, loader: Iterable[Any], *, config: TrainConfig | None = None) -> History:
    """Train ``model`` in place on ``loader``'s batches of (inputs, labels) by cross-entropy; return its history.

    See ``fit`` for what is kept and raised.
    """
    return fit(model, loader, config or TrainConfig(), _CrossEntropy())


def fit(model: nn.Module, loader: Iterable[Any], config: TrainConfig, objective: Objective) -> History:
    """Minimise ``objective`` in place; one record an epoch: epoch, loss, accuracy, lr, seconds and, where validated, validation and best.

    With ``config.validate`` the history begins with epoch 0, the score before training, and the model ends with its best weights: at the
    end, and also when Ctrl-C or an error stops it. It ends on the device and in the modes it began with. ``loader`` is iterated once an
    epoch, after ``loader.set_epoch(epoch)`` (or its sampler's) where it has that. Raises ``EvaluationError`` naming epoch and step when
    the loss is not finite.
    """
    if config.epochs == 0:
        return []
    device = resolve_device(config.device)
    with modes_kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []), _placed(model, device):
        torch.manual_seed(config.seed)
        run = _Run(model, config, objective, device, _length(loader))
        try:
            run.validate(0)
            for epoch in range(1, config.epochs + 1):
                run.epoch(epoch, loader)
                run.validate(epoch)
        finally:
            run.restore_best()
    return run.history


@contextmanager
def _placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on ``device`` for the length of the block."""
    home = device_of(model)
    try:
        model.to(device)
        yield
    finally:
        model.to(home)


class _CrossEntropy:
    def loss(self, logits: Tensor, inputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def validated(self, model: nn.Module, score: float) -> dict[str, Any]:
        return {}


class _Run:
    """One training: the optimiser, the clock, the best weights so far."""

    def __init__(self, model: nn.Module, config: TrainConfig, objective: Objective, device: torch.device, steps: int) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("the model has no parameter that requires a gradient; there is nothing to train")
        self.model, self.config, self.objective, self.device, self.steps = model, config, objective, device, steps
        self.parameters = parameters
        self.optimizer = torch.optim.SGD(
            parameters, config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.momentum > 0
        )
        self.history: History = []
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.started = time.perf_counter()

    def epoch(self, epoch: int, loader: Iterable[Any]) -> None:
        for shuffled in (loader, getattr(loader, "sampler", None)):
            set_epoch = getattr(shuffled, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch - 1)
        self.model.train()
        began, loss_sum, right, seen, lr = time.perf_counter(), 0.0, 0, 0, 0.0
        for step, batch in enumerate(loader, 1):
            lr = self.config.lr * schedule((epoch - 1) * self.steps + step - 1, self.config.epochs * self.steps, self.config.warmup)
            inputs, labels = labelled(to_device(batch, self.device))
            loss, logits = self._step(inputs, labels, lr, f"epoch {epoch}, step {step}")
            loss_sum += loss * labels.numel()
            right += int((logits.argmax(1) == labels).sum())
            seen += labels.numel()
            if self.config.on_step is not None:
                done = (epoch - 1) * self.steps + step
                left = (time.perf_counter() - self.started) / done * max(0, self.config.epochs * self.steps - done)
                self.config.on_step(Progress(epoch, self.config.epochs, step, self.steps, loss_sum / seen, right / seen, lr, left))
        if not seen:
            raise InputError(f"the training data gave no batch in epoch {epoch}; pass something that can be iterated again")
        seconds = time.perf_counter() - began
        self.history.append({"epoch": epoch, "loss": loss_sum / seen, "accuracy": right / seen, "lr": lr, "seconds": seconds})

    def _step(self, inputs: Any, labels: Tensor, lr: float, where: str) -> tuple[float, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        logits = logits_of(call(self.model, inputs))
        loss = self.objective.loss(logits, inputs, labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise EvaluationError(f"the training loss is {value} at {where}; lower the learning rate (now {lr:.2g}) or check the data")
        loss.backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        return value, logits.detach()

    def validate(self, epoch: int) -> None:
        if self.config.validate is None:
            return
        with evaluating(self.model):
            score = float(self.config.validate(self.model))
        if not math.isfinite(score):
            raise EvaluationError(f"the validation score is {score} after epoch {epoch}; validate must return a finite number")
        better = self.best is None or score > self.best[0]
        if epoch == 0:
            self.history.append({"epoch": 0})
        self.history[-1].update(validation=score, best=better)
        if better:
            self.best = (score, {name: value.detach().clone() for name, value in self.model.state_dict().items()})
            self.history[-1].update(self.objective.validated(self.model, score))

    def restore_best(self) -> None:
        if self.best is not None:
            self.model.load_state_dict(self.best[1])


def schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate at ``step`` (from 0) of ``steps``, as a share of the highest."""
    warm = warmup * steps
    if step < warm:
        return min(1.0, (step + 1) / warm)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def _length(loader: Any) -> int:
    steps = len(loader) if hasattr(loader, "__len__") else sum(1 for _ in loader)
    if steps == 0:
        raise InputError("the training data hold no batch")
    return steps
