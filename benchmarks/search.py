"""What a search costs beside running its networks: its time over the bare forward time of the same slim networks on the same batches.

    python benchmarks/search.py --data parquet:../shared/data/cifar10 --weights ../shared/data/models/resnet20_cifar10.safetensors

Scoring a candidate is slicing, repairing and evaluating it. Bare forward time: the scoring batches once and, for a repair that runs the
network, the calibration batches once, on the candidate as it is, nothing else: re-estimating BatchNorm is a forward pass too, and counts on
both sides. Times are those of the processor on one thread, which other programs change little. Peak memory is that of the process above
what the data and the model already took (tracemalloc does not see tensors; the operating system's high-water mark does).
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import numpy as np
import torch
from torch import nn

import fxprune
from fxprune.cli.session import Accuracy
from fxprune.data.datasets import load_data
from fxprune.evaluation.accuracy import evaluate_accuracy
from fxprune.models.loading import load_model
from fxprune.searching.candidates import Score
from fxprune.searching.problem import make_problem


def forward_seconds(module: nn.Module, batches: list[Any]) -> float:
    """Bare time of one pass."""
    begun = time.process_time()
    with torch.no_grad():
        for images, _ in batches:
            module(images)
    return time.process_time() - begun


def measured(repair: str, options: argparse.Namespace) -> str:
    """One line of the table."""
    data = load_data(options.data, seed=0)
    model = load_model(options.model, num_classes=data.num_classes, weights=options.weights).eval()
    example = data.example()
    validation = list(data.batches("validation", 64, limit=options.score_images))
    calibration = list(data.batches("train", 64, limit=options.calibration_images))
    graph = fxprune.analyze(model, example)
    problem, candidates = make_problem(graph, Accuracy(validation), calibration=calibration, importance="l2", repair=repair)
    score = problem.score
    assert isinstance(score, Score)
    drawn = np.random.default_rng(0)
    vectors = [drawn.integers(0, problem.units // 2 + 1) for _ in range(options.candidates + 1)]
    score(vectors[0])  # the original's responses, which a search computes once
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scoring = repairing = bare = 0.0
    for vector in vectors[1:]:
        begun = time.process_time()
        score(vector)
        scoring += time.process_time() - begun
        slim, slimmer = candidates.made(vector)
        slim.eval()
        bare += forward_seconds(slim, validation) + (0.0 if repair == "none" else forward_seconds(slim, calibration))
        begun = time.process_time()
        score.repairer(slim, slimmer)
        repairing += time.process_time() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
    accuracy = evaluate_accuracy(slim, validation)
    ratio, share = scoring / bare, repairing / scoring
    each = scoring / options.candidates
    return f"| {repair} | {each:.2f} | {bare / options.candidates:.2f} | {ratio:.2f} | {share:.0%} | {grown:.0f} MiB | {accuracy:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--model", default="fxprune.models:resnet20")
    parser.add_argument("--repairs", default="none,bn,lstsq")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--score-images", type=int, default=1000)
    parser.add_argument("--calibration-images", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| repair | seconds a candidate | bare forward | ratio | share of repair | memory grown | accuracy of the last |")
    print("|---|---|---|---|---|---|---|")
    for repair in options.repairs.split(","):
        print(measured(repair, options), flush=True)


if __name__ == "__main__":
    main()
