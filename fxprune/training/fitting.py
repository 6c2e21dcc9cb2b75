"""Supervised training on Hugging Face accelerate: one process or many, warm-up and cosine decay, the best weights kept, resumable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fxprune.errors import InputError
from fxprune.evaluation.running import device_of, modes_kept
from fxprune.training.config import History, TrainConfig, resolve_device
from fxprune.training.loop import Run
from fxprune.training.objective import Objective
from fxprune.training.processes import accelerated, batchnorm_as


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
        torch.enable_grad(),  # the caller may be in a no_grad block
        on_device,
        accelerated(device, config.precision, config.trackers, str(log_dir), config.unused_parameters) as accelerator,
        modes_kept(model),
        torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []),
        _placed(model, accelerator.device),
        _learning(model, config.parameters),
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
def _learning(model: nn.Module, which: str) -> Iterator[None]:
    """Only the parameters that are to be trained take a gradient for the length of the block."""
    still = [p for p in model.parameters() if p.requires_grad and which == "vectors" and p.ndim > 1]
    if which == "vectors" and not any(p.requires_grad and p.ndim <= 1 for p in model.parameters()):
        raise InputError('parameters="vectors" finds none to train: no parameter of at most one dimension takes a gradient')
    try:
        for parameter in still:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


@contextmanager
def _placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on ``device`` for the length of the block."""
    home = device_of(model)
    try:
        model.to(device)
        yield
    finally:
        model.to(home)
