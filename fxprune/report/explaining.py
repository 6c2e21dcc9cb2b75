"""``explain``: what the analysis found in a network, what is locked and why, and what its owner could do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from fxprune.api import analyze
from fxprune.errors import few
from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.passes.ir.reasons import Reason, ReasonKind, is_as_it_must_be
from fxprune.passes.planning.cost_model import cost_model
from fxprune.passes.planning.plan import plan

# What to do about channels that are held by each kind of reason.
ADVICE = {
    ReasonKind.IGNORED: "take it out of ignore= to have it pruned",
    ReasonKind.NO_RULE: "say what the operation does to channels with fxprune.register_op (examples/own_operation.py)",
    ReasonKind.RULE_FAILED: "the rule of this operation failed; please report it, with the line that it names",
    ReasonKind.UNTRACED: "make what it names depend on shapes only, or export the model: "
    "fxprune.compress(torch.export.export(model, inputs).module(), policy, inputs)",
    ReasonKind.UNUSED: "the network does not use it: delete it",
    ReasonKind.COMPUTED_INDEX: "where the index does not depend on the inputs, keep it in a buffer",
    ReasonKind.ASSIGNED: "join the parts with torch.cat instead of assigning into a slice",
    ReasonKind.WRITTEN_IN_PLACE: "assign instead (x[:, ::2] = ...), or join the parts with torch.cat",
    ReasonKind.TWO_INDICES: "pick along one axis after the other",
    ReasonKind.PYTHON: "compute with the tensor itself: a number taken out of it by item() or float() stays what it was",
    ReasonKind.FLAT: "roll along a named dimension: torch.roll(x, shift, dims=...)",
    ReasonKind.FOLDED: "the other channels on that axis can be pruned; attention= chooses between heads and head_dim",
    ReasonKind.EXPERTS: "analyze(..., experts=True) lets whole experts go",
    ReasonKind.CHOICE: "where experts are chosen, let the code index, count, sort or scatter by their positions alone",
    ReasonKind.FIXED_SIZE: "look at what gives that tensor its size",
}
BRACKETS = "the operation in brackets fixes the size that these channels meet; change it or leave it"
PARTS = "parts keep their outer sizes; a model that torch.export takes whole is pruned across them"
OTHERWISE = "the operation needs all of these channels together"


@dataclass(frozen=True)
class Lock:
    """Groups locked for one reason. ``advice``: what to do about it, empty where nothing should be; ``channels``: how many units."""

    reason: str
    advice: str
    groups: tuple[str, ...]
    channels: int


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; ``str()`` of it, and what a console shows, is the text for people.

    ``traced``: how the network was read. ``notes``: what was specialised, and what could not be kept. ``groups``, ``prunable``: how many.
    ``params_left``, ``macs_left``: shares that remain with half of every prunable group. ``locks``: by reason, those to act on first.
    ``statistics``: note -> groups whose pruning changes a statistic over channels, where removing is not the same as zeroing.
    ``unknown``: operation without a rule -> where it is called. ``blocks``: of a graph analysed with ``blocks=True``, name -> why the block
    has to stay, empty where it can be left out.
    """

    traced: str
    notes: tuple[str, ...]
    groups: int
    prunable: int
    params_left: float
    macs_left: float
    locks: tuple[Lock, ...]
    statistics: dict[str, tuple[str, ...]]
    unknown: dict[str, str]
    blocks: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.traced}.",
            f"{self.prunable} of {self.groups} groups of channels can be pruned; half of each leaves {self.params_left:.0%} of the "
            f"parameters and {self.macs_left:.0%} of the MACs.",
        ]
        if self.blocks:
            free = [name for name, reason in self.blocks.items() if not reason]
            lines.append(f"{len(free)} of {len(self.blocks)} blocks can be left out{': ' if free else ''}{few(free, 4)}.")
        lines += _titled("Notes", self.notes)
        lines += _titled("Operations without a rule", (f"{name}, at {where}" for name, where in self.unknown.items()))
        act, fine = [x for x in self.locks if x.advice], [x for x in self.locks if not x.advice]
        for text in dict.fromkeys(x.advice for x in act):
            lines += _titled(f"Locked; {text}", (_line(x) for x in act if x.advice == text))
        lines += _titled("Locked, as it must be", map(_line, fine))
        lines += _titled("Blocks that have to stay", (f"{name}: {reason}" for name, reason in self.blocks.items() if reason))
        lines += _titled(
            "Pruned, but not the same as zeroing",
            (f"{note}: {few(groups, 4)}" for note, groups in self.statistics.items()),
        )
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    model: nn.Module | CouplingGraph, example_inputs: Any = None, *, ignore: Iterable[Any] = (), attention: str = "auto"
) -> Explanation:
    """Say what can be pruned of ``model``, what is locked and why, and what could be done about it. Nothing is pruned.

    Args:
        model: as for ``analyze``, or the graph that it returned.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; not needed with a graph.
        ignore: modules, classes of modules, qualified names or globs, one or several; their output channels stay.
        attention: prune "heads", "head_dim", or "auto", the axis with more units.

    Returns:
        The findings; ``print`` shows them as text.

    Raises:
        TraceError: ``model`` cannot be traced.
        InputError: the example inputs are missing or do not fit.
    """
    graph = model if isinstance(model, CouplingGraph) else analyze(model, example_inputs, ignore=ignore, attention=attention)
    open_groups = [g for g in graph.groups if g.prunable]
    keep = plan(graph, 0.5, {g.name: np.zeros(g.size) for g in open_groups})
    costs = cost_model(graph)
    statistics: dict[str, list[str]] = {}
    for group in open_groups:
        for note in group.notes:
            statistics.setdefault(_general(note), []).append(group.name)
    return Explanation(
        _traced(graph),
        tuple(graph.notes),
        len(graph.groups),
        len(open_groups),
        costs.params(keep) / max(costs.params(), 1),
        costs.macs(keep) / max(costs.macs(), 1),
        _locks([g for g in graph.groups if not g.prunable]),
        {note: tuple(names) for note, names in statistics.items()},
        dict(graph.unknown),
        {block.name: "" if block.removable else block.reason for block in graph.blocks},
    )


def _locks(groups: list[Group]) -> tuple[Lock, ...]:
    alike: dict[str, list[Group]] = {}
    for group in groups:
        alike.setdefault(_general(group.reason), []).append(group)
    found = [
        Lock(text, advice(_reason(members[0])), tuple(g.name for g in members), sum(g.size for g in members))
        for text, members in alike.items()
    ]
    return tuple(sorted(found, key=lambda x: (not x.advice, -x.channels, x.reason)))


def _general(reason: str) -> str:
    return reason.general if isinstance(reason, Reason) else reason


def _reason(group: Group) -> Reason:
    return group.reason if isinstance(group.reason, Reason) else Reason(ReasonKind.OPERATION, group.reason)


def advice(reason: Reason) -> str:
    """What to do about a reason; empty where the channels are locked as they must be."""
    if reason.kind is ReasonKind.OUTPUT or reason.root.kind is ReasonKind.INPUT:
        return PARTS if reason.root.part else ""
    if reason.kind is not ReasonKind.UNUSED and is_as_it_must_be(reason):
        return ""
    if reason.kind is ReasonKind.FIXED_SIZE and reason.because is not None:
        return BRACKETS
    return ADVICE.get(reason.kind, OTHERWISE)


def _traced(graph: CouplingGraph) -> str:
    traced = graph.traced
    name = type(graph.model).__name__
    nested = [path for path in traced.parts if traced.within(path)]
    own = [path for path in traced.parts if path not in nested]
    inside = f", and {len(nested)} in modules that could not be traced: {few(nested, 4)}" if nested else ""
    if traced.in_parts:
        return f"{name} was traced in {len(own)} parts: {few(own, 4)}{inside}; the code between them runs as it is"
    modes = "in training and evaluation mode" if len(traced.of_root) > 1 else "whole"
    kept = f", with {few(tuple(sorted(traced.opaque)), 4)} kept as it is" if traced.opaque else ""
    parts = f", apart from {len(nested)} parts that were traced by themselves: {few(nested, 4)}" if nested else ""
    return f"{name} was traced {modes}{kept}{parts}"


def _line(lock: Lock) -> str:
    count = len(lock.groups)
    return f"{lock.channels} channels in {count} {'group' if count == 1 else 'groups'}: {lock.reason} ({few(lock.groups, 4)})"


def _titled(title: str, items: Iterable[str]) -> list[str]:
    lines = [f"  {item}" for item in items]
    return [f"{title}:", *lines] if lines else []
