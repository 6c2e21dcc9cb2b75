"""Train a small network on scikit-learn's digits, take 40 % of every group, and let it learn from the original again.

Needs the extra: pip install 'fxprune[search]'. About 15 seconds on one core.
"""

from __future__ import annotations

import os

import torch
from torch import nn

import fxprune
from fxprune.data.datasets import load_data
from fxprune.evaluation.accuracy import evaluate_accuracy, recalibrate_batchnorm
from fxprune.models.small import digits_net
from fxprune.training.config import Progress, TrainConfig
from fxprune.training.fitting import train

SMALL = os.environ.get("FXPRUNE_EXAMPLE_BUDGET") == "small"

data = load_data("digits")
torch.manual_seed(0)
model = digits_net()
batches = data.batches("train", 64, training=True)
train(model, batches, config=TrainConfig(epochs=4 if SMALL else 15, lr=0.1))


def validate(module: nn.Module) -> float:
    return evaluate_accuracy(module, data.batches("validation"))


def tell(progress: Progress) -> None:
    if progress.step == progress.steps:
        print(f"epoch {progress.epoch}/{progress.epochs}: loss {progress.loss:.3f}, accuracy {progress.accuracy:.1%}")


calibration = list(data.batches("train", 64, limit=256))
slim = fxprune.compress(model, 0.4, data.example(), calibration=calibration)
recalibrate_batchnorm(slim, calibration)
pruned = evaluate_accuracy(slim, data.batches("test"))
fxprune.distill(slim, model, batches, config=fxprune.DistillConfig(epochs=3 if SMALL else 10, validate=validate, on_step=tell))

costs = fxprune.record(slim)
print(f"multiply-accumulates left: {costs.after.macs / costs.before.macs:.0%}; test accuracy:")
for stage, accuracy in (
    ("trained", evaluate_accuracy(model, data.batches("test"))),
    ("pruned", pruned),
    ("distilled", evaluate_accuracy(slim, data.batches("test"))),
):
    print(f"  {stage:10}{accuracy:.1%}")
