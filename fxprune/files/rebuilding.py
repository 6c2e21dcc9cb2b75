"""A slim module again, from a fresh original and the record of what was kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from torch import Tensor, fx, nn

from fxprune.errors import FileError
from fxprune.example_inputs import build
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.pipeline import analysed, as_recorded
from fxprune.passes.planning.plan import Keep
from fxprune.passes.rewriting.absent import class_without_blocks
from fxprune.passes.rewriting.blocks import without_blocks
from fxprune.passes.rewriting.fold import FoldBatchNorm
from fxprune.passes.rewriting.keep_class import kept_class
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.records import PruningRecord


def rebuilt(model: nn.Module, record: PruningRecord, volatile: set[str] | None = None) -> nn.Module:
    """The slim module of ``record`` made of ``model``'s weights, which may lie on the meta device; ``model`` is not changed.

    It goes by the kept indices rather than by a policy, so it needs no scores; a module that was pruned twice is made in two steps.
    Raises ``FileError`` naming the parameter whose kept indices this model cannot have. ``volatile`` gets the names of what forward keeps
    for itself, and makes anew where it does not fit.
    """
    for step in record.steps:  # which axis of an attention goes may change once heads are narrower, so each step is made in turn
        model = rebuilt(model, step, volatile)
    if record.steps:
        return FoldBatchNorm().run(model) if record.folded and isinstance(model, fx.GraphModule) else model
    example = build(record.policy.inputs, device="meta")
    options = record.policy.options
    graph = analysed(model, example, (), str(options.get("attention", "auto")), **as_recorded(options))
    if volatile is not None:
        volatile |= graph.traced.skeleton.volatile()
    names = {alias: name for name, aliases in graph.traced.skeleton.aliases.items() for alias in aliases}
    if record.blocks:
        return _without(graph, record)
    keep = units_kept(graph, record.kept, names)
    for group in graph.groups:  # of tensors without a name (layers in a plain list) no index is recorded, but which units went
        gone = record.removed_units.get(group.name)
        if gone is not None and all(name in graph.traced.constants for name, _, _ in group.members):
            if int(gone.max()) >= group.size:
                raise FileError(f"it does not fit this model: {group.name!r} has {group.size} channels here")
            keep[int(graph.starts[group.number]) + gone.numpy()] = False
    slimmer = Slimmer(graph, keep)
    for name in names.values():
        made, wanted = slimmer.kept_dims(name), record.kept.get(name, {})
        differing = [dim for dim in {*made, *wanted} if dim not in made or dim not in wanted or made[dim].tolist() != wanted[dim].tolist()]
        if differing:
            raise FileError(f"it does not fit this model: dimension {min(differing)} of {name!r} is coupled to other channels here")
    slim: nn.Module = kept_class(slimmer) if record.keep_class else slimmer.run()
    return FoldBatchNorm().run(slim) if record.folded and isinstance(slim, fx.GraphModule) else slim


def _without(graph: CouplingGraph, record: PruningRecord) -> nn.Module:
    """The network of a graph without the blocks that a record names. Raises ``FileError`` where it has no such block."""
    blocks = {block.name: block for block in graph.all_blocks}
    missing = next((name for name in record.blocks if name not in blocks), None)
    if missing is not None:
        raise FileError(f"it does not fit this model: there is no block {missing!r} here, which was left out there")
    return (class_without_blocks if record.keep_class else without_blocks)(graph, [blocks[name] for name in record.blocks])


def units_kept(graph: CouplingGraph, kept: Mapping[str, Mapping[int, Tensor]], names: Mapping[str, str]) -> Keep:
    """One boolean per unit, from what a record says was kept; ``names``: every name of a tensor -> its first. Raises ``FileError``."""
    keep = np.ones(int(graph.starts[-1]) if len(graph.starts) else 0, dtype=bool)
    for name, dims in kept.items():
        for dim, indices in dims.items():
            if not len(indices):  # a tensor of an expert that went: the router says which
                continue
            units = graph.unit_of.get((names.get(name, name), dim))
            if units is None or (len(indices) and int(indices.max()) >= len(units)):
                size = "no channels" if units is None else f"{len(units)} channels"
                raise FileError(f"it does not fit this model: dimension {dim} of {name!r} has {size} here and kept {len(indices)} there")
            gone = np.ones(len(units), dtype=bool)
            gone[indices.numpy()] = False
            keep[units[gone]] = False
    return keep


def check_original(record: PruningRecord, model: nn.Module, whose: str) -> None:
    """The layers of the original that was pruned must be those of ``model``, parameter for parameter. ``whose``: words for an error."""
    own: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        own[name.rpartition(".")[0]] += parameter.numel()
    wanted = {name: costs["params"] for name, costs in record.before.per_layer.items() if costs["params"]}
    for layer, count in wanted.items():
        if own[layer] != count:
            has = f"{own[layer]} parameters in {layer!r}" if own[layer] else f"no layer {layer!r} with parameters"
            raise FileError(f"it was made of another model: this one has {has}, {whose} original {count}")
    for layer, count in own.items():
        if count and layer not in wanted:
            raise FileError(f"it was made of another model: this one has {count} parameters in {layer!r}, {whose} original none")
