"""Half the multiply-accumulates without a label and without training: the error table against uniform, magnitude and a search.

    python -m benchmarks.allocation --folder ../shared/data --page docs/benchmarks/allocation.md

``tried`` is what ``compress(net, "macs=0.5", x, calibration=images)`` does: the table's allocation beside others on a part of the images.
All methods get the same unlabelled training images, target, and repair by least squares, ``joint`` alone, otherwise like ``tried``, the
repair of its name. A search scores its candidates by how like they are to the original on some of these images, repairs them on the others,
and its result on all. Torch-Pruning's (``tp-l2-uniform`` and the others of ``benchmarks.cifar10``) take channels inside the blocks, and
BatchNorm is re-estimated. The test part is read once a cell; ``joint`` takes the allocation of its seed's cell of ``tried``, if it
is there. Each finished cell is one line of ``--out``; started again, the command goes on with those that are missing. Needs the extra
`search`, and for Torch-Pruning `bench`.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fxprune
from benchmarks.cifar10 import torch_pruned
from benchmarks.imagenet500 import pictures
from fxprune import driver
from fxprune.allocation.allocating import allocate
from fxprune.allocation.trying import TRIALS
from fxprune.data.datasets import Data, load_data
from fxprune.driver import SearchConfig
from fxprune.evaluation.accuracy import evaluate_accuracy, recalibrate_batchnorm
from fxprune.evaluation.likeness import Likeness
from fxprune.models.loading import load_model
from fxprune.repair.repairer import Repairer
from fxprune.searching.problem import make_problem
from fxprune.searching.result import repair_result

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
INSIDE = {"densenet_bc100": "dense*conv1"}  # what Torch-Pruning may take from, where not layer*conv1


def cell(name: str, method: str, seed: int, options: argparse.Namespace, same: dict[str, Any] | None = None) -> dict[str, Any]:
    """One network by one method, a strategy's name, for rl-pruner with its number of evaluations behind a colon; or "dense".

    ``same``: the cell of ``tried`` with this network and seed, whose allocation ``joint`` takes.
    """
    spec = NETWORKS[name]
    data = data_of(spec["data"], options.folder, spec["mean"], spec["std"])
    weights = None if spec["weights"] is None else options.folder / spec["weights"]

    def fresh() -> torch.nn.Module:
        return load_model(spec["model"], num_classes=spec["classes"], weights=weights).eval()

    model = fresh()
    found = {"network": name, "method": method, "seed": seed, "macs": 1.0, "params": 1.0, "evaluations": 0, "seconds": 0.0}
    if method.startswith("tp-"):
        drawn = list(data.batches("train", 64, limit=options.images, seed=seed))
        begun = time.process_time()
        slim = torch_pruned(fresh, data.example(), method, options.macs, INSIDE.get(name, "layer*conv1"), drawn[:4], halvings=8)
        recalibrate_batchnorm(slim, drawn)
        before, after = fxprune.profile(model, data.example()), fxprune.profile(slim, data.example())
        found |= {"macs": after.macs / before.macs, "params": after.params / before.params, "seconds": time.process_time() - begun}
        model = slim.eval()
    elif method != "dense":
        model, more = slimmed(model, data, method, options, seed, BATCHES.get(name, 64), same)
        found |= more
    return {**found, "top1": evaluate_accuracy(model, data.batches("test", 100, limit=options.test_images, seed=1))}


@functools.cache
def data_of(name: str, folder: Path, mean: Any, std: Any) -> Data:
    if name == "imagenet500":
        return pictures(folder / name)
    return load_data(name if name == "digits" else f"parquet:{folder / name}", mean=mean, std=std, seed=0)


def slimmed(
    model: torch.nn.Module,
    data: Data,
    method: str,
    options: argparse.Namespace,
    seed: int,
    batch: int = 64,
    same: dict[str, Any] | None = None,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The slim network, repaired, and what it took. Seconds are those of the processor, without the last repair."""
    strategy, _, count = method.partition(":")
    drawn = list(data.batches("train", batch, limit=options.images, seed=seed))
    if strategy == "joint" and same is not None:
        policy = fxprune.Policy(same["sparsity"], options=same["options"])
        slim = fxprune.compress(fxprune.analyze(model, data.example()), policy, calibration=drawn, repair="joint").eval()
        return slim, {key: same[key] for key in ("macs", "params", "evaluations", "seconds", "sparsity", "options")}
    if strategy == "synthetic":
        drawn = fxprune.synthetic_batches(model, data.example(), 128, batch_size=batch, steps=40, seed=seed)
        return tried(model, data, drawn, options, seed, "lstsq")
    if strategy in ("tried", "joint"):
        return tried(model, data, drawn, options, seed, "joint" if strategy == "joint" else "lstsq")
    begun = time.process_time()
    graph = fxprune.analyze(model, data.example())
    config = SearchConfig(targets=(f"macs={options.macs}",), strategy=strategy, evaluations=int(count or 3), seed=seed)
    searched = strategy == "rl-pruner"
    calibration = drawn[len(drawn) // 2 :] if searched else drawn
    score = Likeness.of(model, drawn[: len(drawn) // 2 if searched else 1])
    problem, candidates = make_problem(graph, score, calibration=calibration, repair="lstsq", seed=seed, tabled=config.table)
    if searched:
        outcome = driver.run(problem, config)
        removed, evaluations = outcome.removed, outcome.evaluations
    else:  # these score nothing to find their allocation
        budget = driver.Budget(problem.space, config.points[0])
        (removed,), evaluations = driver.STRATEGIES[strategy](budget, config).ask(), 0
    seconds = time.process_time() - begun
    slim = repair_result(
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


def tried(
    model: torch.nn.Module, data: Data, drawn: list[Any], options: argparse.Namespace, seed: int, repair: str
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """What ``compress`` does with a target: the table's allocation and others tried on a part of the images."""
    trials: list[float] = []

    def shown(step: str, trial: Any, seconds: float) -> None:
        trials.append(seconds)
        print(f"{trial.name}: {trial.distance:.3f} ({trial.repair}, {seconds:.0f} s)", file=sys.stderr, flush=True)

    begun = time.process_time()
    graph = fxprune.analyze(model, data.example())
    bounds = {"macs": options.macs}
    policy = allocate(graph, bounds, drawn, repair=repair, trials=TRIALS, seed=seed, observe=shown)
    seconds = time.process_time() - begun
    slim = fxprune.compress(graph, policy, calibration=drawn, repair=repair).eval()
    repairing = time.process_time() - begun - seconds
    before, after = fxprune.profile(model, data.example()), fxprune.profile(slim, data.example())
    shares = {"macs": after.macs / before.macs, "params": after.params / before.params}
    found = {"evaluations": len(trials), "seconds": seconds, "taken": policy.meta.get("taken"), "distances": policy.meta.get("distances")}
    return slim, {**shares, **found, "repair_seconds": repairing, "sparsity": policy.sparsity, "options": policy.options}


def page(cells: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """The table of all cells."""
    images = f"{options.test_images} images of the test part" if options.test_images else "the whole test part"
    lines = [
        "# An allocation without a search",
        "",
        "Written by the command below from its results, means over the seeds that were run (range in brackets). Top-1 before any training, "
        f"{options.macs:.0%} of the multiply-accumulates, {options.images} unlabelled training images, on {images}. "
        "The ResNets have the weights that akamaster/pytorch_resnet_cifar10 publishes, on CIFAR-10 as published (PNG).",
        "",
        f"```console\n$ python -m benchmarks.allocation {shlex.join(sys.argv[1:])}\n```",
        "",
        "| network | method | top-1 | lost | MACs | parameters | evaluations | CPU seconds | seeds |",
        "|" + "---|" * 9,
    ]
    dense = {one["network"]: one["top1"] for one in cells if one["method"] == "dense"}
    for name, method in dict.fromkeys((one["network"], one["method"]) for one in cells):
        mine = [one for one in cells if (one["network"], one["method"]) == (name, method)]
        top1 = [100 * one["top1"] for one in mine]
        figures = [
            f"{statistics.mean(top1):.1f}%" + (f" ({min(top1):.1f} to {max(top1):.1f})" if len(mine) > 1 else ""),
            "" if method == "dense" else f"{100 * dense[name] - statistics.mean(top1):.1f}",
            *(f"{statistics.mean(one[key] for one in mine):.1%}" for key in ("macs", "params")),
            *(f"{statistics.mean(one[key] for one in mine):.0f}" for key in ("evaluations", "seconds")),
            "" if method == "dense" else str(len(mine)),
        ]
        lines.append("| " + " | ".join([NETWORKS[name]["title"], method, *figures]) + " |")
    return "\n".join([*lines, "", "<!-- What follows is written by hand. -->", "", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("../shared/data"), help="where data and weights lie")
    parser.add_argument("--networks", default=",".join(CIFAR))
    methods = "uniform,magnitude,table,tried,joint,rl-pruner:60"
    parser.add_argument("--methods", default=methods, help="strategies, tried, joint, or synthetic; behind rl-pruner its evaluations")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=2048, help="unlabelled training images for all that is done")
    parser.add_argument("--test-images", type=int, default=None, help="default: all")
    parser.add_argument("--seeds", default="0", help="each draws the images, the table's directions and the trials")
    parser.add_argument("--out", type=Path, default=Path("allocation.jsonl"))
    parser.add_argument("--page", type=Path, default=None, help="markdown file to write; what stands below its mark is kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    wanted = [(name, "dense", 0) for name in options.networks.split(",")]
    wanted += [
        (name, method, int(seed))
        for seed in options.seeds.split(",")
        for name in options.networks.split(",")
        for method in options.methods.split(",")
    ]
    for name, method, seed in wanted:
        if not any((one["network"], one["method"], one["seed"]) == (name, method, seed) for one in cells):
            same = [one for one in cells if (one["network"], one["method"], one["seed"]) == (name, "tried", seed)]
            cells.append(cell(name, method, seed, options, same[0] if same else None))
            print(json.dumps(cells[-1]), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(cells[-1]) + "\n")
    order = [(name, method) for name in options.networks.split(",") for method in ("dense", *options.methods.split(","))]
    place = {pair: i for i, pair in enumerate(order)}
    cells = [one for one in cells if (one["network"], one["method"]) in place]
    cells.sort(key=lambda one: place[one["network"], one["method"]])
    if options.page is not None:
        below = options.page.read_text().partition("<!-- What follows is written by hand. -->\n\n")[2] if options.page.exists() else ""
        options.page.write_text(page(cells, options) + below)


if __name__ == "__main__":
    main()
