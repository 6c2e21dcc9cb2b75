"""Coupling reports as plain text, for comparison with the files under ``golden/``."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import torch

import fxprune
from fxprune.passes.coupling.graph import CouplingGraph
from tests.passes.zoo.networks import ZOO

FOLDER = Path(__file__).parent / "golden"
COMMAND = "python -m tests.passes.golden"


@functools.lru_cache(1)
def graph_of(name: str) -> CouplingGraph:
    torch.manual_seed(0)
    network = ZOO[name]
    return fxprune.analyze(network.make().eval(), network.inputs())


def report(name: str) -> str:
    """The coupling report of a network of the zoo: one paragraph per group, members as name:dimension[indices]."""
    graph = graph_of(name)
    return f"# {COMMAND} {name}\n" + "".join(_group(graph, i) for i in range(len(graph.groups)))


def _group(graph: CouplingGraph, number: int) -> str:
    group = graph.groups[number]
    state = "prunable" if group.prunable else f"locked: {_plain(group.reason)}"
    lines = [f"\n{group.name}: {group.size} units, {state}"]
    lines += [f"  note: {_plain(note)}" for note in group.notes]
    lines += [f"  {name}:{dim}[{_ranges(indices.numpy())}]" for name, dim, indices in group.members]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Without paths and line numbers, which move with every edit."""
    return re.sub(r" ?\(?(?:/|[A-Z]:)[^\s()]*\.py:\d+\)?:?", "", text)


def _ranges(indices: np.ndarray) -> str:
    if not len(indices):
        return ""
    steps = np.diff(indices)
    if len(indices) > 2 and steps[0] > 1 and (steps == steps[0]).all():
        return f"{indices[0]}:{indices[-1] + 1}:{steps[0]}"
    breaks = np.flatnonzero(steps != 1)
    starts, ends = indices[np.r_[0, breaks + 1]], indices[np.r_[breaks, len(indices) - 1]] + 1
    return ",".join(f"{s}" if e == s + 1 else f"{s}:{e}" for s, e in zip(starts, ends, strict=True))


def main() -> None:
    """Write the reports of the networks that the arguments name, of all where there are none; files of networks that are gone go."""
    import sys

    FOLDER.mkdir(exist_ok=True)
    names = sys.argv[1:] or sorted(ZOO)
    for name in names:
        (FOLDER / f"{name}.txt").write_text(report(name), encoding="utf-8")
    for file in FOLDER.glob("*.txt"):
        if file.stem not in ZOO:
            file.unlink()


if __name__ == "__main__":
    main()
