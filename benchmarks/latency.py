"""Does half the work take half the time? ``python benchmarks/latency.py`` measures networks dense and slim in several runtimes.

Every figure is a share, slim over dense: each turn times the dense network and then each slim one, and the median of the turns' shares
is taken, so that what else the machine does falls on all. With one thread, the default, time is CPU time, which a busy machine
stretches far less; with more it is the clock's, and the machine must be idle.

``time / MACs`` is the share of the time over the share of the multiply-accumulates; 1 is what was promised, more was lost. Networks are
pruned uniformly, as ``--sparsity`` or ``--target`` says, with random weights: time does not depend on their values. ``--why`` adds where
the time goes, by ONNX Runtime's own profile, operator by operator.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import fxprune

NETWORKS = ("resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "densenet121")
Timed = Callable[[Tensor], Any]


def eager(model: nn.Module, folder: Path, threads: int) -> Timed:
    return model


def compiled(model: nn.Module, folder: Path, threads: int) -> Timed:
    made: Timed = torch.compile(model)
    return made


def onnx(model: nn.Module, folder: Path, threads: int, profiled: bool = False) -> Any:
    path = folder / f"{id(model)}.onnx"
    if not path.exists():
        fxprune.export(model, path, example_inputs=torch.zeros(2, 3, 64, 64), dynamic={0: "batch", 2: "height", 3: "width"}, verify=False)
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = profiled
    options.profile_file_prefix = str(folder / f"{id(model)}")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return session if profiled else lambda x: session.run(None, {name: x.numpy()})


def openvino(model: nn.Module, folder: Path, threads: int) -> Timed:
    path = folder / f"{id(model)}.xml"
    fxprune.export(model, path, example_inputs=torch.zeros(2, 3, 64, 64), dynamic={0: "batch", 2: "height", 3: "width"}, verify=False)
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    ready = importlib.import_module("openvino").Core().compile_model(str(path), "CPU", hints)
    return lambda x: ready([x.numpy()])


RUNTIMES: dict[str, Callable[[nn.Module, Path, int], Timed]] = {"eager": eager, "compile": compiled, "onnx": onnx, "openvino": openvino}


def seconds(timed: Timed, x: Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    timed(x)
    return clock() - start


def shares(subjects: list[Timed], x: Tensor, turns: int, clock: Callable[[], float]) -> tuple[float, list[float]]:
    """Median seconds of the first subject, and every other's share of it, over turns in which all are timed one after the other."""
    for timed in subjects:
        timed(x)
    times = [[seconds(timed, x, clock) for timed in subjects] for _ in range(turns)]
    dense = statistics.median(turn[0] for turn in times)
    return dense, [statistics.median(turn[i] / turn[0] for turn in times) for i in range(1, len(subjects))]


def by_operator(model: nn.Module, x: Tensor, folder: Path, threads: int) -> dict[str, float]:
    """Seconds of one call by kind of operator, as ONNX Runtime itself counts them."""
    session = onnx(model, folder, threads, profiled=True)
    runs = 5
    for _ in range(runs):
        session.run(None, {session.get_inputs()[0].name: x.numpy()})
    found: dict[str, float] = collections.defaultdict(float)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["op_name"]] += event["dur"] / 1e6 / runs
    return dict(found)


def versions() -> str:
    packages = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime", "openvino"))
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "unknown")
    return f"{packages}, Python {platform.python_version()}, {cpu}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--runtimes", default="onnx,eager,openvino")
    parser.add_argument("--round-to", default="1,8,16", help="auto: not given, so that a target chooses")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--size", type=int, default=96, help="pixels a side")
    parser.add_argument("--sparsity", type=float, default=0.3, help="of every group: 0.3 leaves about half of the MACs")
    parser.add_argument("--target", help="in place of --sparsity: as compress takes it, for example macs=0.5")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--why", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.threads == 1 else time.perf_counter
    rounds = [None if n == "auto" else int(n) for n in asked.round_to.split(",")]
    policy = asked.target or asked.sparsity
    threads = f"{asked.threads} thread{'s' * (asked.threads > 1)}"
    how = asked.target or f"sparsity {asked.sparsity}"
    print(f"{versions()}; {threads}, {asked.size} pixels, {how}, {asked.turns} turns")
    columns = [f"round_to {n or 'not given'}: MACs, time, time / MACs" for n in rounds]
    print(f"| network | runtime | batch | dense | {' | '.join(columns)} |")
    print("|---" * (4 + len(rounds)) + "|", flush=True)
    for name in asked.networks.split(","):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval().requires_grad_(False)
        example = torch.randn(1, 3, asked.size, asked.size)
        slims = [fxprune.compress(model, policy, example, round_to=n).eval() for n in rounds]
        macs = [fxprune.record(slim).after.macs / fxprune.record(slim).before.macs for slim in slims]
        with tempfile.TemporaryDirectory() as made, torch.no_grad():
            folder = Path(made)
            for runtime in asked.runtimes.split(","):
                subjects = [RUNTIMES[runtime](one, folder, asked.threads) for one in (model, *slims)]
                for batch in (int(n) for n in asked.batches.split(",")):
                    x = torch.randn(batch, 3, asked.size, asked.size)
                    dense, found = shares(subjects, x, asked.turns, clock)
                    cells = [f"{m:.2f}, {t:.2f}, **{t / m:.2f}**" for m, t in zip(macs, found, strict=True)]
                    print(f"| {name} | {runtime} | {batch} | {1000 * dense:.0f} ms | " + " | ".join(cells) + " |", flush=True)
            if asked.why:
                x = torch.randn(32, 3, asked.size, asked.size)
                dense_by, slim_by = (by_operator(one, x, folder, asked.threads) for one in (model, slims[0]))
                whole = sum(dense_by.values())
                for kind, spent in sorted(dense_by.items(), key=lambda item: -item[1])[:6]:
                    print(f"    {name}, {kind}: {spent / whole:.0%} of the dense time, slim over dense {slim_by.get(kind, 0) / spent:.2f}")


if __name__ == "__main__":
    main()
