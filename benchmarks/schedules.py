"""One-shot pruning against pruning in steps, at the same number of training epochs, on scikit-learn's digits.

    python benchmarks/schedules.py [--sparsity 0.7] [--epochs 12] [--seeds 3]

Prints a markdown table: accuracy on the test part (mean and range over seeds) and seconds, for every number of steps.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import nn

import fxprune
from fxprune.data.datasets import load_data
from fxprune.evaluation.accuracy import evaluate_accuracy
from fxprune.models.small import digits_net
from fxprune.training.config import TrainConfig
from fxprune.training.fitting import train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sparsity", type=float, default=0.7, help="share of every group's units that goes")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of distillation in all, shared out among the steps")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[int, list[tuple[float, float, float, float]]] = {}
    for seed in range(given.seeds):
        data = load_data("digits", seed=seed)
        batches = data.batches("train", 64, training=True, seed=seed)
        calibration = list(data.batches("train", 64, limit=256, seed=seed))
        torch.manual_seed(seed)
        model = digits_net()
        train(model, batches, config=TrainConfig(20, 0.1, device="cpu", seed=seed))
        whole = evaluate_accuracy(model, data.batches("test"))
        for steps in (1, 2, 4):

            def recover(slim: nn.Module, epochs: int = given.epochs // steps, seed: int = seed) -> None:
                fxprune.distill(slim, model, batches, config=fxprune.DistillConfig(epochs, device="cpu", seed=seed, replace_teacher=False))  # noqa: B023

            done = fxprune.shrink(model, given.sparsity, recover, data.example(), steps=steps, calibration=calibration, repair="bn")
            accuracy = evaluate_accuracy(done.model, data.batches("test"))
            pruning = sum(step["prune_seconds"] for step in done.history)
            found.setdefault(steps, []).append((whole, accuracy, pruning, done.seconds))
        macs = done.history[-1]["macs"]
    print(f"{macs:.1%} of the MACs left, {given.epochs} epochs of distillation in all, {given.seeds} seeds; original {_of(found[1], 0)}\n")
    print("| steps | test accuracy | seconds to prune | seconds in all |\n|---|---|---|---|")
    for steps, rows in found.items():
        seconds = [statistics.mean(row[column] for row in rows) for column in (2, 3)]
        print(f"| {steps} | {_of(rows, 1)} | {seconds[0]:.2f} | {seconds[1]:.1f} |")


def _of(rows: list[tuple[float, float, float, float]], column: int) -> str:
    values = [100 * row[column] for row in rows]
    return f"{statistics.mean(values):.2f} % ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
