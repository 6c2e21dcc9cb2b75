"""The members of coupling groups, gathered by layer: plain data for the tree, the drawings and the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Group(Protocol):
    """What is shown of a coupling group."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def members(self) -> Sequence[tuple[str, int, Any]]: ...
    @property
    def units(self) -> Sequence[Any]: ...
    @property
    def prunable(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    @property
    def notes(self) -> Sequence[str]: ...


class Graph(Protocol):
    """What is shown of a coupling graph: its groups, a ``networkx`` graph whose edges carry ``op``, and which dimensions are outputs."""

    @property
    def groups(self) -> Sequence[Any]: ...
    @property
    def graph(self) -> Any: ...
    def is_output(self, key: tuple[str, int]) -> bool: ...


@dataclass(frozen=True)
class Line:
    """One layer in a group: which slices of its parameters belong to it, how many indices are kept, and what couples it."""

    layer: str
    kind: str
    slices: str
    kept: int
    total: int
    joins: str


def layer_lines(group: Group, graph: Any, gone: Iterable[int] = ()) -> list[Line]:
    """The members of a group, gathered by layer, in their order."""
    lost = set(gone)
    by_layer: dict[str, list[tuple[str, int, Any, Any]]] = {}
    for (name, dim, indices), units in zip(group.members, group.units, strict=True):
        layer, _, leaf = name.rpartition(".")
        by_layer.setdefault(layer or leaf, []).append((name, dim, indices.tolist(), units.tolist()))
    inside = {(name, dim) for name, dim, _ in group.members}
    lines = []
    for layer, members in by_layer.items():
        ops = {op for name, dim, _, _ in members for op in _ops(graph, (name, dim), inside)}
        own = next((op for op in sorted(ops) if op.startswith(f"{layer} (")), _own(graph, members[0]))
        kind = own.rpartition(" (")[2].rstrip(")") if own.startswith(f"{layer} (") else ""
        joins = ", ".join(sorted(op for op in ops if " (" not in op))
        # One channel is one index of the layer's widest member; norms have several vectors of the same length.
        _, _, widest, its_units = max(members, key=lambda member: len(member[2]))
        kept = sum(unit not in lost for unit in its_units)
        lines.append(Line(layer, kind, _slices(members), kept, len(widest), joins))
    return lines


def _ops(graph: Any, node: tuple[str, int], inside: set[tuple[str, int]]) -> list[str]:
    return [str(data.get("op", "")) for _, other, data in graph.edges(node, data=True) if other in inside]


def _own(graph: Any, member: tuple[str, int, Any, Any]) -> str:
    return str(graph.nodes[member[0], member[1]].get("op", ""))


def _slices(members: Sequence[tuple[str, int, list[int], Any]]) -> str:
    """``weight[0:64]``, ``weight[:, 0:64]``: the slices of each parameter; parameters with the same slice together."""
    names_of: dict[str, list[str]] = {}
    for name, dim, indices, _ in members:
        names_of.setdefault(f"[{':, ' * dim}{slices(indices)}]", []).append(name.rpartition(".")[2])
    return " ".join(f"{_leaves(names)}{where}" for where, names in names_of.items())


def _leaves(names: Sequence[str]) -> str:
    return ",".join(names) if len(names) <= 2 else "all"


def slices(indices: Sequence[int]) -> str:
    """Sorted indices as ranges: ``0:64``, ``0:8, 16:24``, ``0:64:2``; beyond four ranges the first, the last and how many there are."""
    step = indices[1] - indices[0] if len(indices) > 2 else 1
    if step > 1 and all(b - a == step for a, b in zip(indices, indices[1:], strict=False)):
        return f"{indices[0]}:{indices[-1] + 1}:{step}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1]:
            runs[-1][1] = index + 1
        else:
            runs.append([index, index + 1])
    shown = [f"{low}:{high}" for low, high in runs]
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]}, …, {shown[-1]} in {len(shown)} runs"
