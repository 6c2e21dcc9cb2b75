"""A coupling graph laid out for drawing: every layer a row, in the order of execution, every group a lane that joins its layers.

A row's marks say which groups the layer writes, reads or carries. What is returned is plain data that JSON can hold: nothing here draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxprune.report.layers import Graph, layer_lines

Json = dict[str, Any]
ROWS_DRAWN = 160  # more rows than these are folded: norms first, then modules
WRITES, READS, BOTH, CARRIES = "writes", "reads", "writes and reads", "carries"
ROLES = (WRITES, READS, BOTH, CARRIES)


def coupling_data(graph: Graph, removed: Mapping[str, Any] | None = None) -> Json:
    """The layers and groups of a coupling graph. ``removed``: group name -> numbers of the units that are gone.

    "layers": each with its "name" and "kind". "groups": each with "name", "size", "kept" (units), "prunable", "reason", "notes" and
    "marks", one for every layer that has a part in it: "layer", "role", "slices", "kept" and "total" (indices), "joins".
    """
    removed = removed or {}
    order = {_layer(name): "" for name, _ in graph.graph.nodes}
    weights = {key[0] for key in graph.graph.nodes if graph.is_output(key)}
    groups = []
    for group in graph.groups:
        gone = {int(unit) for unit in removed.get(group.name, ())}
        written = {_layer(name) for name, dim, _ in group.members if graph.is_output((name, dim))}
        # A weight's other dimension reads; a bias goes with its layer's output and reads nothing.
        read = {_layer(name) for name, dim, _ in group.members if name in weights and not graph.is_output((name, dim))}
        marks = []
        for line in layer_lines(group, graph.graph, gone):
            order[line.layer] = line.kind or order.get(line.layer, "")
            mark = {"layer": line.layer, "role": _role(line.layer in written, line.layer in read), "slices": line.slices}
            marks.append({**mark, "kept": line.kept, "total": line.total, "joins": line.joins})
        facts = {"prunable": group.prunable, "reason": group.reason, "notes": list(group.notes)}
        groups.append({"name": group.name, "size": group.size, "kept": group.size - len(gone), **facts, "marks": marks})
    used = {mark["layer"] for group in groups for mark in group["marks"]}
    return {"layers": [{"name": name, "kind": kind} for name, kind in order.items() if name in used], "groups": groups}


def _layer(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    return layer or leaf


def _role(writes: bool, reads: bool) -> str:
    return BOTH if writes and reads else WRITES if writes else READS if reads else CARRIES


def folded(data: Json, limit: int = ROWS_DRAWN) -> Json:
    """``data`` with at most ``limit`` rows: first without layers that only carry a group, then with modules in place of their layers."""
    if len(data["layers"]) <= limit:
        return data
    active = {mark["layer"] for group in data["groups"] for mark in group["marks"] if mark["role"] != CARRIES}
    groups = [{**group, "marks": [mark for mark in group["marks"] if mark["layer"] in active]} for group in data["groups"]]
    slim = {"layers": [one for one in data["layers"] if one["name"] in active], "groups": groups}
    depth = max((one["name"].count(".") for one in slim["layers"]), default=0)
    found = slim
    while len(found["layers"]) > limit and depth > 0:
        found = _by_module(slim, depth)
        depth -= 1
    return found


def _by_module(data: Json, depth: int) -> Json:
    """Rows for the first ``depth`` parts of the layers' names; groups that stay inside one of them are counted there."""
    where = {one["name"]: ".".join(one["name"].split(".")[:depth]) for one in data["layers"]}
    layers: dict[str, int] = {}
    for name in where.values():
        layers[name] = layers.get(name, 0) + 1
    inside = dict.fromkeys(layers, 0)
    groups = []
    for group in data["groups"]:
        rows: dict[str, list[Json]] = {}
        for mark in group["marks"]:
            rows.setdefault(where[mark["layer"]], []).append(mark)
        if len(rows) < 2 and len(group["marks"]) > 1:
            inside[next(iter(rows))] += 1
            continue
        marks = [_merged(name, marks) for name, marks in rows.items()]
        groups.append({**group, "marks": marks})
    kinds = {name: f"{count} layers" + (f", {inside[name]} groups inside" if inside[name] else "") for name, count in layers.items()}
    return {"layers": [{"name": name, "kind": kinds[name]} for name in layers], "groups": groups}


def _merged(name: str, marks: list[Json]) -> Json:
    if len(marks) == 1:
        return {**marks[0], "layer": name}
    roles = {mark["role"] for mark in marks} - {CARRIES}
    role = BOTH if len(roles) > 1 else next(iter(roles), CARRIES)
    names = ", ".join(mark["layer"].rpartition(".")[2] for mark in marks[:6]) + (", …" if len(marks) > 6 else "")
    widest = max(marks, key=lambda mark: int(mark["total"]))
    joins = ", ".join(dict.fromkeys(mark["joins"] for mark in marks if mark["joins"]))
    return {**widest, "layer": name, "role": role, "slices": names, "joins": joins}


def packed(data: Json) -> Json:
    """``data`` with the place of everything: "row" of each mark, "top", "bottom" and "lane" of each group, and how many "lanes" there are.

    Groups that no row has in common may lie in the same lane; each takes the first one that is free, so that long ones come to the left.
    """
    row_of = {one["name"]: row for row, one in enumerate(data["layers"])}
    groups = []
    for group in data["groups"]:
        marks = sorted(({**mark, "row": row_of[mark["layer"]]} for mark in group["marks"]), key=lambda mark: mark["row"])
        if marks:
            groups.append({**group, "marks": marks, "top": marks[0]["row"], "bottom": marks[-1]["row"]})
    free: list[int] = []  # the first row below what each lane holds so far
    for group in sorted(groups, key=lambda one: (one["top"], -one["bottom"])):
        lane = next((number for number, row in enumerate(free) if row <= group["top"]), len(free))
        free[lane:] = [group["bottom"] + 1, *free[lane + 1 :]]
        group["lane"] = lane
    return {**data, "groups": groups, "lanes": len(free)}
