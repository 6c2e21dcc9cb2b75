"""Ask for a latency, get that latency? ``python -m benchmarks.latency_targets`` asks a hundred times, in two runtimes.

Every row is one search (``strategy="table"``, random weights and calibration data: neither changes a time). What it found is timed again
by this script's own means against the original, in turns, and in ONNX Runtime from a file that another exporter wrote. A target is *met*
where the search says so and that time is within 5 % of it. It is *refused* where the search says that even the smallest network takes
longer, and this script's own measurement of that network agrees; all else is missed. ``--blocks`` names the runtimes in which the search
may leave out blocks beside widths.

Rows go to ``--out`` as they come; a run that was cut goes on from there. ``--table`` prints the page's table of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import fxprune
from fxprune import driver
from fxprune.errors import TargetError
from fxprune.imports import needed
from fxprune.searching.problem import make_problem, multiple_for
from fxprune.timing.runtimes import Runtime

NETWORKS = ("mnasnet0_5", "mobilenet_v3_small", "squeezenet1_1", "resnet18", "regnet_x_400mf", "efficientnet_b0", "vgg11_bn", "resnet50")
SHARES = ("0.8", "0.7", "0.6", "0.5", "0.45", "0.4")
IN_MILLISECONDS = ("mnasnet0_5", "resnet18")  # one target more, 0.55 of the original's time, given in milliseconds
SESSIONS = 8  # in which it is timed again; the mean counts
TURNS, CALLS, TURN, WITHIN = 9, 3, 0.03, 0.05  # a turn is so many calls and seconds at least


def exported(model: nn.Module, x: Tensor) -> bytes:
    """An ONNX file of ``model``, by the exporter that the search does not use; by ``fxprune.export`` where that one cannot (the pool of
    vgg11_bn, whose map at 64 pixels is smaller than what it gives)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(model, (x,), str(path), dynamo=False)
        except torch.onnx.OnnxExporterError:
            fxprune.export(model, path, example_inputs=x, dynamic={}, verify=False)
        return path.read_bytes()


def runner(model: nn.Module, x: Tensor, file: bytes | None) -> Callable[[], Any]:
    """What calls ``model`` once on one thread: in PyTorch, or a new session of its ``file`` in ONNX Runtime."""
    if file is None:
        return lambda: model(x)
    ort = needed("onnxruntime", "this benchmark", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


def share(original: Callable[[], Any], slim: Callable[[], Any]) -> float:
    """The median over turns of the CPU time of ``slim`` over that of the original."""

    def seconds(run: Callable[[], Any], calls: int) -> float:
        run()  # brings back to the caches what the other network has driven out
        started = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - started) / calls

    runs = [(run, max(CALLS, math.ceil(TURN / max(seconds(run, CALLS), 1e-6)))) for run in (original, slim)]
    turns = [[seconds(*one) for one in runs] for _ in range(TURNS)]
    return statistics.median(b / a for a, b in turns)


def timed_again(pair: Sequence[tuple[nn.Module, bytes | None]], x: Tensor, slim_first: bool) -> float:
    """The share in new sessions, made in either order: the later one is often the faster."""
    order = (1, 0) if slim_first else (0, 1)
    made = {i: runner(pair[i][0], x, pair[i][1]) for i in order}
    return share(made[0], made[1])


def rows(name: str, runtime: str, shares: Sequence[str], done: set[str], size: int, blocks: bool) -> Any:
    """Search for every target that is not done yet."""
    targets = [f"latency={share}" for share in shares] + (["ms"] if name in IN_MILLISECONDS else [])
    if all(target in done for target in targets):
        return
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval().requires_grad_(False)
    x = torch.randn(1, 3, size, size)
    begun = time.perf_counter()
    graph = fxprune.analyze(model, x)
    first = fxprune.SearchConfig(targets="latency=0.5", strategy="table", runtime=runtime, repair="none")
    multiple = multiple_for(graph, first)
    calibration = [torch.randn(16, 3, size, size)]
    options: dict[str, Any] = {"repair": "none", "round_to": multiple, "tabled": "must", "runtime": Runtime(runtime), "blocks": blocks}
    problem, candidates = make_problem(graph, lambda slim: 1.0, calibration=calibration, **options)
    assert problem.clock is not None
    whole = problem.clock.seconds()
    made = time.perf_counter() - begun
    for target in targets:
        if target in done:
            continue
        wanted = 0.55 if target == "ms" else float(target.partition("=")[2])
        asked = f"latency={1e3 * whole * wanted:.4g}ms" if target == "ms" else target
        begun, error = time.perf_counter(), ""
        try:
            found = driver.run(problem, fxprune.SearchConfig(targets=asked, strategy="table", runtime=runtime, repair="none"))
        except TargetError as unmet:
            found, error = unmet.nearest, str(unmet)
        seconds = time.perf_counter() - begun
        # What is refused comes with the smallest network.
        slim = candidates.slim(found.removed).eval()
        pair = [(one, exported(one, x) if runtime == "onnx" else None) for one in (model, slim)]
        again = statistics.mean(timed_again(pair, x, bool(session % 2)) for session in range(SESSIONS))
        yield {
            "network": name,
            "runtime": runtime,
            "target": target,
            "asked": asked,
            "wanted": wanted,
            "milliseconds": 1e3 * whole,
            "told": found.metrics["latency"],
            "again": again,
            "macs": found.metrics["macs"],
            "seconds": seconds,
            "prepared": made,
            "blocks": len(candidates.gone(found.removed)) if blocks else None,
            "error": error,
        }


def met(row: dict[str, Any]) -> bool:
    return not row["error"] and abs(row["again"] / row["wanted"] - 1) <= WITHIN


def refused(row: dict[str, Any]) -> bool:
    """Whether the search says that no network is so fast, and the smallest is not."""
    return "cannot be met" in row["error"] and row["again"] > row["wanted"]


def table(found: list[dict[str, Any]]) -> str:
    """One line for a network in a runtime: what was measured again for each target, with its blocks left out where some are; refused
    targets with the least that can be had, missed ones in brackets."""

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        text = f"{row['again']:.3f}" + (f" (-{row['blocks']})" if row["blocks"] and not row["error"] else "")
        return text if met(row) else f"≥ {row['again']:.2f}" if refused(row) else f"**[{text}]**"

    shares = [share for share in SHARES if any(row["target"] == f"latency={share}" for row in found)]
    heads = ["network", "runtime", "original", *shares, "in ms: 0.55", "seconds a target"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, runtime in dict.fromkeys((row["network"], row["runtime"]) for row in found):
        mine = {row["target"]: row for row in found if (row["network"], row["runtime"]) == (name, runtime)}
        cells = [mine.get(f"latency={one}") for one in shares] + [mine.get("ms")]
        shown = [cell(row) for row in cells]
        whole = next(iter(mine.values()))["milliseconds"]
        seconds = statistics.mean(row["seconds"] for row in mine.values())
        lines.append(f"| {name} | {runtime} | {whole:.1f} ms | " + " | ".join(shown) + f" | {seconds:.0f} |")
    lines.append("")
    for runtime in (*dict.fromkeys(row["runtime"] for row in found), ""):
        here = [row for row in found if runtime in ("", row["runtime"])]
        out = sum(map(refused, here))
        told = [row for row in here if not row["error"]]
        off = statistics.median(abs(row["again"] / row["told"] - 1) for row in told) if told else 0.0
        lines.append(
            f"{runtime or 'together'}: {sum(map(met, here))} of the {len(here) - out} targets that can be reached are met within"
            f" {WITHIN:.0%}; {out} more were refused. Measured again, a time is {off:.1%} off the first measurement in the median.\n"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--runtimes", default="eager,onnx")
    parser.add_argument("--shares", default=",".join(SHARES), help="of the original's time, to ask for")
    parser.add_argument("--blocks", default="eager", help="runtimes in which whole blocks may go as well")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--out", type=Path, default=Path("latency-targets.jsonl"))
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []
    if not asked.table:
        with asked.out.open("a") as file, torch.no_grad():
            for name in asked.networks.split(","):
                for runtime in asked.runtimes.split(","):
                    done = {row["target"] for row in found if (row["network"], row["runtime"]) == (name, runtime)}
                    for row in rows(name, runtime, asked.shares.split(","), done, asked.size, runtime in asked.blocks.split(",")):
                        found.append(row)
                        file.write(json.dumps(row) + "\n")
                        file.flush()
    print(table(found))


if __name__ == "__main__":
    main()
