"""What a pruning fell short of: the sentence for users whose policy removed nothing, or little because most of the network is locked."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.passes.ir.reasons import Reason, ReasonKind, is_as_it_must_be
from fxprune.passes.planning.naming import Wanted
from fxprune.passes.planning.plan import Keep

_SHOWN = 3  # locked parts that the sentence names


def shortfall(graph: CouplingGraph, wanted: Wanted, keep: Keep, round_to: int, limited: Mapping[str, int]) -> str:
    """In one sentence, what a positive sparsity did not remove; empty where it did what was asked.

    That is where nothing goes at all, or where locked groups keep back more than half of the channels asked for. Channels are counted once
    for each output of a layer. What every network keeps (its outputs, its vocabulary) and what ``ignore`` or ``most`` hold was not asked
    for. ``limited``: group name -> units that it may lose (``passes.planning.naming.limits``).
    """
    asked = {name: p for name, p in wanted.sparsity.items() if p > 0}
    if not asked and not wanted.locked:
        return ""
    width = _outputs(graph)
    locked = [graph.by_name[name] for name in wanted.locked]
    missed = [g for g in locked if not _must(g) and g.kind is not ReasonKind.IGNORED]
    free = sum(p * width[graph.by_name[name].number] for name, p in asked.items())
    held = sum(wanted.locked[g.name] * width[g.number] for g in missed)
    if keep.all():
        why = _why_nothing(graph, asked, locked, round_to, limited)
        return f"the policy asks for channels to be removed and none were: {why}"
    if free < held:
        share = free / (free + held)
        return f"of the channels that the policy asks to remove {share:.0%} can go, the others are locked: {_largest(missed, width)}"
    return ""


def _why_nothing(graph: CouplingGraph, asked: Mapping[str, float], locked: list[Group], round_to: int, limited: Mapping[str, int]) -> str:
    groups = [graph.by_name[name] for name in asked]
    if not groups:
        inside = [g for g in locked if not _must(g)] or locked
        return f"all groups it names are locked: {_largest(inside, _outputs(graph))}"
    if all(limited.get(g.name, g.size) == 0 for g in groups):
        return "most= leaves every group whole; raise it"
    widest = max(groups, key=lambda g: (asked[g.name] * g.size, g.name))
    if int(asked[widest.name] * widest.size + 1e-6) == 0:
        return f"no group loses a whole unit at this sparsity ({widest.name!r} has {widest.size}); raise it"
    if round_to > 1:
        return f"round_to={round_to} rounds every width up to what it was ({widest.name!r} has {widest.size} units); lower it"
    return f"no group has a unit to spare ({widest.name!r} has {widest.size}); fxprune.explain(model, inputs) says more"


def _must(group: Group) -> bool:
    return isinstance(group.reason, Reason) and is_as_it_must_be(group.reason)


def _largest(groups: list[Group], width: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    order = sorted(groups, key=lambda g: (-int(width[g.number]), g.number))[:_SHOWN]
    named = "; ".join(f"{g.name!r} ({int(width[g.number]) or g.size} channels: {g.reason})" for g in order)
    more = f" and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
    return f"the largest are {named}{more}; fxprune.explain(model, inputs) says what to do about each"


def _outputs(graph: CouplingGraph) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """By group number, how many output channels of layers belong to the group."""
    found = np.zeros(len(graph.starts), dtype=np.int64)
    for key in graph.keys:
        if graph.is_output(key):
            found += np.bincount(graph.group_of_unit[graph.unit_of[key]], minlength=len(found))
    return found
