"""How to train: the options, what is reported meanwhile, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.errors import InputError
from fxprune.training.processes import PRECISIONS

History = list[dict[str, Any]]


@dataclass(frozen=True)
class Progress:
    """Where a training stands after a step. ``loss`` and ``accuracy`` (0 to 1; None without labels) are means over this epoch so far,
    of this process.

    ``epoch`` and ``step`` count from 1; ``steps``: steps in an epoch; ``seconds_left``: until the last epoch ends.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None
    lr: float
    seconds_left: float


PARAMETERS = ("all", "vectors")
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
    ``parameters``: "all", or "vectors": only those of at most one dimension, the scales and shifts of normalisations and the biases (PERP,
    Zimmer 2023, https://arxiv.org/abs/2312.15230): minutes of training between a repair and distillation. The others stay as they are.
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
    parameters: str = "all"
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
            "parameters": (self.parameters in PARAMETERS, f"one of {', '.join(PARAMETERS)}"),
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
