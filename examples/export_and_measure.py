"""Prune, fold, export to whatever runtime is installed, and measure: does a smaller network run faster there?

python examples/export_and_measure.py
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxprune
from fxprune.exporting.formats import FORMATS, installed
from fxprune.models.small import resnet20

SMALL = os.environ.get("FXPRUNE_EXAMPLE_BUDGET") == "small"


def median_ms(run: Callable[[], Any], turns: int) -> float:
    run()
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 32)
    model = resnet20().eval().requires_grad_(False)
    slim = fxprune.compress(model, 0.3, x, round_to=8).eval()
    record = fxprune.record(slim)
    turns = 3 if SMALL else 30
    print(f"MACs {record.after.macs / record.before.macs:.0%} of the original")
    for name, module in (("original", model), ("slim", slim), ("slim, BatchNorm folded", fxprune.fold_batchnorm(slim))):
        with torch.no_grad():
            print(f"{name}: {median_ms(lambda module=module: module(x), turns):.1f} ms in eager PyTorch")  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as made:
        for name in ("torch",) if SMALL else ("torch", "onnx", "openvino"):
            if not installed((*FORMATS[name].writes, *FORMATS[name].runs)):
                print(f"{name}: not installed, pip install 'fxprune[{FORMATS[name].extra}]'")
                continue
            done = fxprune.export(slim, Path(made) / f"slim{FORMATS[name].suffix}")
            print(f"{name}: {done.bytes / 1e6:.2f} MB, outputs within {done.difference:.0e} of PyTorch's")


if __name__ == "__main__":
    main()
