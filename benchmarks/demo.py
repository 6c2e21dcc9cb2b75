"""What ``make demo`` shows, over several seeds: whether the search is above uniform and above one ranking by more than chance.

    python -m benchmarks.demo --seeds 0,1,2,3,4 --page docs/benchmarks/demo.md

Each seed trains the network, searches, distils and measures as ``make demo`` does, and once more with ``--strategy magnitude`` from the
same weights. A finished seed is one line of ``--out``; started again, the command goes on with those that are missing. Needs the extra
`search`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fxprune.cli.arguments import read
from fxprune.cli.session import begin
from fxprune.training.config import Progress

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = ROOT / "Makefile"


class Silent:
    """Watches a run and says nothing but its stages."""

    def stage(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr)

    def searched(self, progress: Any) -> None:
        """A round of the search is over."""

    def repaired(self, done: int, total: int, layer: str) -> None:
        """A layer of a network is repaired."""

    def trained(self, progress: Progress) -> None:
        """A step of training or distillation is over."""


def demo_options() -> list[str]:
    """The options of ``make demo``, as the Makefile has them."""
    (line,) = [line for line in MAKEFILE.read_text(encoding="utf-8").splitlines() if line.startswith("DEMO :=")]
    return shlex.split(line.partition(":=")[2])


def measured(seed: int, more: Sequence[str]) -> dict[str, Any]:
    """One seed: name of a network -> its figures; "magnitude" is what the strategy of that name finds from the same weights."""
    found: dict[str, Any] = {"seed": seed, "options": [*demo_options(), *more]}
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "search"
        given = [*demo_options(), *more, "--seed", str(seed)]
        rows = begin(_options([*given, "--out", str(first)]), "").run(Silent()).rows
        found |= {row.name: asdict(row) for row in rows}
        weights = str(first / "checkpoint" / "original.safetensors")
        given += ["--strategy", "magnitude", "--no-baseline", "--weights", weights, "--train-epochs", "0"]
        rows = begin(_options([*given, "--out", str(Path(folder) / "magnitude")]), "").run(Silent()).rows
        found["magnitude"] = asdict(rows[-1])
    return found


def _options(arguments: list[str]) -> Any:
    return read(arguments).options


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds with their ranges, and what the search gains with its standard error."""
    names = ("original", "uniform", "magnitude", "slim")
    lines = ["| | before training | test accuracy | MACs | latency |", "|---|---|---|---|---|"]
    for name in names:
        top1 = [100 * cell[name]["accuracy"] for cell in cells]
        macs = [100 * cell[name]["macs"] / cell["original"]["macs"] for cell in cells]
        time = [100 * cell[name]["latency"] / cell["original"]["latency"] for cell in cells]
        shown = "search" if name == "slim" else name
        repaired = [100 * cell[name]["untrained"] for cell in cells if cell[name]["untrained"] is not None]
        lines.append(
            f"| {shown} | {_spread(repaired)} | {_spread(top1)} "
            f"| {statistics.mean(macs):.1f} % | {statistics.mean(time):.0f} % ({min(time):.0f} to {max(time):.0f}) |"
        )
    lines.append("")
    for name in ("uniform", "magnitude"):
        kinds = [("accuracy", "in the end")]
        if all(cell["slim"]["untrained"] is not None for cell in cells):
            kinds.insert(0, ("untrained", "before training"))
        gains = (f"{_gain([100 * (cell['slim'][key] - cell[name][key]) for cell in cells])} {when}" for key, when in kinds)
        lines.append(f"Search minus {name}: {', '.join(gains)}; {len(cells)} seeds.")
    others = [100 * (cell["slim"]["accuracy"] - cell["searched"]["accuracy"]) for cell in cells if "searched" in cell]
    lines += ["", f"{len(others)} of {len(cells)} runs kept the uniform allocation or the one halfway to it instead of the search's own"]
    lines[-1] += f", and were {statistics.mean(others):.2f} points better for it." if others else "."
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} % ({min(values):.2f} to {max(values):.2f})" if values else ""


def _gain(points: Sequence[float]) -> str:
    error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else float("nan")
    return f"{statistics.mean(points):+.2f} points (standard error {error:.2f})"


def page(cells: Sequence[dict[str, Any]], command: str) -> str:
    """The page of the documentation."""
    return f"""# The demo, five times

`make demo` trains a small network on warped digits (`--data warped-digits`: scikit-learn's digits, enlarged to 16 x 16, turned,
sheared, shifted and noisy; 3,590 test images made from digits that are in no other part), searches, distils the result and the uniform
allocation for equally many epochs, and prints a table. The network is built as those for phones are (the fused blocks of EfficientNetV2):
narrow between its blocks, eight times wider inside them. Here is what it prints over several seeds: means, and ranges in brackets. *before
training* is what pruning and repair by least squares leave, *magnitude* one ranking of all channels by their weights. Latency is eager
PyTorch, one thread, batch 32, as a share of the original's, each measured in turn with it. *search* is what a run
[keeps](../how-to/report.md): the best on held-out images of what the search found, the uniform allocation and the one halfway between them.

Network and target were chosen so that allocations differ. On an even residual network at 15 % of its multiply-accumulates, which this page
had before, they did not after three epochs of distillation: the search ended 0.16 points below uniform (standard error 0.08).

{table(cells)}

```console
$ {command}
```
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the seeds that are missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\\n")[0])
    parser.add_argument("--seeds", default="0,1,2,3,4", help="which seeds, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("build/demo.jsonl"), help="a line for each finished seed")
    parser.add_argument("--page", type=Path, help="where the page goes")
    options, more = parser.parse_known_args(arguments)
    cells = [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()] if options.out.exists() else []
    for seed in (int(text) for text in options.seeds.split(",")):
        if any(cell["seed"] == seed and cell["options"] == [*demo_options(), *more] for cell in cells):
            continue
        print(f"seed {seed}", file=sys.stderr)
        cells.append(measured(seed, more))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cells[-1]) + "\n")
    print(table(cells))
    if options.page is not None:
        command = f"python -m benchmarks.demo --seeds {options.seeds} --page {options.page}"
        options.page.write_text(page(cells, command), encoding="utf-8")


if __name__ == "__main__":
    main()
