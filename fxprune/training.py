"""Supervised training on Hugging Face accelerate: one process or many, warm-up and cosine decay, the best weights kept, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import InputError
from fxprune.evaluation import call, device_of, labelled, logits_of, modes_kept
from fxprune.loops import History, Progress, Run
from fxprune.optimizers import schedule
from fxprune.processes import PRECISIONS, accelerated, batchnorm_as

__all__ = ["History", "Objective", "Progress", "TrainConfig", "check_values", "fit", "resolve_device", "schedule", "train"]

BATCHNORM = ("local", "sync", "frozen")
# Options that change no result, or hold what cannot be compared.
_FREE = frozenset({"device", "validate", "on_step", "checkpoint_dir", "checkpoint_every", "resume", "trackers", "log_dir"})


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    ``lr``: highest learning rate, reached after the share ``warmup`` of all steps, then a half cosine down to 0.
    ``optimizer``: None for SGD with Nesterov's ``momentum``; else an import path ("torch.optim.AdamW") or a class, called with the
    parameters, ``lr``, ``weight_decay`` and ``optimizer_options``. ``scheduler``: likewise, in place of the warm-up and the cosine; an
    option that is the text "steps" or "epochs" becomes that number; ``scheduler_every``: "step" or "epoch".
    ``clip``: largest norm of the gradient, None for no limit. ``accumulate``: batches whose gradients make one step.
    ``precision``: "no", "fp16" or "bf16"; None: what ``accelerate launch`` says, else "no".
    ``ema``: decay of an exponential moving average of the weights, for example 0.999; it is what is validated and kept then.
    ``batchnorm``: "local": each process computes the statistics of its own share of a batch; "sync": all of them together (on GPUs);
    "frozen": as in evaluation, statistics stay.
    ``device``: "auto" (a GPU where there is one), "cpu", "cuda" or any torch device.
    ``seed``: of dropout and of loaders that shuffle by torch's global generator, which is left as it was.
    ``validate``: module -> score, larger is better; called in evaluation mode, on every process, before the first and after every epoch.
    The best weights are kept by it; without it, the last.
    ``on_step``: called with a ``Progress`` after every step, on the main process.
    ``checkpoint_dir``: where the whole state is kept after every epoch, and every ``checkpoint_every`` steps within one; ``resume``:
    whether to go on from there, where there is a checkpoint.
    ``trackers``: names that accelerate knows ("tensorboard", "wandb" ...) or its tracker objects, which get every epoch's record;
    ``log_dir``: for those that write files, by default the checkpoint's.
    ``ignore_index``: the label of positions that have none.
    ``sharded``: the loader gives each process batches of its own. ``unused_parameters``: with many processes, say so where some
    parameters get no gradient in some step.
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
    optimizer: Any = None
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Any = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    scheduler_every: str = "step"
    accumulate: int = 1
    precision: str | None = None
    ema: float | None = None
    batchnorm: str = "local"
    checkpoint_dir: Path | str | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    trackers: Sequence[Any] = ()
    log_dir: Path | str | None = None
    ignore_index: int = -100
    sharded: bool = False
    unused_parameters: bool = False

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 0, "0 or more"),
            "lr": (self.lr > 0, "above 0"),
            "momentum": (0 <= self.momentum < 1, "from 0 to below 1"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "warmup": (0 <= self.warmup < 1, "a share from 0 to below 1"),
            "clip": (self.clip is None or self.clip > 0, "above 0, or None"),
            "scheduler_every": (self.scheduler_every in ("step", "epoch"), "step or epoch"),
            "accumulate": (self.accumulate >= 1, "1 or more"),
            "precision": (self.precision in (None, *PRECISIONS), f"one of {', '.join(PRECISIONS)}, or None"),
            "ema": (self.ema is None or 0 < self.ema < 1, "a share between 0 and 1, or None"),
            "batchnorm": (self.batchnorm in BATCHNORM, f"one of {', '.join(BATCHNORM)}"),
            "checkpoint_every": (self.checkpoint_every is None or self.checkpoint_every >= 1, "1 or more, or None"),
            "resume": (not self.resume or self.checkpoint_dir is not None, "False where there is no checkpoint_dir"),
            "trackers": (not isinstance(self.trackers, str), "a list of names"),
        }
        check_values(self, checks)

    def described(self) -> dict[str, Any]:
        """The options that the result depends on, as plain values: what a training that goes on must have in common with its beginning."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _FREE}
        return {name: value if isinstance(value, (bool, int, float, type(None))) else _text(value) for name, value in found.items()}


class Objective:
    """What a training minimises; this one, cross-entropy with the labels. Others derive from it."""

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def learner(self, model: nn.Module, loader: Iterable[Any], device: torch.device) -> nn.Module:
        """The module that is trained and called with a batch's inputs: the model, or one around it with parameters of its own."""
        return Whole(model)

    def inputs(self, batch: Any) -> Any:
        """What of a batch goes into the network."""
        return labelled(batch)[0]

    def loss(self, outcome: Any, batch: Any, number: int) -> Tensor:
        """The loss of the ``number``-th batch of an epoch, a mean over its rows; ``outcome``: what the learner returned."""
        return F.cross_entropy(logits_of(outcome), labelled(batch)[1], ignore_index=self.ignore_index)

    def right(self, outcome: Any, batch: Any) -> tuple[Tensor, Tensor] | None:
        """How many labels were met, of how many; None where there are none."""
        labels = labelled(batch)[1]
        return ((logits_of(outcome).argmax(1) == labels).sum(), (labels != self.ignore_index).sum())

    def validated(self, model: nn.Module, score: float) -> dict[str, Any]:
        """Told each new best score; gives entries for that epoch's record."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a training that goes on needs to know: tensors and plain values."""
        return {}

    def restore(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Take up what ``state`` gave; ``model`` is the one that is trained."""


class Whole(nn.Module):
    """The model, called with inputs of any form in one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return call(self.model, inputs)


def check_values(config: Any, checks: dict[str, tuple[bool, str]]) -> None:
    """Raise ``InputError`` for the first field of ``config`` whose check failed."""
    for name, (good, wanted) in checks.items():
        if not good:
            raise InputError(f"{type(config).__name__}.{name} is {getattr(config, name)}; it must be {wanted}")


def _text(value: Any) -> str:
    """A value in words that stay the same in another process."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(one)}" for key, one in sorted(value.items())) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(getattr(value, "__qualname__", None) or (type(value).__qualname__ if callable(value) else value))


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
    config = config or TrainConfig()
    return fit(model, loader, config, Objective(config.ignore_index))


def fit(model: nn.Module, loader: Iterable[Any], config: TrainConfig, objective: Objective) -> History:
    """Minimise ``objective`` in place; one record an epoch: epoch, loss, accuracy, lr, seconds and, where validated, validation and best.

    With ``config.validate`` the history begins with epoch 0, the score before training, and the model ends with its best weights: at the
    end, and also when Ctrl-C or an error stops it. It ends on the device and in the modes it began with. ``loader`` is iterated once an
    epoch, after ``loader.set_epoch(epoch)`` (or its sampler's) where it has that; a batch is shared out among the processes, so that the
    result does not depend on their number but for rounding, BatchNorm's statistics and dropout. Raises ``EvaluationError`` naming epoch
    and step when the loss is not finite, ``FileError`` for a checkpoint that does not fit.
    """
    if config.epochs == 0:
        return []
    log_dir = config.log_dir or config.checkpoint_dir or "fxprune-logs"
    device = resolve_device(config.device)
    on_device = torch.cuda.device(device) if device.type == "cuda" and device.index is not None else nullcontext()
    with (
        on_device,
        accelerated(device, config.precision, config.trackers, str(log_dir), config.unused_parameters) as accelerator,
        modes_kept(model),
        torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []),
        _placed(model, accelerator.device),
        batchnorm_as(model, config.batchnorm, accelerator),
    ):
        if device.index is not None and accelerator.num_processes > 1:
            raise InputError(f"device {config.device!r} cannot be that of {accelerator.num_processes} processes; use auto, cpu or cuda")
        torch.manual_seed(config.seed)
        run = Run(model, config, objective, accelerator, loader)
        try:
            run.begin()
            for epoch in range(run.at[0], config.epochs + 1):
                run.epoch(epoch)
                run.validate(epoch)
                run.ended(epoch)
        finally:
            run.finish()
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
