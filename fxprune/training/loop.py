"""The loop of a training: steps, the clock, the moving average, the best weights so far, the checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxprune.errors import EvaluationError, FileError, InputError, first_line
from fxprune.evaluation.running import evaluating
from fxprune.passes.compat import BatchNormBase
from fxprune.training.checkpoints import check_same, make_folder, read_checkpoint, write_checkpoint
from fxprune.training.config import History, Progress, TrainConfig
from fxprune.training.objective import Objective
from fxprune.training.optimizers import make_optimizer, make_scheduler
from fxprune.training.processes import Part, Shares, agreed, ungraded

if TYPE_CHECKING:
    from accelerate import Accelerator


class Run:
    """One training. ``at``: the epoch, and how many of its batches are done."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, objective: Objective, accelerator: Accelerator, loader: Iterable[Any]
    ) -> None:
        self.model, self.config, self.objective, self.accelerator, self.loader = model, config, objective, accelerator, loader
        self.world, self.rank, self.device = accelerator.num_processes, accelerator.process_index, accelerator.device
        self.batches = _length(loader)
        self.learner = objective.learner(model, loader, self.device).to(self.device)
        self.parameters = [p for p in self.learner.parameters() if p.requires_grad]
        if not self.parameters:
            raise InputError("the model has no parameter that requires a gradient; there is nothing to train")
        self.accumulate = config.accumulate if config.accumulate > 1 else accelerator.gradient_accumulation_steps
        accelerator.gradient_accumulation_steps = 1  # what backward() would divide by: the loop weighs each batch by its rows
        self.steps = math.ceil(self.batches / self.accumulate)
        self.plain = make_optimizer(
            self.parameters, config.optimizer, config.lr, config.momentum, config.weight_decay, config.optimizer_options
        )
        self.scheduler, self.wants_score = make_scheduler(
            self.plain,
            config.scheduler,
            config.scheduler_options,
            steps=config.epochs * self.steps,
            epochs=config.epochs,
            warmup=config.warmup,
        )
        if self.wants_score and config.validate is None:
            raise InputError(f"scheduler {type(self.scheduler).__name__} goes by the validation score; pass validate=")
        self.by_epoch = self.wants_score or (config.scheduler is not None and config.scheduler_every == "epoch")
        self.prepared = accelerator.prepare_model(self.learner)
        self.optimizer = accelerator.prepare_optimizer(self.plain)
        average = None if config.ema is None else get_ema_multi_avg_fn(config.ema)
        self.ema = None if average is None else AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.shares = Shares(loader, self.rank, self.world, self.device, config.sharded)
        self.history: History = []
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.at = (1, 0)
        self.sums = [0.0, 0.0, 0.0, 0.0]  # of this epoch: loss of each row, rows, labels met, labels
        self.random: Mapping[str, Tensor] | None = None
        owners = [loader, getattr(loader, "sampler", None)]
        found = (getattr(owner, "generator", None) for owner in owners)
        self.generators = [one for one in found if isinstance(one, torch.Generator)]
        self.orders = [one.get_state() for one in self.generators]  # as they were when this epoch began
        self.lr, self.seconds, self.done, self.saved = config.lr, 0.0, 0, False
        self.started = self.began = time.perf_counter()

    def begin(self) -> None:
        """Go on from the checkpoint, or validate what there is."""
        folder = None if self.config.checkpoint_dir is None else Path(self.config.checkpoint_dir)
        if folder is not None:
            make_folder(folder)
        kept = read_checkpoint(folder) if folder is not None and self.config.resume else None
        if self.config.trackers:
            described = {name: "none" if value is None else value for name, value in self.config.described().items()}
            self.accelerator.init_trackers("fxprune", config=described)
        if kept is None or folder is None:
            self.validate(0)
            return
        check_same(folder, kept["options"], self._options())
        try:
            self._restore(kept)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise FileError(f"cannot go on from {folder}: {first_line(error)}; give the same model and options") from error

    def epoch(self, epoch: int) -> None:
        for shuffled in (self.loader, getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)):
            set_epoch = getattr(shuffled, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch - 1)
        self._train_mode()
        self.began = time.perf_counter() - self.seconds
        # Every epoch by itself, so that any process can begin with any of them; the same order everywhere, other dropout.
        torch.manual_seed(self.config.seed * 1_000_003 + epoch)
        done, group, number = self.at[1], [], -1
        for number, part in enumerate(self.shares):
            if number == 0 and self.world > 1:
                torch.manual_seed((self.config.seed * 1_000_003 + epoch) * 1009 + self.rank + 1)
            if number < done:
                if number == done - 1:
                    self._restore_random()
                continue
            group.append((number, part))
            if len(group) == self.accumulate:
                self._step(group)
                group = []
        if group:
            self._step(group)
        if number < 0:
            raise InputError(f"the training data gave no batch in epoch {epoch}; pass something that can be iterated again")
        self._record(epoch)

    def _train_mode(self) -> None:
        self.learner.train()
        if self.config.batchnorm == "frozen":
            for module in self.learner.modules():
                if isinstance(module, BatchNormBase):
                    module.eval()

    def _step(self, group: list[tuple[int, Part]]) -> None:
        epoch, step = self.at[0], group[-1][0] // self.accumulate + 1
        lr = self.lr = float(self.plain.param_groups[0]["lr"])
        self.optimizer.zero_grad()
        rows = sum(part.total for _, part in group)
        for place, (number, part) in enumerate(group):
            with nullcontext() if place == len(group) - 1 else self.accelerator.no_sync(self.prepared):
                loss = self._loss(number, part, f"epoch {epoch}, step {step}", lr)
                # Gradients are averaged over processes, and the mean over all rows is wanted.
                weight = part.rows * self.world / rows
                self.accelerator.backward(loss if weight == 1 else loss * weight)
        if self.config.clip is not None:
            self.accelerator.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            if not self.by_epoch:
                self.scheduler.step()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
        self.at, self.done = (epoch, group[-1][0] + 1), self.done + 1
        if self.config.on_step is not None and self.accelerator.is_main_process:
            self._tell(step, lr)
        if self.config.checkpoint_every is not None and step % self.config.checkpoint_every == 0 and step < self.steps:
            self._save()

    def _loss(self, number: int, part: Part, where: str, lr: float) -> Tensor:
        try:
            outcome = self.prepared(self.objective.inputs(part.batch))
        except RuntimeError as error:
            if "find_unused_parameters" not in str(error):
                raise
            which = ungraded(error, self.learner)
            raise InputError(f"some parameters got no gradient{which}, and processes must know; set unused_parameters=True") from error
        with self.accelerator.autocast():
            loss = self.objective.loss(outcome, part.batch, number)
        with torch.no_grad():
            right = self.objective.right(outcome, part.batch)
            figures = [loss.detach().double(), *(() if right is None else right)]
            value, *counts = torch.stack([figure.double() for figure in figures]).tolist()  # one wait for the device
        if not math.isfinite(value):
            raise EvaluationError(f"the training loss is {value} at {where}; lower the learning rate (now {lr:.2g}) or check the data")
        if part.rows:
            found = (value * part.rows, part.rows, *(counts or (0.0, 0.0)))
            self.sums = [total + one for total, one in zip(self.sums, found, strict=True)]
        return loss

    def _tell(self, step: int, lr: float) -> None:
        assert self.config.on_step is not None
        epoch, epochs = self.at[0], self.config.epochs
        left = max(0, epochs * self.steps - (epoch - 1) * self.steps - step)
        seconds = (time.perf_counter() - self.started) / self.done * left
        loss, rows, right, labels = self.sums
        accuracy = right / labels if labels else None
        self.config.on_step(Progress(epoch, epochs, step, self.steps, loss / max(rows, 1.0), accuracy, lr, seconds))

    def _record(self, epoch: int) -> None:
        loss, rows, right, labels = self._summed()
        found: dict[str, Any] = {"epoch": epoch, "loss": loss / rows}
        if labels:
            found["accuracy"] = right / labels
        self.history.append({**found, "lr": self.lr, "seconds": time.perf_counter() - self.began})

    def _summed(self) -> list[float]:
        """This epoch's sums over all processes."""
        if self.world == 1:
            return self.sums
        sums = torch.tensor(self.sums, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return list(sums.tolist())

    def validate(self, epoch: int) -> None:
        """The score of the weights as they are; the best are kept."""
        kept = self.model if self.ema is None or epoch == 0 else self.ema.module
        if self.world > 1:
            for tensor in kept.buffers():  # BatchNorm's statistics are each process's own
                torch.distributed.broadcast(tensor, 0)
        if self.config.validate is None:
            return
        with evaluating(kept):
            score = agreed(float(self.config.validate(kept)), self.device)
        if not math.isfinite(score):
            raise EvaluationError(f"the validation score is {score} after epoch {epoch}; validate must return a finite number")
        better = self.best is None or score > self.best[0]
        if epoch == 0:
            self.history.append({"epoch": 0})
        self.history[-1].update(validation=score, best=better)
        if better:
            self.best = (score, {name: value.detach().clone() for name, value in kept.state_dict().items()})
            self.history[-1].update(self.objective.validated(kept, score))

    def ended(self, epoch: int) -> None:
        """An epoch is over: the schedule that goes by epochs, the trackers, the checkpoint."""
        if self.by_epoch:
            self.scheduler.step(*([self.history[-1]["validation"]] if self.wants_score else []))
        self.at, self.sums, self.seconds = (epoch + 1, 0), [0.0] * 4, 0.0
        self.orders = [one.get_state() for one in self.generators]
        if self.config.trackers:
            numbers = {name: float(value) for name, value in self.history[-1].items()}
            self.accelerator.log(numbers, step=epoch * self.steps)
        if self.config.checkpoint_dir is not None:
            self._save()

    def finish(self) -> None:
        """The best weights, the moving average, or the last go back to the model."""
        if self.best is not None:
            self.model.load_state_dict(self.best[1])
        elif self.ema is not None and int(self.ema.n_averaged):
            self.model.load_state_dict(self.ema.module.state_dict())
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()

    # -- the checkpoint -----------------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        return {**self.config.described(), "batches": self.batches, "precision": self.accelerator.mixed_precision}

    def _save(self) -> None:
        if self.config.checkpoint_dir is None:
            return
        random, sums = self._randoms(), self._summed()
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "options": self._options(),
            "at": list(self.at),
            "sums": list(sums),
            "seconds": time.perf_counter() - self.began if self.at[1] else 0.0,
            "random": random,
            "orders": self.orders,
            "learner": self.learner.state_dict(),
            "optimizer": self.plain.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "best": None if self.best is None else list(self.best),
            "history": self.history,
            "objective": self.objective.state(),
        }
        write_checkpoint(Path(self.config.checkpoint_dir), state, check=not self.saved)
        self.saved = True

    def _restore(self, kept: Mapping[str, Any]) -> None:
        self.learner.load_state_dict(kept["learner"])
        self.plain.load_state_dict(kept["optimizer"])
        self.scheduler.load_state_dict(kept["scheduler"])
        if kept["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(kept["ema"])
        if kept["best"] is not None:
            score, weights = kept["best"]
            self.best = (score, {name: value.to(self.device) for name, value in weights.items()})
        self.history, self.at, self.seconds = list(kept["history"]), (kept["at"][0], kept["at"][1]), kept["seconds"]
        self.sums = list(kept["sums"]) if self.rank == 0 else [0.0] * 4
        # With another number of processes dropout goes on as it will.
        self.random = kept["random"][self.rank] if len(kept["random"]) == self.world else None
        self.orders = list(kept["orders"])
        for generator, state in zip(self.generators, self.orders, strict=True):
            generator.set_state(state)
        self.objective.restore(kept["objective"], self.model)

    def _randoms(self) -> list[dict[str, Tensor]]:
        """The generators' states, for every process."""
        mine = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.device)
        found = [dict(mine) for _ in range(self.world)]
        for name, state in mine.items() if self.world > 1 else ():
            states = [torch.empty_like(state, device=self.device) for _ in range(self.world)]
            torch.distributed.all_gather(states, state.to(self.device))
            for one, gathered in zip(found, states, strict=True):
                one[name] = gathered.cpu()
        return found

    def _restore_random(self) -> None:
        if self.random is None:
            return
        torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random and self.device.type == "cuda":
            torch.cuda.set_rng_state(self.random["cuda"], self.device)


def _length(loader: Any) -> int:
    try:
        batches = len(loader)
    except TypeError:  # a DataLoader has a length only if its data set does
        batches = sum(1 for _ in loader)
    if batches == 0:
        raise InputError("the training data hold no batch")
    return batches
