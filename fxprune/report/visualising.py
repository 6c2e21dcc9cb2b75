"""``visualize``: the coupling graph printed as a tree, or written to a file for people or for graph tools."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import networkx as nx
from torch import nn

from fxprune.api import analyze
from fxprune.atomic import replace_text
from fxprune.attached import record_of
from fxprune.errors import InputError
from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.report import terminal as report
from fxprune.report.lane_layout import coupling_data, folded, packed
from fxprune.report.lane_svg import coupling_svg
from fxprune.report.page import coupling_page

SUFFIXES = (".html", ".svg", ".txt", ".dot", ".graphml")


def visualize(model_or_graph: nn.Module | CouplingGraph, example_inputs: Any = None, *, file: str | os.PathLike[str] | None = None) -> None:
    """Print what is coupled with what: groups as a tree, their members, what couples them, and why locked ones are locked.

    Args:
        model_or_graph: a model, a slim module or a ``CouplingGraph``. A slim module is shown as it is now, with how many units each of its
            groups lost.
        example_inputs: a tensor, a tuple or a dict; not needed with a graph or a module that records them.
        file: a path that is written instead, in the format of its suffix: .html, .svg and .txt for people, .dot and .graphml for graph
            tools. Its folder is made where it is missing. The page can be zoomed and searched; without plotly it has a table and says so.

    Returns:
        Nothing.

    Raises:
        InputError: the suffix of ``file`` is none of these, or the example inputs are missing or do not fit.
        TraceError: the model cannot be traced.
        FileError: ``file`` cannot be written.
    """
    graph = model_or_graph if isinstance(model_or_graph, CouplingGraph) else analyze(model_or_graph, example_inputs)
    made = record_of(graph.model)
    lost = {} if made is None else made.removed_units
    path = None if file is None else Path(file)
    if path is not None and path.suffix not in SUFFIXES:
        raise InputError(f"cannot write {path.name!r}: its suffix must be one of {', '.join(SUFFIXES)}")
    if path is not None and path.suffix in (".dot", ".graphml"):
        _write_graph(graph, path)
        return
    if path is not None and path.suffix in (".html", ".svg"):
        data, title = coupling_data(graph), f"coupling graph of {'a slim module' if lost else type(graph.model).__name__}"
        text = coupling_page(title, data) if path.suffix == ".html" else coupling_svg(packed(folded(data)), title)
        replace_text(path, text, "the picture")
        return
    tree = report.coupling_tree(graph, lost=lost)
    if path is None:
        report.show(tree)
    else:
        replace_text(path, report.text_of(tree), "the tree")


def _write_graph(graph: CouplingGraph, path: Path) -> None:
    """Nodes are dimensions of parameters, as in ``CouplingGraph.graph``; each says which groups it is in, and whether they are prunable."""
    groups: dict[tuple[str, int], list[Group]] = {}
    for group in graph.groups:
        for name, dim, _ in group.members:
            groups.setdefault((name, dim), []).append(group)
    plain: nx.Graph[str] = nx.Graph()
    for (name, dim), data in graph.graph.nodes(data=True):
        inside = groups.get((name, dim), [])
        facts = {"groups": ", ".join(group.name for group in inside), "prunable": any(group.prunable for group in inside)}
        plain.add_node(f"{name}:{dim}", size=int(data["size"]), **facts)
    for (a, i), (b, j), data in graph.graph.edges(data=True):
        plain.add_edge(f"{a}:{i}", f"{b}:{j}", op=str(data["op"]))
    if path.suffix == ".graphml":
        text = "\n".join(("<?xml version='1.0' encoding='utf-8'?>", *nx.generate_graphml(plain), ""))
    else:
        text = _dot(plain)
    replace_text(path, text, "the graph")


def _dot(plain: nx.Graph[str]) -> str:
    """The graph in Graphviz's language, a box around the nodes that lie in one group only."""
    quoted = json.dumps  # escapes what has to be, and Graphviz reads a line's end as JSON writes it
    lines = [
        "graph coupling {",
        "  rankdir=LR;",
        '  node [shape=box, style="rounded", fontname="sans-serif", fontsize=11];',
        "  edge [fontsize=9];",
    ]
    boxes: dict[str, list[str]] = {}
    for node, data in plain.nodes(data=True):
        boxes.setdefault("" if ", " in data["groups"] else data["groups"], []).append(node)
    for number, (group, nodes) in enumerate(boxes.items()):
        labels = [f"{node}\n{plain.nodes[node]['size']}" for node in nodes]
        inside = [f"    {quoted(node)} [label={quoted(label)}];" for node, label in zip(nodes, labels, strict=True)]
        style = "rounded" if plain.nodes[nodes[0]]["prunable"] else "dashed"
        head = [f"  subgraph cluster_{number} {{", f"    label={quoted(group)}; style={style};"]
        lines += [*head, *inside, "  }"] if group else inside
    lines += [f"  {quoted(a)} -- {quoted(b)} [label={quoted(data['op'])}];" for a, b, data in plain.edges(data=True)]
    return "\n".join([*lines, "}"]) + "\n"
