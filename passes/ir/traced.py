"""The traced model as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxprune.passes.ir.notes import Note
from fxprune.passes.ir.skeleton import Skeleton, below


@dataclass(frozen=True)
class PartCall:
    """What a part is called with on the example: ``args`` and ``kwargs``, tensors on meta, which were on ``device``. All calls of the part
    together are given ``times`` as much."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device | None = None
    times: float = 1.0


@dataclass
class TracedModel:
    """What tracing a module gave.

    ``graphs``: "eval" and, where it differs, "train"; node.meta holds ``val`` (concrete value on the example, tensors on meta) and
    ``where`` (file:line in the user's source).
    ``constants``: attribute name -> tensor, for tensors the forward pass made or held outside parameters and buffers.
    ``read``: names of tensors whose values Python code has read, so that numbers in the graph stand for them.
    ``notes``: what had to be specialised or could not be kept. ``opaque``: submodules and functions that could not be traced -> why.
    ``parts``: the submodules that were traced by themselves, since the root around them could not be, or a module in ``opaque``: path ->
    its call; their graphs are named ``path:mode``. ``no_parts``: submodules that could have been parts and are none -> why.
    """

    skeleton: Skeleton
    graphs: dict[str, fx.Graph]
    constants: dict[str, torch.Tensor]
    read: set[str] = field(default_factory=set)
    notes: tuple[Note, ...] = ()
    opaque: dict[str, str] = field(default_factory=dict)
    parts: dict[str, PartCall] = field(default_factory=dict)
    no_parts: dict[str, str] = field(default_factory=dict)

    @property
    def of_root(self) -> dict[str, fx.Graph]:
        """The root's own graphs, by mode."""
        return {mode: graph for mode, graph in self.graphs.items() if ":" not in mode}

    @property
    def in_parts(self) -> bool:
        """Whether the root has no graph, only parts of it have."""
        return not self.of_root

    @property
    def sections(self) -> list[str]:
        """The paths of all that has a graph: the root's (""), where it has one, and those of the parts."""
        return [*([] if self.in_parts else [""]), *self.parts]

    def within(self, path: str) -> bool:
        """Whether a part lies in a module that the graph of the root or of another part calls as it is."""
        return any(below(path, outer) for outer in self.opaque)

    def inside(self, section: str = "") -> list[str]:
        """The parts within ``section`` that lie in no other part within it; ``section`` "": those of the whole model."""
        found = [p for p in self.parts if p != section and (not section or below(p, section))]
        return [p for p in found if not any(below(p, q) for q in found)]

    def with_modes(self, section: str = "") -> tuple[str, ...]:
        """The modules within ``section`` whose own code does something else in training: a graph has it as the mode of the whole has it.

        Modules whose code computes as in evaluation there do not count, nor what is a layer of torch and asks for itself.
        """
        prefix = f"{section}:" if section else ""
        if f"{prefix}train" not in self.graphs:
            return ()
        done = {mode: Counter(map(_as_written, self.graphs[prefix + mode].nodes)) for mode in ("eval", "train")}
        differing = (done["eval"] - done["train"]) + (done["train"] - done["eval"])
        return tuple(sorted({owner for owner, *_ in differing} - {"", section} - self.skeleton.as_in_evaluation.keys()))

    @property
    def eval_modes(self) -> list[str]:
        """The names of the graphs that evaluation runs."""
        return [mode for mode in self.graphs if mode.rpartition(":")[2] == "eval"]


class Surroundings:
    """What runs the modules of a traced model: a graph, or code that was not traced. Asked once all parts are known."""

    def __init__(self, traced: TracedModel) -> None:
        self.traced = traced
        self._parts = traced.skeleton.all_names(traced.parts)  # a part is one under all of its names

    def opaque(self, path: str) -> str | None:
        """The module in ``opaque`` whose untraced code runs the one at ``path``; None where there is none, or a part lies between."""
        for outer in _upwards(path):
            if outer in self._parts:
                return None
            if outer in self.traced.opaque:
                return outer
        return None

    def in_part(self, path: str) -> bool:
        """Whether the module at ``path`` is a part or lies in one."""
        return any(outer in self._parts for outer in _upwards(path))

    def why(self, path: str) -> str:
        """Why the code around the module at ``path`` could not be traced, and why it is no part of it by itself; empty where it was."""
        opaque = self.opaque(path)
        if opaque is None:
            return ""
        alone = next((self.traced.no_parts[p] for p in _upwards(path) if p in self.traced.no_parts and below(p, opaque)), "")
        why = f"it is inside {opaque!r}, which could not be traced: {self.traced.opaque[opaque]}"
        return f"{why}; and {alone}" if alone else why


def _as_written(node: fx.Node) -> tuple[str, ...]:
    """The module whose code made a node, and what that says there: the call and its literals."""
    given = map_arg((node.args, node.kwargs), lambda _: None)
    return str(node.meta.get("owner") or ""), node.op, str(node.target), repr(given)


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
