"""Optimisers and learning rate schedules: the usual ones, or any by its import path."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fxprune.errors import InputError, kind_of
from fxprune.imports import by_path


def imported(path: Any, what: str) -> Any:
    """What ``path``, "package.module.name" or "package.module:name", names; a callable is taken as it is. Raises ``InputError``."""
    return path if callable(path) else by_path(str(path), what)


def make_optimizer(
    parameters: Sequence[nn.Parameter], kind: Any, lr: float, momentum: float, weight_decay: float, options: Mapping[str, Any]
) -> Optimizer:
    """SGD with Nesterov's momentum where ``kind`` is None, else what it names, with ``lr``, ``weight_decay`` and ``options``."""
    if kind is None:
        return SGD(parameters, **{"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": momentum > 0, **options})
    made = imported(kind, "optimizer")
    given = {"lr": lr, "weight_decay": weight_decay, **options}
    known = inspect.signature(made).parameters
    if not weight_decay and "weight_decay" not in known:
        given.pop("weight_decay")
    optimizer = _made(made, "optimizer", parameters, given)
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"optimizer {kind!r} made {kind_of(optimizer)}; it must make a torch.optim.Optimizer")
    return optimizer


def make_scheduler(
    optimizer: Optimizer, kind: Any, options: Mapping[str, Any], *, steps: int, epochs: int, warmup: float
) -> tuple[Any, bool]:
    """A schedule and whether it wants the validation score. Where ``kind`` is None: ``schedule`` over all ``steps``.

    An option that is the text "steps" or "epochs" becomes that number.
    """
    if kind is None:
        return LambdaLR(optimizer, _Share(steps, warmup)), False
    numbers = {"steps": steps, "epochs": epochs}
    given = {name: numbers.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    scheduler = _made(imported(kind, "scheduler"), "scheduler", optimizer, given)
    if not isinstance(scheduler, LRScheduler):
        raise InputError(f"scheduler {kind!r} made {kind_of(scheduler)}; it must make a torch.optim.lr_scheduler.LRScheduler")
    return scheduler, "metrics" in inspect.signature(scheduler.step).parameters


def schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate at ``step`` (from 0) of ``steps``, as a share of the highest: a linear warm-up, then half a cosine down to 0."""
    warm = warmup * steps
    if step < warm:
        return min(1.0, (step + 1) / warm)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


class _Share:
    """``schedule`` as a function of the step; a class, so that what a checkpoint keeps of it are its two numbers."""

    def __init__(self, steps: int, warmup: float) -> None:
        self.steps, self.warmup = steps, warmup

    def __call__(self, step: int) -> float:
        return schedule(min(step, self.steps), self.steps, self.warmup)


def _made(make: Callable[..., Any], what: str, subject: Any, options: Mapping[str, Any]) -> Any:
    try:
        return make(subject, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} {getattr(make, '__name__', make)} does not take its options: {' '.join(str(error).split())}") from error
