"""A network trained from scratch to half its multiply-accumulates: pruned while it trains, against trained dense and pruned afterwards.

    python examples/prune_from_scratch.py [DATA [MODEL [MINUTES]]]

DATA: what fxprune.data.load_data reads; digits if left out. MODEL: package.module:factory, as fxprune.models:resnet20 for CIFAR. Both roads
get the same MINUTES of training (15 unless given) and the same schedule; the slim network of the first makes more steps in its time. With
FXPRUNE_EXAMPLE_BUDGET=small it is over in seconds. Needs the extra: pip install 'fxprune[search]'.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.data.datasets import Data, load_data
from fxprune.evaluation.accuracy import evaluate_accuracy
from fxprune.models.loading import load_model

SMALL = os.environ.get("FXPRUNE_EXAMPLE_BUDGET") == "small"
BATCH, RATE = 128, 0.1
TARGET = "macs=0.5"


def endless(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    batches = data.batches("train", BATCH, training=True)
    while True:
        yield from batches


class Loop:
    """Plain SGD by the clock: the rate falls in a straight line to nothing when the time is up."""

    def __init__(self, model: nn.Module, seconds: float, begun: float = 0.0) -> None:
        self.seconds, self.begun, self.steps = seconds, begun, 0
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def run(self, data: Data, network: Callable[[], nn.Module], after: Callable[[], torch.optim.Optimizer], share: float = 1.0) -> None:
        """Train what ``network`` gives until ``share`` of the time is used; ``after`` gives the optimizer of the next step."""
        start = time.process_time()
        for images, labels in endless(data):
            done = self.begun + (time.process_time() - start) / self.seconds
            if done >= share:
                self.begun = done
                return
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * (1 - done)
            self.optimizer.zero_grad()
            F.cross_entropy(network().train()(images), labels).backward()
            self.optimizer.step()
            self.steps += 1
            self.optimizer = after()


def test_accuracy(model: nn.Module, data: Data) -> float:
    return evaluate_accuracy(model.eval(), data.batches("test", 500, limit=200 if SMALL else None))


def while_training(model: nn.Module, data: Data, seconds: float) -> tuple[nn.Module, int]:
    """Cuts between a tenth and half of the steps that the dense network would make."""
    loop = Loop(model, seconds)
    begun = time.process_time()
    loop.run(data, lambda: model, lambda: loop.optimizer, share=0.02)
    expected = max(10, int(loop.steps * seconds / max(1e-3, time.process_time() - begun)))
    # ``step`` counts from here on; what was trained so far is a fiftieth of all.
    begin, end, cuts = (1, 4, 2) if SMALL else (int(0.08 * expected), int(0.5 * expected), 10)
    pruning = fxprune.GradualPruning(model, loop.optimizer, data.example()[:1], TARGET, begin=begin, end=end, cuts=cuts)

    def after() -> torch.optim.Optimizer:
        pruning.step()
        return pruning.optimizer

    loop.run(data, lambda: pruning.model, after)
    print(f"cuts (step, share left): {[(step, round(share, 2)) for step, share in pruning.history]}")
    return pruning.model, loop.steps


def afterwards(model: nn.Module, data: Data, seconds: float) -> tuple[nn.Module, int]:
    """Two thirds of the time dense; then half of the network goes at once, by error tables and with a repair; then the rest of the time."""
    loop = Loop(model, seconds)
    loop.run(data, lambda: model, lambda: loop.optimizer, share=2 / 3)
    print(f"dense after {loop.steps} steps: {test_accuracy(model, data):.1%}")
    calibration = list(data.batches("train", 64, limit=64 if SMALL else 512))
    slim = fxprune.compress(model.eval(), TARGET, data.example()[:1], calibration=calibration, repair="lstsq")
    print(f"pruned: {test_accuracy(slim, data):.1%}")
    loop.optimizer = fxprune.rebind(loop.optimizer, slim)
    loop.run(data, lambda: slim, lambda: loop.optimizer)
    return slim, loop.steps


def main(spec: str = "digits", network: str = "fxprune.models:digits_net", minutes: str = "15") -> None:
    torch.set_num_threads(1)
    data = load_data(spec, seed=0)
    seconds = 6.0 if SMALL else 60 * float(minutes)
    for name, road in (("while training", while_training), ("afterwards", afterwards)):
        torch.manual_seed(0)
        slim, steps = road(load_model(network, num_classes=data.num_classes), data, seconds)
        costs = fxprune.record(slim)
        left = costs.after.macs / costs.before.macs
        print(f"{name}: {test_accuracy(slim, data):.2%} of the test part, {left:.1%} of the multiply-accumulates, {steps} steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
