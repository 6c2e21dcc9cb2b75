"""Half the multiply-accumulates without a label and without training: the error table against uniform, magnitude and a search.

    python -m benchmarks.allocation --folder ../shared/data --page docs/benchmarks/allocation.md

``tried`` is what ``compress(net, "macs=0.5", x, calibration=images)`` does: the table's allocation beside others on a part of the images.
All methods get the same unlabelled training images, repair by least squares and target. A search scores its candidates by how like they
are to the original on some of these images, repairs them on the others, and its result on all. The test part is read once a cell. Each
finished cell is one line of ``--out``; started again, the command goes on with those that are missing. Needs the extra `search`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fxprune
from benchmarks.imagenet500 import pictures
from fxprune import driver
from fxprune.allocation.allocating import allocate
from fxprune.allocation.trying import TRIALS
from fxprune.data.datasets import Data, load_data
from fxprune.driver import SearchConfig
from fxprune.evaluation.accuracy import evaluate_accuracy
from fxprune.evaluation.likeness import Likeness
from fxprune.models.loading import load_model
from fxprune.repair.repairer import Repairer
from fxprune.searching.problem import make_problem
from fxprune.searching.result import mended

RESNET = {"data": "cifar10-lossless", "classes": 10, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DENSENET = {"data": "cifar100", "classes": 100, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
NETWORKS: dict[str, dict[str, Any]] = {
    name: {**RESNET, "title": title, "model": f"fxprune.models:{name}", "weights": f"models/{name}_cifar10_published.safetensors"}
    for name, title in (("resnet20", "ResNet-20"), ("resnet32", "ResNet-32"), ("resnet44", "ResNet-44"))
}
NETWORKS["densenet_bc100"] = {
    **DENSENET,
    "title": "DenseNet-BC-100",
    "model": "benchmarks.densenet_bc:densenet_bc100",
    "weights": "models/densenet_bc100_k12_cifar100.safetensors",
}
NETWORKS["efficientnet_lite0"] = {"title": "EfficientNet-Lite0", "model": "benchmarks.imagenet500:efficientnet_lite0"}
NETWORKS["efficientnet_lite0"] |= {"data": "imagenet500", "classes": 1000, "mean": None, "std": None, "weights": None}
CIFAR = ("resnet20", "resnet32", "resnet44", "densenet_bc100")
BATCHES = {"efficientnet_lite0": 25}  # samples of a batch, where not 64


def cell(name: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One network by one method, a strategy's name, for rl-pruner with its number of evaluations behind a colon; or "dense"."""
    spec = NETWORKS[name]
    if spec["data"] == "imagenet500":
        data = pictures(options.folder / spec["data"])
    else:
        source = spec["data"] if spec["data"] == "digits" else f"parquet:{options.folder / spec['data']}"
        data = load_data(source, mean=spec["mean"], std=spec["std"], seed=0)
    weights = None if spec["weights"] is None else options.folder / spec["weights"]
    model = load_model(spec["model"], num_classes=spec["classes"], weights=weights).eval()
    found = {"network": name, "method": method, "macs": 1.0, "params": 1.0, "evaluations": 0, "seconds": 0.0}
    if method != "dense":
        model, more = slimmed(model, data, method, options, BATCHES.get(name, 64))
        found |= more
    return {**found, "top1": evaluate_accuracy(model, data.batches("test", 100, limit=options.test_images, seed=1))}


def slimmed(
    model: torch.nn.Module, data: Data, method: str, options: argparse.Namespace, batch: int = 64
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The slim network, repaired, and what it took. Seconds are those of the processor, without the last repair."""
    strategy, _, count = method.partition(":")
    drawn = list(data.batches("train", batch, limit=options.images, seed=options.seed))
    if strategy == "tried":
        return tried(model, data, drawn, options)
    begun = time.process_time()
    graph = fxprune.analyze(model, data.example())
    config = SearchConfig(targets=(f"macs={options.macs}",), strategy=strategy, evaluations=int(count or 3), seed=options.seed)
    searched = strategy == "rl-pruner"
    calibration = drawn[len(drawn) // 2 :] if searched else drawn
    score = Likeness.of(model, drawn[: len(drawn) // 2 if searched else 1])
    problem, candidates = make_problem(graph, score, calibration=calibration, repair="lstsq", seed=options.seed, tabled=config.table)
    if searched:
        outcome = driver.run(problem, config)
        removed, evaluations = outcome.removed, outcome.evaluations
    else:  # these score nothing to find their allocation
        budget = driver.Budget(problem.space, config.points[0])
        (removed,), evaluations = driver.STRATEGIES[strategy](budget, config).ask(), 0
    seconds = time.process_time() - begun
    slim = mended(
        fxprune.compress(graph, candidates.policy(removed, {}, "l2")), removed, candidates, Repairer(graph, drawn, "lstsq")
    ).eval()
    before, after = fxprune.profile(model, data.example()), fxprune.profile(slim, data.example())
    shares = {"macs": after.macs / before.macs, "params": after.params / before.params}
    return slim, {
        **shares,
        "evaluations": evaluations,
        "seconds": seconds,
        "removed": dict(zip(candidates.names, removed.tolist(), strict=True)),
    }


def tried(model: torch.nn.Module, data: Data, drawn: list[Any], options: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Any]]:
    """What ``compress`` does with a target: the table's allocation and others tried on a part of the images."""
    trials: list[float] = []

    def shown(step: str, trial: Any, seconds: float) -> None:
        trials.append(seconds)
        print(f"{trial.name}: {trial.distance:.3f} ({trial.repair}, {seconds:.0f} s)", file=sys.stderr, flush=True)

    begun = time.process_time()
    graph = fxprune.analyze(model, data.example())
    bounds = {"macs": options.macs}
    policy = allocate(graph, bounds, drawn, repair="lstsq", trials=TRIALS, seed=options.seed, observe=shown)
    seconds = time.process_time() - begun
    slim = fxprune.compress(graph, policy, calibration=drawn, repair="lstsq").eval()
    before, after = fxprune.profile(model, data.example()), fxprune.profile(slim, data.example())
    shares = {"macs": after.macs / before.macs, "params": after.params / before.params}
    found = {"evaluations": len(trials), "seconds": seconds, "taken": policy.meta.get("taken"), "distances": policy.meta.get("distances")}
    return slim, {**shares, **found}


def page(cells: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """The table of all cells."""
    images = f"{options.test_images} images of the test part" if options.test_images else "the whole test part"
    lines = [
        "# An allocation without a search",
        "",
        "Written by the command below from its results. Top-1 before any training, "
        f"{options.macs:.0%} of the multiply-accumulates, {options.images} unlabelled training images, on {images}.",
        "",
        f"```console\n$ python -m benchmarks.allocation {shlex.join(sys.argv[1:])}\n```",
        "",
        "| network | method | top-1 | lost | MACs | parameters | evaluations | CPU seconds |",
        "|" + "---|" * 8,
    ]
    dense = {one["network"]: one["top1"] for one in cells if one["method"] == "dense"}
    for one in cells:
        lost = "" if one["method"] == "dense" else f"{100 * (dense[one['network']] - one['top1']):.1f}"
        figures = [
            f"{one['top1']:.1%}",
            lost,
            f"{one['macs']:.1%}",
            f"{one['params']:.1%}",
            str(one["evaluations"]),
            f"{one['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join([NETWORKS[one["network"]]["title"], one["method"], *figures]) + " |")
    return "\n".join([*lines, "", "<!-- What follows is written by hand. -->", "", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("../shared/data"), help="where data and weights lie")
    parser.add_argument("--networks", default=",".join(CIFAR))
    methods = "uniform,magnitude,table,tried,rl-pruner:60"
    parser.add_argument("--methods", default=methods, help="strategies, or tried; behind rl-pruner its evaluations")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=2048, help="unlabelled training images for all that is done")
    parser.add_argument("--test-images", type=int, default=None, help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("allocation.jsonl"))
    parser.add_argument("--page", type=Path, default=None, help="markdown file to write; what stands below its mark is kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for name in options.networks.split(","):
        for method in ("dense", *options.methods.split(",")):
            if not any((one["network"], one["method"]) == (name, method) for one in cells):
                cells.append(cell(name, method, options))
                print(json.dumps(cells[-1]), flush=True)
                with options.out.open("a") as file:
                    file.write(json.dumps(cells[-1]) + "\n")
    if options.page is not None:
        below = options.page.read_text().partition("<!-- What follows is written by hand. -->\n\n")[2] if options.page.exists() else ""
        options.page.write_text(page(cells, options) + below)


if __name__ == "__main__":
    main()
