"""What tests/training/test_processes.py runs in one process and in two: distillations, their weights and histories to files."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxprune
from fxprune import DistillConfig, Hint
from fxprune.training.config import Progress
from tests.ranks import leave


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12)
        self.conv2, self.head = nn.Conv2d(12, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv2(self.norm(self.conv1(x)).relu()).relu()
        return {"out": self.head(x.mean((2, 3)))}


class Stream(IterableDataset[Any]):
    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(self.samples)


def loader_of(kind: str, samples: TensorDataset) -> Any:
    if kind == "stream":
        return DataLoader(Stream(samples), 16)
    if kind == "list":  # the last batch has one row, fewer than there are processes
        return [samples[first : first + 7] for first in range(0, 50, 7)]
    return DataLoader(samples, 16, shuffle=True)  # 50 samples: the last batch has two rows


CASES: dict[str, dict[str, Any]] = {
    "shuffled": {"clip": 1.0, "hints": (Hint("conv1"), Hint("conv2", kind="attention", weight=2.0), Hint("conv2", match="adapter"))},
    "stream": {"optimizer": "torch.optim.AdamW", "lr": 0.01, "ema": 0.5},
    "list": {"accumulate": 3, "scheduler": "torch.optim.lr_scheduler.StepLR", "scheduler_options": {"step_size": 4}},
}


def distilled(kind: str, out: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    teacher = Net()
    nn.init.uniform_(teacher.norm.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
    samples = TensorDataset(torch.randn(50, 1, 8, 8), torch.randint(0, 3, (50,)))
    student = fxprune.compress(teacher, 0.5, samples[0][0][None])
    told: list[Progress] = []
    scores = iter(range(9))
    general = {"epochs": 3, "lr": 0.1, "device": "cpu", "batchnorm": "frozen", "on_step": told.append, "replace_teacher": False}
    config = DistillConfig(**{**general, "validate": lambda module: next(scores), **CASES[kind], **changes})
    history = fxprune.distill(student, teacher, loader_of(kind, samples), config=config)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    assert bool(told) == (rank == 0)  # progress is told once
    save_file(student.state_dict(), out / f"{kind}-{rank}.safetensors")
    (out / f"{kind}-{rank}.json").write_text(json.dumps([{k: v for k, v in h.items() if k != "seconds"} for h in history]))


def other_batches() -> str:
    """What is said where every process is given batches of its own."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    batches = [(torch.randn(4, 4), torch.zeros(4).long())]
    try:
        fxprune.distill(nn.Linear(4, 2), nn.Linear(4, 2), batches, config=DistillConfig(1, device="cpu"))
    except fxprune.FxPruneError as error:
        return str(error)
    return ""


class Idle(nn.Linear):
    """With a parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.idle = nn.Parameter(torch.ones(1))


def unused() -> list[str]:
    """What is said where a parameter gets no gradient, and where that was told before."""
    torch.manual_seed(0)
    batches = [(torch.randn(4, 4), torch.zeros(4).long())] * 3
    said = []
    for told in (False, True):
        try:
            fxprune.distill(Idle(), Idle(), batches, config=DistillConfig(1, device="cpu", unused_parameters=told))
            said.append("")
        except fxprune.FxPruneError as error:
            said.append(str(error))
    return said


class Cut(Exception):
    """Stands for a kill."""


def cut_and_resumed(out: Path) -> None:
    """The case "shuffled" again, cut at the end of its second epoch and taken up in the middle of it."""
    out.mkdir(exist_ok=True)
    scores = iter([0.0, 1.0])

    def validate(module: nn.Module) -> float:
        try:
            return next(scores)
        except StopIteration:
            raise Cut from None

    kept = {"checkpoint_dir": out, "checkpoint_every": 3}
    with contextlib.suppress(Cut):
        distilled("shuffled", out, validate=validate, **kept)
    scores = iter([2.0, 3.0])
    torch.distributed.barrier()
    distilled("shuffled", out, validate=validate, resume=True, **kept)


def main(out: Path) -> None:
    for kind in CASES:
        distilled(kind, out)
    cut_and_resumed(out / "cut")
    (out / f"other-{torch.distributed.get_rank()}.txt").write_text(other_batches())
    (out / f"unused-{torch.distributed.get_rank()}.json").write_text(json.dumps(unused()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
