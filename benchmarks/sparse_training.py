"""What sparse training is worth at equal epochs, on scikit-learn's digits: ``python -m benchmarks.sparse_training``.

With: two thirds of the epochs with ``fxprune.regularize``, then ``Policy.from_zeros``, then the last third on the slim network.
Without: two thirds of the epochs plain, the same share of every group by magnitude, then the same. Before: without the last third.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxprune

X = torch.zeros(2, 1, 8, 8)
RATE = 0.05


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits: Any = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(digits.target)[order]
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, strength: float = 0.0) -> None:
    penalty = fxprune.regularize(fxprune.analyze(model, X), strength) if strength else None
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            if penalty is not None:
                penalty.shrink(RATE)
    model.eval()


def run(seed: int, epochs: int, strength: float) -> dict[str, float]:
    """Accuracies on 597 images, and the share of the multiply-accumulates that is left."""
    images, labels, test, wanted = data()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(test).argmax(1) == wanted).float().mean())

    torch.manual_seed(seed)
    sparse = network()
    train(sparse, images, labels, epochs - epochs // 3, strength)
    slim = fxprune.compress(sparse, fxprune.Policy.from_zeros(fxprune.analyze(sparse, X)), X)
    record = fxprune.record(slim)
    sizes = {group.name: group.size for group in fxprune.analyze(sparse, X).groups}
    shares = {name: len(units) / sizes[name] for name, units in record.removed_units.items()}
    torch.manual_seed(seed)
    plain = network()
    train(plain, images, labels, epochs - epochs // 3)
    pruned = fxprune.compress(plain, shares, X, importance="l2")
    found = {"with, before": accuracy(slim), "without, before": accuracy(pruned), "left": record.after.macs / record.before.macs}
    train(slim, images, labels, epochs // 3)
    train(pruned, images, labels, epochs // 3)
    train(plain, images, labels, epochs // 3)
    return {**found, "with": accuracy(slim), "without": accuracy(pruned), "unpruned": accuracy(plain)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.004, 0.006, 0.01])
    given = parser.parse_args(arguments)
    print("| strength | MACs left | with, before | without, before | with | without | unpruned |\n|" + " ---: |" * 7)
    for strength in given.strengths:
        rows = [run(seed, given.epochs, strength) for seed in range(given.seeds)]
        cells = [[row[key] for row in rows] for key in ("left", "with, before", "without, before", "with", "without", "unpruned")]
        print(f"| {strength} | " + " | ".join(f"{sum(c) / len(c):.1%} ({min(c):.1%} to {max(c):.1%})" for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
