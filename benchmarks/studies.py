"""Small studies of the search, on scikit-learn's digits: what its options are worth, and the seed paper's open questions.

    python benchmarks/studies.py options|rewards|epsilon|distillation|score [--network digits|dense] [--seeds 3]
    python benchmarks/studies.py layers --results cifar10.jsonl --picture docs/pictures/sparsity.svg

Each prints a markdown table: means over the seeds, with the range in brackets where it matters. A seed decides the split of the data, the
weights that the network is trained to, and the search. Accuracies are of the test part, read at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

import fxprune
from fxprune import driver
from fxprune.data.datasets import load_data
from fxprune.driver import Budget, SearchConfig
from fxprune.evaluation.accuracy import evaluate_accuracy
from fxprune.evaluation.likeness import Likeness
from fxprune.models.small import digits_net, resnet20
from fxprune.repair.repairer import Repairer
from fxprune.searching.candidates import Candidates
from fxprune.searching.problem import make_problem
from fxprune.searching.recovery import Recovery
from fxprune.searching.result import repair_result
from fxprune.training.config import TrainConfig
from fxprune.training.fitting import train


class Dense(nn.Module):
    """Two densely connected stages for 8x8 grey digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 12 * i) for i in range(6))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 12 * i, 12, 3, padding=1) for i in range(6))
        self.head = nn.Linear(16 + 12 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
            x = F.avg_pool2d(x, 2) if i == 2 else x
        logits: Tensor = self.head(F.relu(x).mean((2, 3)))
        return logits


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"digits": digits_net, "dense": Dense}


class Setting:
    """A network trained on a split of the digits by ``seed``, and the searches over it."""

    def __init__(self, network: str, seed: int) -> None:
        self.seed = seed
        self.data = load_data("digits", seed=seed)
        torch.manual_seed(seed)
        self.model = NETWORKS[network]()
        self.training = self.data.batches("train", 64, training=True, seed=seed)
        train(self.model, self.training, config=TrainConfig(20, 0.1, device="cpu", seed=seed))
        self.model.eval()
        self.example = self.data.example()

    def images(self, part: Any, limit: int | None, augment: bool) -> list[Any]:
        return list(self.data.batches(part, 32, limit=limit, seed=self.seed, augmented=augment))

    def problem(self, config: SearchConfig, working: nn.Module, augment: bool = False) -> tuple[driver.Problem, Candidates, Repairer]:
        """The search over ``working``, a network with the original's weights."""
        calibration = self.images("train", 128, augment)
        score = Likeness.of(self.model, self.images("validation", 128, augment))
        graph = fxprune.analyze(working, self.example)
        reference = None if working is self.model else fxprune.analyze(self.model, self.example)
        problem, candidates = make_problem(
            graph,
            score,
            calibration=calibration,
            importance=config.importance,
            repair=config.repair,
            seed=self.seed,
            reference=reference,
            rough=score.first(32),
        )
        return problem, candidates, Repairer(graph, self.images("train", 512, augment), config.repair, reference)

    def found(self, config: SearchConfig, *, augment: bool = False, between: int = 0) -> tuple[nn.Module, driver.SearchOutcome]:
        """What a search finds, repaired. ``between``: epochs of distillation after each prune step."""
        working = copy.deepcopy(self.model) if between else self.model
        problem, candidates, repairer = self.problem(config, working, augment)
        if between:
            problem = Recovery(candidates, working, lambda slim: self.distil(slim, between)).attached(problem)
        outcome = driver.run(problem, config)
        slim = fxprune.compress(candidates.graph, candidates.policy(outcome.removed, {}, "l2"))
        return repair_result(slim, outcome.removed, candidates, repairer).eval(), outcome

    def distil(self, slim: nn.Module, epochs: int) -> None:
        config = fxprune.DistillConfig(epochs, device="cpu", seed=self.seed, replace_teacher=False)
        fxprune.distill(slim, self.model, self.training, config=config)

    def tested(self, slim: nn.Module) -> float:
        return evaluate_accuracy(slim, self.data.batches("test"))


def shown(values: Sequence[float], form: str = "{:.1%}") -> str:
    """The mean, and the range in brackets."""
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(statistics.mean(values)) + (f" ({low} to {high})" if low != high else "")


def options(settings: Sequence[Setting], evaluations: int, macs: float) -> None:
    """Each option on and off, all else as by default."""
    base: dict[str, Any] = {"targets": f"macs={macs}", "evaluations": evaluations, "rounds": evaluations, "patience": None}
    paper = {"steps": None, "step_ratio": 0.05, "step_by": "units", "rounds": 3}
    rows: dict[str, tuple[dict[str, Any], bool]] = {
        "defaults": ({}, False),
        "what is drawn is scored (`screen=1`)": ({"screen": 1}, False),
        "reward: accuracy alone (`likeness=0`)": ({"likeness": 0.0}, False),
        "warm start from the importance ranking (`warm_start=1`)": ({"warm_start": 1.0}, False),
        "two fidelity levels (`finalists=8`, 32 images, then 128)": ({"finalists": 8}, False),
        "augmented images (`--augment`)": ({}, True),
        "importance L2 (`importance=l2`)": ({"importance": "l2"}, False),
        "BatchNorm re-estimated only (`repair=bn`)": ({"repair": "bn"}, False),
        "no repair (`repair=none`)": ({"repair": "none"}, False),
        "not projected: steps of 5 % of the units (`step_by=units`)": (paper, False),
        "random search": ({"strategy": "random"}, False),
        "TPE": ({"strategy": "optuna:TPESampler"}, False),
        "uniform": ({"strategy": "uniform"}, False),
    }
    print(f"original {shown([s.tested(s.model) for s in settings])}\n")
    print("| search | likeness found | top-1 before training | evaluations | CPU seconds |\n|---|---|---|---|---|")
    for name, (changes, augment) in rows.items():
        accuracies, alike, counts, seconds = [], [], [], []
        for setting in settings:
            begun = time.process_time()
            slim, outcome = setting.found(SearchConfig(**{**base, "seed": setting.seed, **changes}), augment=augment)
            seconds.append(time.process_time() - begun)
            accuracies.append(setting.tested(slim))
            alike.append(outcome.metrics["likeness"])
            counts.append(outcome.evaluations)
        print(
            f"| {name} | {shown(alike, '{:.3f}')} | {shown(accuracies)} | {statistics.mean(counts):.0f} | {statistics.mean(seconds):.1f} |",
            flush=True,
        )


def rewards(settings: Sequence[Setting], evaluations: int) -> None:
    """The paper's three reward strategies, where the target leaves MACs and parameters open."""
    print("| reward | top-1 before training | after 10 epochs | MACs left | parameters left |\n|---|---|---|---|---|")
    for name, weights in {"accuracy": {}, "flops": {"alpha": 0.25}, "flops ": {"alpha": 1.0}, "params": {"beta": 0.25}}.items():
        config = {"targets": "sparsity=0.5", "reward": name.strip(), "evaluations": evaluations, "rounds": evaluations, **weights}
        before, after, macs, params = [], [], [], []
        for setting in settings:
            slim, outcome = setting.found(SearchConfig(seed=setting.seed, patience=None, **config))  # type: ignore[arg-type]
            before.append(setting.tested(slim))
            setting.distil(slim, 10)
            after.append(setting.tested(slim))
            macs.append(outcome.metrics["macs"])
            params.append(outcome.metrics["params"])
        weight = "".join(f", {key} {value}" for key, value in weights.items())
        print(f"| {name.strip()}{weight} | {shown(before)} | {shown(after)} | {shown(macs)} | {shown(params)} |", flush=True)


def epsilon(settings: Sequence[Setting], macs: float) -> None:
    """Epsilon-greedy choice of the next architecture in a search of ten steps; the result is where it ends, as in the paper."""
    print("| epsilon | decay | reward at the end | top-1 before training |\n|---|---|---|---|")
    cases = [(0.0, "constant"), *((e, decay) for e in (0.4, 1.0) for decay in ("constant", "linear", "cosine"))]
    for start, decay in cases:
        ended, accuracies = [], []
        for setting in settings:
            config = SearchConfig(
                targets=f"macs={macs}",
                steps=10,
                rounds=4,
                epsilon=start,
                epsilon_decay=decay,
                epsilon_share=0.5,
                keep_best=False,
                seed=setting.seed,
            )
            slim, outcome = setting.found(config)
            ended.append(outcome.reward)
            accuracies.append(setting.tested(slim))
        print(f"| {start} | {decay if start else '-'} | {shown(ended, '{:.3f}')} | {shown(accuracies)} |", flush=True)


def distillation(settings: Sequence[Setting], evaluations: int, macs: float) -> None:
    """Twelve epochs of distillation: none, after the search, or shared out among the prune steps and the end."""
    print("| prune steps | epochs between | epochs after | top-1 |\n|---|---|---|---|")
    for steps, between, after in ((1, 0, 0), (4, 0, 0), (1, 0, 12), (4, 0, 12), (4, 3, 3)):
        accuracies = []
        for setting in settings:
            config = SearchConfig(
                targets=f"macs={macs}",
                steps=steps,
                rounds=max(1, evaluations // (3 * steps)),
                patience=None,
                recover_every=1 if between else 0,
                seed=setting.seed,
            )
            slim, _ = setting.found(config, between=between)
            if after:
                setting.distil(slim, after)
            accuracies.append(setting.tested(slim))
        print(f"| {steps} | {between} | {after} | {shown(accuracies)} |", flush=True)


def score(settings: Sequence[Setting], candidates: int, macs: float) -> None:
    """How well scores rank random allocations by test accuracy, before and after five epochs of distillation (Spearman)."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for setting in settings:
        config = SearchConfig(targets=f"macs={macs}", strategy="random", samples=candidates, rounds=1, seed=setting.seed)
        problem, made, repairer = setting.problem(config, setting.model)
        strategy = driver.STRATEGIES["random"](Budget(problem.space, config.points[0]), config)
        full = Likeness.of(setting.model, setting.images("validation", None, False))
        sizes = (32, 64, 128, len(setting.data.validation))
        scores: dict[tuple[str, int], list[float]] = {}
        before, after = [], []
        for removed in strategy.ask():
            slim, slimmer = made.made(removed)
            problem.score.repairer(slim.eval(), slimmer)  # type: ignore[attr-defined]
            for size in sizes:
                for name, value in full.first(size)(slim).items():
                    scores.setdefault((name, size), []).append(value)
            slim = repair_result(fxprune.compress(made.graph, made.policy(removed, {}, "l2")), removed, made, repairer).eval()
            before.append(setting.tested(slim))
            setting.distil(slim, 5)
            after.append(setting.tested(slim))
        for key, values in scores.items():
            found.setdefault(key, []).append((float(spearmanr(values, before)[0]), float(spearmanr(values, after)[0])))
    print("| score | images | rank correlation with test top-1 before training | after 5 epochs |\n|---|---|---|---|")
    for (name, size), pairs in sorted(found.items()):
        print(f"| {name} | {size} | {shown([p[0] for p in pairs], '{:.2f}')} | {shown([p[1] for p in pairs], '{:.2f}')} |")


def layers(results: Path, picture: Path) -> None:
    """What is left of each group of ResNet-20 by the searches of benchmarks/cifar10.py, drawn as bars, one for each seed."""
    cells = [json.loads(line) for line in results.read_text().splitlines()]
    both = [(cell["before"], cell["after"]) for cell in cells if cell.get("removed")]
    cells = [cell for cell in cells if cell["method"] == "rl-pruner"]
    graph = fxprune.analyze(resnet20(), torch.zeros(1, 3, 32, 32))
    sizes = {group.name: group.size for group in graph.groups if group.prunable}
    left = np.array([[1 - cell["removed"][name] / size for name, size in sizes.items()] for cell in cells])
    picture.write_text(bars(list(sizes), left), encoding="utf-8")
    print("| group | units | left, by seed | mean |\n|---|---|---|---|")
    for i, (name, size) in enumerate(sizes.items()):
        print(f"| `{name}` | {size} | {', '.join(f'{share:.0%}' for share in left[:, i])} | {left[:, i].mean():.0%} |")
    rank = float(spearmanr(*zip(*both, strict=True))[0])
    print(f"\nRank correlation of top-1 before and after training, over the {len(both)} networks repaired by least squares: {rank:.2f}")


def bars(names: Sequence[str], left: np.ndarray[Any, Any]) -> str:
    """An SVG of horizontal bars: ``left`` is (seeds, groups), shares of the units."""
    row, wide, start = 8 * len(left) + 10, 360, 190
    parts = []
    for i, name in enumerate(names):
        top = 10 + i * row
        parts.append(f'<text x="{start - 8}" y="{top + 4 * len(left) + 4}" text-anchor="end">{name}</text>')
        parts.append(f'<rect x="{start}" y="{top}" width="{wide}" height="{8 * len(left)}" fill="#8884" />')
        for seed, share in enumerate(left[:, i]):
            parts.append(f'<rect x="{start}" y="{top + 8 * seed}" width="{share * wide:.1f}" height="7" fill="#4c6ef5" />')
    height = 20 + len(names) * row
    style = "text{font:12px sans-serif;fill:#777}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {start + wide + 10} {height}" role="img">'
    return "\n".join([head, "<title>Share of the units left in each group</title>", f"<style>{style}</style>", *parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["options", "rewards", "epsilon", "distillation", "score", "layers"])
    parser.add_argument("--network", choices=list(NETWORKS), default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=100, help="scorings a search may make")
    parser.add_argument("--candidates", type=int, default=24, help="of the study of scores")
    parser.add_argument("--macs", type=float, default=0.1)
    parser.add_argument("--results", type=Path, default=Path("cifar10.jsonl"), help="of benchmarks/cifar10.py")
    parser.add_argument("--picture", type=Path, default=Path("sparsity.svg"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.study == "layers":
        layers(given.results, given.picture)
        return
    settings = [Setting(given.network, seed) for seed in range(given.seeds)]
    studies: dict[str, Callable[[], None]] = {
        "options": lambda: options(settings, given.evaluations, given.macs),
        "rewards": lambda: rewards(settings, given.evaluations),
        "epsilon": lambda: epsilon(settings, given.macs),
        "distillation": lambda: distillation(settings, given.evaluations, given.macs),
        "score": lambda: score(settings, given.candidates, given.macs),
    }
    studies[given.study]()


if __name__ == "__main__":
    main()
