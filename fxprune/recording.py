"""The record of one rewrite, and of several in a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fxprune.attached import record_of
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.planning.cost_model import cost_model
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.policies import Policy
from fxprune.records import PruningRecord


def made_record(
    graph: CouplingGraph, slimmer: Slimmer, keep: Any, policy: Policy, keep_class: bool = False, notes: tuple[str, ...] = ()
) -> PruningRecord:
    """The record of one rewrite, in terms of the outermost original."""
    skeleton = graph.traced.skeleton
    kept: dict[str, dict[int, torch.Tensor]] = {}
    for name in skeleton.names:
        dims = slimmer.kept_dims(name)
        if dims:
            for alias in skeleton.aliases[name]:
                kept[alias] = dims
    removed = {}
    for group in graph.groups:
        gone = (~keep[graph.starts[group.number] : graph.starts[group.number + 1]]).nonzero()[0]
        if len(gone):
            removed[group.name] = torch.from_numpy(gone)
    costs = cost_model(graph)
    before, after = costs.profile(), costs.profile(keep)
    renumbered = tuple(sorted(slimmer.renumber))
    made = PruningRecord(kept, removed, policy, "none", before, after, renumbered, (*notes, *slimmer.settings), keep_class=keep_class)
    earlier = record_of(graph.model)
    return made if earlier is None else _composed(earlier, made)


def _composed(first: PruningRecord, second: PruningRecord) -> PruningRecord:
    """Two prunings as one: what the second kept, counted in the indices of the original that the first kept."""
    kept = {name: dict(dims) for name, dims in first.kept.items()}
    for name, dims in second.kept.items():
        mine = kept.setdefault(name, {})
        for dim, left_now in dims.items():
            mine[dim] = mine[dim][left_now] if dim in mine else left_now
    removed = dict(first.removed_units)
    for name, units in second.removed_units.items():
        if name not in removed:
            removed[name] = units
            continue
        size = len(removed[name]) + int(units.max()) + 1 + len(removed[name])
        left = torch.tensor(sorted(set(range(size)) - set(removed[name].tolist())))
        removed[name] = torch.cat([removed[name], left[units]]).sort().values
    notes = tuple(dict.fromkeys(first.notes + second.notes))
    renumbered = tuple(sorted({*first.renumbered, *second.renumbered}))
    steps = (*(first.steps or (first,)), second)
    blocks = {**first.blocks, **second.blocks}
    whole = replace(second, kept=kept, removed_units=removed, before=first.before, renumbered=renumbered, notes=notes, steps=steps)
    return replace(whole, blocks=blocks)
