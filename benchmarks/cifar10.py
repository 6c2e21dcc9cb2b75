"""Who keeps most of a network on CIFAR-10 at half its multiply-accumulates: fxprune's strategies and Torch-Pruning's pruners.

    python benchmarks/cifar10.py --data parquet:../shared/data/cifar10 --weights ../shared/data/models/resnet20_cifar10.safetensors
    python benchmarks/cifar10.py --data parquet:../shared/data/cifar10 --name "A small VGG" --model benchmarks.small_vgg:small_vgg \
        --weights small_vgg.safetensors --train-first 12 --theirs '*'

Where the file of weights is not there, ``--train-first`` epochs of training make it.
A cell is a method with a seed. Each finished cell is one line of ``--out``; started again, the script goes on with those that are missing
and writes the page ``--page`` anew after each. Candidates are scored on held-out training images; the test part is read once a cell.
Needs the extras `search`, `optuna` and, for the methods tp-*, `bench`.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fxprune
from fxprune import driver
from fxprune.data.datasets import Data, load_data
from fxprune.driver import SearchConfig
from fxprune.evaluation.accuracy import evaluate_accuracy, recalibrate_batchnorm
from fxprune.evaluation.likeness import Likeness
from fxprune.models.loading import load_model
from fxprune.repair.repairer import Repairer
from fxprune.searching.candidates import Candidates
from fxprune.searching.problem import make_problem
from fxprune.searching.result import repair_result
from fxprune.training.config import TrainConfig
from fxprune.training.distillation import DistillConfig
from fxprune.training.fitting import train

OURS = ("uniform", "magnitude", "random", "optuna:TPESampler", "rl-pruner")
BY_HAND = "<!-- What follows is written by hand. -->"
THEIRS = ("tp-l2-uniform", "tp-l2-global", "tp-taylor-uniform", "tp-bnscale-global", "tp-lamp-global")


class Remembering(nn.Module):
    """A teacher that answers a batch it has seen before from memory: all methods of a seed train on the same augmented batches."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.answers: dict[bytes, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        key = images[:, :, ::5, ::5].double().sum((1, 2, 3)).numpy().tobytes()
        if key not in self.answers:
            self.answers[key] = self.teacher(images).float()
        return self.answers[key]


class Bench:
    """The network, the data and the options that all cells share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data: Data = load_data(options.data, seed=0)
        if options.train_first and not Path(options.weights).exists():
            self.train_first()
        self.model = load_model(options.model, num_classes=self.data.num_classes, weights=options.weights).eval()
        self.model.to(memory_format=torch.channels_last)
        self.example = self.data.example()
        self.teachers: dict[int, Remembering] = {}
        self.macs = fxprune.profile(self.model, self.example).macs

    def train_first(self) -> None:
        """Train the network on all training images and write its weights."""
        o = self.options
        torch.manual_seed(0)
        model = load_model(o.model, num_classes=self.data.num_classes).to(memory_format=torch.channels_last)
        loader = self.data.batches("train", 128, training=True, seed=0)
        train(model, loader, config=TrainConfig(epochs=o.train_first, lr=0.1, precision=o.precision))
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, o.weights)

    def batches(self, part: Any, limit: int, seed: int) -> list[Any]:
        """Images to score and to repair on, as ``fxprune-search`` takes them."""
        return list(self.data.batches(part, 64, limit=limit, seed=seed, augmented=not self.options.as_they_are))

    def plain(self, limit: int, seed: int) -> list[Any]:
        """Training images as they are: BatchNorm's statistics are to be those of test images."""
        return list(self.data.batches("train", 64, limit=limit, seed=seed))

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """One cell."""
        torch.manual_seed(seed)
        self.removed: dict[str, int] = {}
        begun, spent = time.perf_counter(), time.process_time()
        slim, evaluations = (self.theirs if method in THEIRS else self.ours)(method, seed)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - spent
        profile = fxprune.profile(slim, self.example)
        cell = {
            "method": method,
            "seed": seed,
            "before": evaluate_accuracy(slim, self.data.batches("test", 64)),
            "after": None,
            "macs": profile.macs / self.macs,
            "params": profile.params / fxprune.profile(self.model, self.example).params,
            "latency": self.latency(slim) / self.latency(self.model),
            "evaluations": evaluations,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "removed": self.removed,
        }
        if self.options.epochs:
            cell["after"] = self.trained(slim, seed)
        return cell

    def ours(self, method: str, seed: int) -> tuple[nn.Module, int]:
        o = self.options
        score = Likeness.of(self.model, self.batches("validation", o.score_images, seed))
        config = SearchConfig(
            targets=(f"macs={o.macs}",),
            strategy=method,
            seed=seed,
            evaluations=o.evaluations,
            rounds=o.evaluations,
            screen=o.screen,
            patience=None,  # all methods use all their evaluations
            repair=o.repair,
        )
        graph = fxprune.analyze(self.model, self.example)
        problem, candidates = make_problem(
            graph, score, calibration=self.batches("train", o.calibration_images, seed), repair=o.repair, seed=seed
        )
        outcome = driver.run(problem, config)
        self.removed = dict(zip(candidates.names, outcome.removed.tolist(), strict=True))
        return self.repaired(candidates, outcome.removed, seed), outcome.evaluations

    def repaired(self, candidates: Candidates, removed: Any, seed: int) -> nn.Module:
        repairer = Repairer(candidates.graph, self.batches("train", self.options.repair_images, seed), self.options.repair)
        policy = candidates.policy(removed, {}, "l2")
        return repair_result(fxprune.compress(candidates.graph, policy), removed, candidates, repairer).eval()

    def theirs(self, method: str, seed: int) -> tuple[nn.Module, int]:
        """BatchNorm is re-estimated on as many images as our repair reads."""
        o = self.options

        def fresh() -> nn.Module:
            return load_model(o.model, num_classes=self.data.num_classes, weights=o.weights).eval()

        slim = torch_pruned(fresh, self.example, method, o.macs, o.theirs, self.plain(256, seed))
        slim.to(memory_format=torch.channels_last)
        recalibrate_batchnorm(slim, self.plain(o.repair_images, seed))
        return slim.eval(), 0

    def latency(self, model: nn.Module) -> float:
        return fxprune.profile(model, torch.cat([self.example] * 32)).latency(runs=15)

    def trained(self, slim: nn.Module, seed: int) -> float:
        o = self.options
        train = self.data.batches("train", 128, training=True, limit=o.train_images, seed=seed)
        if seed not in self.teachers:
            self.teachers = {seed: Remembering(self.model)}
        slim.to(memory_format=torch.channels_last)
        fxprune.distill(slim, self.teachers[seed], train, config=DistillConfig(epochs=o.epochs, seed=seed, precision=o.precision))
        return evaluate_accuracy(slim.eval(), self.data.batches("test", 64))


def torch_pruned(
    fresh: Callable[[], nn.Module], example: Tensor, method: str, share: float, theirs: str, labelled: Sequence[Any], halvings: int = 12
) -> nn.Module:
    """Torch-Pruning on the convolutions that the glob ``theirs`` names, as little as meets the share of the MACs, nothing repaired.

    Of ResNet-20 these are the convolutions inside the blocks: with the parameter-free shortcuts its result does not run when more goes.
    ``fresh``: makes the network. ``method``: tp-CRITERION-SCOPE, as in ``THEIRS``. ``labelled``: what the Taylor criterion reads.
    """
    tp = importlib.import_module("torch_pruning")
    _, kind, scope = method.split("-")
    whole = fxprune.profile(fresh(), example).macs

    def pruned(ratio: float) -> nn.Module:
        model = fresh()
        importance = {
            "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
            "taylor": tp.importance.GroupTaylorImportance,
            "bnscale": tp.importance.BNScaleImportance,
            "lamp": tp.importance.LAMPImportance,
        }[kind]()
        layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        fixed = [m for n, m in layers.items() if isinstance(m, nn.Linear) or not fnmatch.fnmatchcase(n, theirs)]
        if kind == "taylor":
            for images, labels in labelled:
                nn.functional.cross_entropy(model(images), labels).backward()
        pruner = tp.pruner.BasePruner(
            model, example, importance, pruning_ratio=ratio, global_pruning=scope == "global", ignored_layers=fixed
        )
        pruner.step()
        model.zero_grad(set_to_none=True)
        return model

    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if fxprune.profile(pruned(middle), example).macs <= share * whole else (middle, high)
    return pruned(high)


def page(cells: Sequence[Mapping[str, Any]], original: float, command: str, options: argparse.Namespace) -> str:
    """The table, a row a method, means over the seeds that are done."""
    rows = []
    for method in sorted({c["method"] for c in cells}, key=(*THEIRS, *OURS).index):
        mine = [c for c in cells if c["method"] == method]

        def mean(key: str, form: Callable[[float], str], mine: list[Mapping[str, Any]] = mine) -> str:
            found = [c[key] for c in mine if c[key] is not None]
            return form(statistics.mean(found)) if found else "not run"

        def ranged(key: str, mine: list[Mapping[str, Any]] = mine) -> str:
            found = [100 * c[key] for c in mine if c[key] is not None]
            return f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ""

        share, whole = "{:.1%}".format, "{:.0f}".format
        figures = [mean("after", share) + ranged("after"), mean("macs", share), mean("params", share), mean("latency", share)]
        counts = [mean("evaluations", whole), mean("seconds", whole), mean("cpu_seconds", whole), str(len(mine))]
        rows.append("| " + " | ".join([method, mean("before", share) + ranged("before"), *figures, *counts]) + " |")
    images = f"{options.train_images} training images, drawn once a seed" if options.train_images else "all training images"
    precision = "" if options.precision == "no" else f", in {options.precision} mixed precision"
    trained = f"{options.epochs} epochs of distillation on {images}{precision}" if options.epochs else "no training"
    head = "| method | top-1 before training | after | MACs | parameters | latency | evaluations | seconds | CPU seconds | seeds |"
    return "\n".join(
        [
            f"# {options.name} on CIFAR-10 at half the multiply-accumulates",
            "",
            "Written by the command below from its results, a row for each method, means over the seeds that were run (range in brackets).",
            "",
            f"```console\n$ {command}\n```",
            "",
            f"Original: {original:.2%} top-1. Candidates are scored on {options.score_images} held-out training images,"
            f" {'as they are' if options.as_they_are else 'augmented as in training'},"
            f" by likeness to the original's class scores, after repair ({options.repair}) on {options.calibration_images} training images;"
            f" what is found is repaired once more on {options.repair_images}."
            f" Torch-Pruning's networks have BatchNorm re-estimated on {options.repair_images} training images as they are."
            f" The column *after*: {trained}. MACs, parameters and latency (batch of 32, one thread) are shares of the original's.",
            "",
            head,
            "|" + "---|" * 10,
            *rows,
            "",
            BY_HAND,
            "",
            "",
        ]
    )


def write_page(path: Path, text: str) -> None:
    """Write the page anew, but for what stands below the line ``BY_HAND``."""
    below = path.read_text().partition(BY_HAND + "\n\n")[2] if path.exists() else ""
    path.write_text(text + below)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--model", default="fxprune.models:resnet20")
    parser.add_argument("--name", default="ResNet-20", help="of the network, for the page's title")
    parser.add_argument(
        "--train-first", type=int, default=0, help="epochs of training that make the weights, where their file is not there"
    )
    parser.add_argument("--theirs", default="layer*conv1", help="glob of the convolutions whose channels Torch-Pruning may remove")
    parser.add_argument("--methods", default=",".join((*THEIRS, *OURS)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--repair", default="lstsq")
    parser.add_argument("--evaluations", type=int, default=400)
    parser.add_argument("--as-they-are", action="store_true", help="score and repair on images without augmentation")
    parser.add_argument("--screen", type=int, default=SearchConfig.screen, help="actions that rl-pruner draws for each one scored")
    parser.add_argument("--score-images", type=int, default=1000)
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--repair-images", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=5, help="of distillation; 0: none")
    parser.add_argument("--train-images", type=int, default=None, help="images a training epoch; default: all")
    parser.add_argument("--precision", default="bf16", help="of the training: no or bf16")
    parser.add_argument("--out", type=Path, default=Path("cifar10.jsonl"))
    parser.add_argument("--page", type=Path, default=None, help="markdown file to write, for example docs/cifar10.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    cells = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if not any(c["method"] == "original" for c in cells):
        original = {"method": "original", "seed": 0, "before": evaluate_accuracy(bench.model, bench.data.batches("test", 64))}
        cells.append(original)
        _append(options.out, original)
    original_accuracy = next(c["before"] for c in cells if c["method"] == "original")

    def show() -> None:
        if options.page is not None:
            shown = [c for c in cells if c["method"] != "original"]
            write_page(options.page, page(shown, original_accuracy, "python " + shlex.join(sys.argv), options))

    for seed in map(int, options.seeds.split(",")):
        for method in options.methods.split(","):
            if any(c["method"] == method and c["seed"] == seed for c in cells):
                continue
            cell = bench.run(method, seed)
            print(json.dumps(cell), flush=True)
            cells.append(cell)
            _append(options.out, cell)
            show()
    show()


def _append(path: Path, cell: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(cell) + "\n")


if __name__ == "__main__":
    main()
