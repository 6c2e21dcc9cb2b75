"""What a search costs beside running its networks: its time over the bare forward time of the same slim networks on the same batches.

    python benchmarks/search.py --data parquet:../shared/data/cifar10 --weights ../shared/data/models/resnet20_cifar10.safetensors

Scoring a candidate is slicing, repairing and evaluating it. Bare forward time: the scoring batches once and, for a repair that runs the
network, the calibration batches once, on the candidate as it is, nothing else: re-estimating BatchNorm is a forward pass too, and counts on
both sides. Times are those of the processor on one thread, which other programs change little. Peak memory is that of the process above
what the data and the model already took (tracemalloc does not see tensors; the operating system's high-water mark does).

``--jobs N`` instead compares one job with N, as a search runs them: the same candidates, the two taking turns, in seconds a candidate, the
median of the turns. Efficiency is the time of one job over N times that of N jobs, by the clock on the wall and by the processor time of
the busiest process, which is what the wall would show if every job had a core to itself. Until every worker has the network it takes a
start, which is given alone, in seconds; *load* is the machine's, of the last minute.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fxprune
from fxprune.cli.session import Accuracy
from fxprune.data.datasets import load_data
from fxprune.driver import SearchConfig
from fxprune.driver.executors.choice import make
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


def task(repair: str, options: argparse.Namespace) -> tuple[Score, Any, list[Any], list[Any], list[Any]]:
    """The score, the candidates' maker, removal vectors (one more than candidates are asked for), and the batches."""
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
    return score, candidates, vectors, validation, calibration


def in_parallel(repair: str, options: argparse.Namespace) -> str:
    """One line of the table of jobs."""
    score, _, vectors, _, _ = task(repair, options)
    one, several = make(SearchConfig(jobs=1)), make(SearchConfig(jobs=options.jobs))
    walls: list[tuple[float, float]] = []
    busy: list[tuple[float, float]] = []

    def seconds(executor: Any, candidates: list[Any]) -> tuple[float, float]:
        """On the wall, and of the processor in the busiest of the processes that score."""
        before, begun = processor_seconds(), time.perf_counter()
        executor.map(score, candidates)
        wall, after = time.perf_counter() - begun, processor_seconds()
        return wall, max(after[pid] - before.get(pid, 0.0) for pid in after)

    try:
        seconds(one, vectors[:1])
        start, _ = seconds(several, vectors[:1] * options.jobs)
        for _ in range(options.turns):
            sides = seconds(one, vectors[1:]), seconds(several, vectors[1:])
            walls.append((sides[0][0], sides[1][0]))
            busy.append((sides[0][1], sides[1][1]))
    finally:
        several.close()
    cells = []
    for turns in (walls, busy):
        single, shared = (statistics.median(side) / options.candidates for side in zip(*turns, strict=True))
        cells.append(f"{single:.2f} | {shared:.2f} | {single / (options.jobs * shared):.2f}")
    return f"| {repair} | {' | '.join(cells)} | {start:.1f} | {os.getloadavg()[0]:.1f} |"


def processor_seconds() -> dict[int, float]:
    """What this process and its workers have used of the processor, by process id (of Linux)."""
    found = {os.getpid(): time.process_time()}
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        found[int(worker.pid or 0)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def measured(repair: str, options: argparse.Namespace) -> str:
    """One line of the table."""
    score, candidates, vectors, validation, calibration = task(repair, options)
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
    parser.add_argument("--jobs", type=int, default=1, help="compare one job with so many instead")
    parser.add_argument("--turns", type=int, default=3, help="of one job and of several")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.jobs > 1:
        sides = f"one job | {options.jobs} jobs | efficiency"
        print(f"| repair | wall: {sides} | processor: {sides} | start | load |")
        print(f"|---{'|---' * 8}|")
        for repair in options.repairs.split(","):
            print(in_parallel(repair, options), flush=True)
        return
    print("| repair | seconds a candidate | bare forward | ratio | share of repair | memory grown | accuracy of the last |")
    print("|---|---|---|---|---|---|---|")
    for repair in options.repairs.split(","):
        print(measured(repair, options), flush=True)


if __name__ == "__main__":
    main()
