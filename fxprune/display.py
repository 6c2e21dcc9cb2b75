"""``visualize``: the coupling graph printed as a tree, or written to a file for people or for graph tools."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import networkx as nx
from torch import nn

from fxprune import report
from fxprune.api import analyze
from fxprune.errors import InputError
from fxprune.passes.coupling import CouplingGraph
from fxprune.records import PruningRecord

SUFFIXES = (".html", ".svg", ".txt", ".dot", ".graphml")


def visualize(model_or_graph: nn.Module | CouplingGraph, example_inputs: Any = None, *, file: str | os.PathLike[str] | None = None) -> None:
    """Print what is coupled with what: groups as a tree, their members, what couples them, and why locked ones are locked.

    ``file``: written instead, in the format of its suffix: .html, .svg and .txt for people, .dot and .graphml for graph tools. For a slim
    module the groups are shown that it was cut from, with how much of each is left.
    """
    removed = None
    if isinstance(model_or_graph, CouplingGraph):
        graph = model_or_graph
    else:
        graph = analyze(model_or_graph, example_inputs)
        made = getattr(model_or_graph, "_record", None)
        removed = made.removed_units if isinstance(made, PruningRecord) else None
    path = None if file is None else Path(file)
    if path is not None and path.suffix not in SUFFIXES:
        raise InputError(f"cannot write {path.name!r}: its suffix must be one of {', '.join(SUFFIXES)}")
    if path is not None and path.suffix in (".dot", ".graphml"):
        _write_graph(graph, path)
        return
    report.show(report.coupling_tree(graph, removed=removed), file=path)


def _write_graph(graph: CouplingGraph, path: Path) -> None:
    plain: nx.Graph[str] = nx.Graph()
    for (name, dim), data in graph.graph.nodes(data=True):
        plain.add_node(f"{name}:{dim}", size=int(data["size"]))
    for (a, i), (b, j), data in graph.graph.edges(data=True):
        plain.add_edge(f"{a}:{i}", f"{b}:{j}", op=str(data["op"]))
    if path.suffix == ".graphml":
        nx.write_graphml(plain, path)
        return
    lines = ["graph coupling {", "  node [shape=box];"]
    lines += [f'  "{n}" [label="{n}\\n{d["size"]}"];' for n, d in plain.nodes(data=True)]
    lines += [f'  "{a}" -- "{b}" [label="{d["op"]}"];' for a, b, d in plain.edges(data=True)]
    path.write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")
