"""How long analysis and rewriting take, beside Torch-Pruning, both in one run: ``python -m benchmarks.analysis``.

Every figure is CPU time of one thread in milliseconds, the least of several repeats, the two tools taking turns on the same model: a
busy machine makes both slower, so read the ratios. Torch-Pruning 1.6.1 comes with the extra ``bench``; ``--alone`` leaves it out.
``--kirigami SECONDS`` also asks torch-kirigami to prune each model as its README does, in a process of its own, and gives up after so many
CPU seconds.

- *compress*: from a model to a slim one, everything included. Theirs: build the dependency graph, rank by L2, prune.
- *candidate*: one more slim network of an analysed model, as a search makes them. Theirs: copy the model, build, prune; there is no other
  way, since their pruner edits the model that it was built for.
- *stages*: what compress spends its time on, and a floor: a plain symbolic trace by torch.fx, and a copy of half of every parameter.
- *growth*: chains of residual blocks; the time per block must not grow.
- *memory*: most that the process grew while one model was analysed, in MiB beyond the model, each in a process of its own;
  ``--memory '*'`` asks that of every torchvision model that fits a glob, on the inputs of ``benchmarks/networks.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import multiprocessing
import platform
import resource
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import fx, nn

import fxprune
from benchmarks.networks import cases
from benchmarks.torch_kirigami_tool import prune
from fxprune.importance.criteria import scores
from fxprune.passes import rules
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.coupling.walk import Walk
from fxprune.passes.planning.cost_model import cost_model
from fxprune.passes.planning.plan import plan
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.tracing.modes import trace

MODELS = (
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "googlenet",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_800mf",
    "densenet121",
    "densenet201",
    "convnext_tiny",
)

BY_HAND = "\n## How to read it"  # from here on the page is written by hand, and stays


class Chain(nn.Module):
    """``n`` residual blocks of two convolutions."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1)) for _ in range(n)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def build(name: str) -> nn.Module:
    quiet = {"init_weights": False} if name == "googlenet" else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **quiet)
    return model.eval()


def least(run: Callable[[], Any], repeats: int) -> float:
    """Least CPU seconds of ``run`` over ``repeats`` calls."""
    best = math.inf
    for _ in range(repeats):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def theirs(model: nn.Module, x: torch.Tensor) -> None:
    import torch_pruning as tp

    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    importance = tp.importance.MagnitudeImportance(p=2)
    tp.pruner.MagnitudePruner(model, x, importance=importance, pruning_ratio=0.5, ignored_layers=head).step()


def kirigami(name: str, seconds: float) -> float:
    """CPU seconds that torch-kirigami takes to remove half of every channel axis; infinite where it takes more than ``seconds``."""
    context = multiprocessing.get_context("forkserver")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_kirigami, args=(send, name, seconds))
    process.start()
    send.close()
    try:
        return float(receive.recv())
    except EOFError:
        return math.inf
    finally:
        process.join()


def _kirigami(channel: Any, name: str, seconds: float) -> None:
    model, x = build(name), torch.randn(1, 3, 224, 224)
    torch.set_num_threads(1)
    start = time.process_time()
    cap = math.ceil(start + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (cap, cap))
    prune(model, (x,), 0.5)
    channel.send(time.process_time() - start)


def measure(name: str, repeats: int, alone: bool) -> dict[str, float]:
    """Seconds by column for one model; the two tools take turns."""
    model, x = build(name), torch.randn(1, 3, 224, 224)
    graph = fxprune.analyze(model, x)
    ranking = scores(graph, "l2")
    found: dict[str, list[float]] = {"compress": [], "analyze": [], "candidate": [], "their prune": [], "their candidate": []}
    for turn in range(repeats):
        found["compress"].append(least(lambda: fxprune.compress(model, 0.5, x), 1))
        found["analyze"].append(least(lambda: fxprune.analyze(model, x), 1))
        found["candidate"].append(least(lambda: Slimmer(graph, plan(graph, 0.5, ranking)).run(), 2))
        if not alone and (turn < 2 or sum(found["their prune"]) < 10):
            start = time.process_time()
            twin = copy.deepcopy(model)
            copied = time.process_time() - start
            found["their prune"].append(least(lambda twin=twin: theirs(twin, x), 1))  # type: ignore[misc]
            found["their candidate"].append(copied + found["their prune"][-1])
    return {column: min(times) for column, times in found.items() if times}


def stages(name: str, repeats: int) -> dict[str, float]:
    """Seconds of each stage of compressing one model, and of the floor."""
    model, x = build(name), torch.randn(1, 3, 224, 224)
    best: dict[str, float] = {}
    rules.complete()
    for _ in range(repeats):
        clock = [time.process_time()]

        def lap(stage: str, clock: list[float] = clock) -> None:
            clock.append(time.process_time())
            best[stage] = min(best.get(stage, math.inf), clock[-1] - clock[-2])

        traced = trace(model, x, rules.is_known, rules.registry.FUNCTIONS.__contains__)
        lap("trace")
        walk = Walk(traced).run()
        lap("labels")
        graph = CouplingGraph(walk, None, {})
        lap("groups")
        ranking = scores(graph, "l2")
        lap("L2 ranking")
        slimmer = Slimmer(graph, plan(graph, 0.5, ranking))
        slimmer.run()
        lap("rewrite")
        cost_model(graph).profile()
        lap("profile")
        with contextlib.suppress(fx.proxy.TraceError):
            fx.symbolic_trace(model)
        lap("plain trace")
        for p in model.parameters():
            halves = tuple(slice(0, max(n // 2, 1)) for n in p.shape[:2])
            p.detach()[halves].clone()
        lap("plain slices")
    return best


def growth(counts: tuple[int, ...]) -> list[tuple[int, float]]:
    """(blocks, seconds per block) of analysing and slimming a chain."""
    rows = []
    for n in counts:
        model, x = Chain(n).eval(), torch.randn(1, 3, 8, 8)
        rows.append((n, least(lambda model=model, x=x: fxprune.compress(model, 0.5, x), 3) / n))  # type: ignore[misc]
    return rows


def grown(name: str, as_covered: bool = False) -> float:
    """MiB that analysing a model adds at most to the process that holds it. ``as_covered``: the model and input of the coverage table."""
    torch.set_num_threads(1)
    for function in (n for n in dir(nn.init) if n.endswith("_")):  # values are nothing to analysis, and take long to draw
        setattr(nn.init, function, lambda tensor, *_, **__: tensor)
    fxprune.analyze(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), torch.randn(1, 3, 8, 8))  # what the first use of anything loads
    if as_covered:
        case = next(cases((name,), ("torchvision",)))
        model, x = case.build().eval(), case.inputs[0]()
    else:
        model, x = build(name), (torch.randn(1, 3, 224, 224),)
    reset()
    before = peak()
    fxprune.analyze(model, x)
    return peak() - before


def in_its_own(name: str, as_covered: bool = False) -> float:
    """``grown`` in a process of its own, forked from one that has done nothing but import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fxprune", "torchvision", "benchmarks.networks"])
    with context.Pool(1) as pool:
        return pool.apply(grown, (name, as_covered))


def reset() -> None:
    """Forget the highest memory of the past, which building the model may have set; only Linux can."""
    if platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> float:
    """The most memory this process has held, in MiB."""
    if platform.system() == "Linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if platform.system() == "Darwin" else 1 << 10)


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def page(
    rows: dict[str, dict[str, float]],
    chains: list[tuple[int, float]],
    memory: dict[str, float],
    parts: dict[str, dict[str, float]],
    everywhere: dict[str, float],
    command: str,
) -> str:
    """The markdown page."""
    peer = bool(rows) and all("their prune" in r for r in rows.values())
    version = f" and Torch-Pruning {metadata.version('torch-pruning')}" if peer else ""
    lines = [
        "# Speed of analysis and rewriting",
        "",
        f"Made by `{command}` with torch {torch.__version__.partition('+')[0]}{version} on {platform.machine()}, one thread, CPU",
        "milliseconds, the least of several repeats, the tools taking turns. `benchmarks/analysis.py` says what each column holds.",
        "",
        "| model | compress | of it analysis | theirs | ratio | candidate | theirs | ratio | memory, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, r in rows.items():
        prune, candidate = r.get("their prune", math.nan), r.get("their candidate", math.nan)
        cells = [r["compress"], r["analyze"], prune, prune / r["compress"], r["candidate"], candidate, candidate / r["candidate"]]
        texts = [f"{c:.1f}×" if i in (3, 6) else f"{1000 * c:.0f}" for i, c in enumerate(cells)]
        lines.append(f"| {name} | {' | '.join(texts)} | {memory[name]:.0f} |".replace("nan×", "–").replace("nan", "–"))
    if peer:
        first = geometric([r["their prune"] / r["compress"] for r in rows.values()])
        second = geometric([r["their candidate"] / r["candidate"] for r in rows.values()])
        lines.append(f"| *geometric mean* | | | | {first:.1f}× | | | {second:.1f}× | |")
    if tried := {name: r["kirigami"] for name, r in rows.items() if "kirigami" in r}:
        lines += ["", f"torch-kirigami {metadata.version('torch-kirigami')} on the same models, CPU milliseconds:", ""]
        lines += ["| model | to prune | ratio |", "|---|---:|---:|"]
        for name, t in tried.items():
            lines.append(f"| {name} | {1000 * t:.0f} | {t / rows[name]['compress']:.0f}× |".replace("inf×", "–").replace("inf", "gave up"))
    if parts:
        names = list(next(iter(parts.values())))
        lines += ["", "Where the time goes; the last two columns are the floor.", ""]
        lines += [f"| model | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
        lines += [f"| {name} | {' | '.join(f'{1000 * t:.0f}' for t in found.values())} |" for name, found in parts.items()]
    if everywhere:
        most = sorted(everywhere.items(), key=lambda item: -item[1])[:8]
        lines += ["", f"Memory, on {len(everywhere)} torchvision models with the inputs of the coverage table: the most are", ""]
        lines += ["| model | MiB |", "|---|---:|", *(f"| {name} | {size:.0f} |" for name, size in most)]
    lines += [
        "",
        "Growth, on chains of residual blocks (two convolutions and a norm each):",
        "",
        "| blocks | ms per block |",
        "|---:|---:|",
    ]
    lines += [f"| {n} | {1000 * each:.2f} |" for n, each in chains]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Analysis and rewriting beside Torch-Pruning, in one run.")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chains", type=int, nargs="*", default=(25, 50, 100, 200, 400, 800))
    parser.add_argument("--memory", nargs="*", default=(), metavar="GLOB", help="torchvision models whose analysis' memory is measured")
    parser.add_argument("--alone", action="store_true", help="fxprune only")
    parser.add_argument("--kirigami", type=float, default=0.0, metavar="SECONDS", help="torch-kirigami too, with this cap a model")
    parser.add_argument("--out", type=Path, help="the page to write; printed otherwise")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows, memory, parts = {}, {}, {}
    for name in options.models:
        memory[name] = in_its_own(name)
        rows[name] = measure(name, options.repeats, options.alone)
        if options.kirigami:
            rows[name]["kirigami"] = kirigami(name, options.kirigami)
        parts[name] = stages(name, options.repeats)
        print(name, {k: round(1000 * v, 0) for k, v in rows[name].items()}, f"{memory[name]:.0f} MiB", file=sys.stderr, flush=True)
    everywhere = {}
    for case in cases(tuple(options.memory), ("torchvision",)) if options.memory else ():
        everywhere[case.name] = in_its_own(case.name, as_covered=True)
        print(case.name, f"{everywhere[case.name]:.0f} MiB", file=sys.stderr, flush=True)
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    chains = growth(tuple(options.chains))
    text = page(rows, chains, memory, parts, everywhere, f"python -m benchmarks.analysis {given}".strip())
    if options.out is None:
        print(text)
    else:
        old = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
        options.out.write_text(text + old[old.index(BY_HAND) :] if BY_HAND in old else text, encoding="utf-8")


if __name__ == "__main__":
    main()
