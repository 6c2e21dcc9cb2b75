"""ResNet-20 on CIFAR-10 from training to a slim, distilled, saved network, in Python; fxprune-search does the same from a shell.

    python examples/cifar10_end_to_end.py DATA [WEIGHTS]

DATA: torchvision:CIFAR10:DIR, parquet:DIR, or whatever else fxprune.data.load_data reads; nothing is downloaded. WEIGHTS: a state_dict of
fxprune.models.resnet20 in a .safetensors file; without it the network is trained first, which takes hours without a GPU. Needs the extra:
pip install 'fxprune[search]'. With FXPRUNE_EXAMPLE_BUDGET=small an epoch of everything.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

import fxprune
from fxprune.data.datasets import load_data
from fxprune.evaluation.accuracy import evaluate_accuracy, recalibrate_batchnorm
from fxprune.models.loading import load_weights
from fxprune.models.small import resnet20
from fxprune.training.config import TrainConfig
from fxprune.training.fitting import train

SMALL = os.environ.get("FXPRUNE_EXAMPLE_BUDGET") == "small"


def main(spec: str, weights: str | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    data = load_data(spec)
    model = resnet20(num_classes=data.num_classes).to(device)
    batches = data.batches("train", 128, training=True, device=device)
    held_out = list(data.batches("validation", limit=1000, device=device))
    calibration = list(data.batches("train", limit=256, device=device))

    def evaluate(module: nn.Module) -> float:
        """On images held out of training; the test part waits for the end."""
        return evaluate_accuracy(module, held_out)

    if weights is not None:
        load_weights(model, weights)
    else:
        train(model, batches, config=TrainConfig(epochs=1 if SMALL else 100, lr=0.1, device=device, validate=evaluate))
    model.eval()

    rounds, samples = (2, 2) if SMALL else (40, 5)
    config = fxprune.SearchConfig(targets="macs=0.5", rounds=rounds, samples=samples)
    found = fxprune.search(model, data.example().to(device), evaluate, config=config, calibration=calibration)
    print(f"{found.evaluations} networks scored; the best keeps {found.reward:.1%} of the held-out images right before any training")

    slim = found.model
    recalibrate_batchnorm(slim, calibration)
    pruned = evaluate_accuracy(slim, data.batches("test", device=device))
    epochs = fxprune.DistillConfig(epochs=1 if SMALL else 20, device=device, validate=evaluate)
    fxprune.distill(slim, model, batches, config=epochs)
    found.policy.save("policy.json")
    fxprune.save(slim, "slim.safetensors")

    costs = fxprune.record(slim)
    print(f"multiply-accumulates left: {costs.after.macs / costs.before.macs:.1%}; test accuracy:")
    print(f"  original   {evaluate_accuracy(model, data.batches('test', device=device)):.2%}")
    print(f"  pruned     {pruned:.2%}")
    print(f"  distilled  {evaluate_accuracy(slim, data.batches('test', device=device)):.2%}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("no data given, nothing done: python examples/cifar10_end_to_end.py torchvision:CIFAR10:DIR | parquet:DIR [WEIGHTS]")
    else:
        main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
