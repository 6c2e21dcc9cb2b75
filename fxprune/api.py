"""The façade: ``analyze``, ``compress`` and ``record`` over the passes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxprune import example_inputs as forms
from fxprune.errors import FxPruneError, InputError
from fxprune.evaluation.accuracy import device_of
from fxprune.files.record_json import indices
from fxprune.importance.criteria import Importance, scores
from fxprune.passes.base import run_passes
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.pipeline import Plan, Slim, analysed, traced_graph
from fxprune.passes.planning.cost import cost_model
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.verify import verify as zeroing_oracle
from fxprune.policies import Policy, checked_sparsity, units_removed
from fxprune.records import PruningRecord
from fxprune.repair.repairer import Repairer, checked
from fxprune.training.rebinding import Sources

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Given = Policy | float | Mapping[str, float] | str | os.PathLike[str]


def analyze(
    model: nn.Module | ExportedProgram, example_inputs: Any = None, *, ignore: Iterable[Any] = (), attention: str = "auto"
) -> CouplingGraph:
    """Find which channels of ``model`` must be removed together.

    ``example_inputs``: a tensor, a tuple of positional inputs, or a dict of keyword inputs; only shapes and dtypes are used.
    ``ignore``: modules, qualified names or globs whose output channels stay. ``attention``: prune "heads", "head_dim", or "auto"
    (the axis with more units). The model is not touched; of an exported program its ``module()`` is meant. Raises ``TraceError`` and
    ``InputError`` with the line in the user's source.
    """
    model = _module(model)
    example = _example(model, example_inputs, None)
    graph: CouplingGraph = analysed(model, example, tuple(ignore), attention).meta["coupling"]
    return graph


def compress(
    model: nn.Module | CouplingGraph | ExportedProgram,
    policy: Given,
    example_inputs: Any = None,
    *,
    ignore: Iterable[Any] = (),
    importance: Importance = "auto",
    calibration: Iterable[Any] | None = None,
    round_to: int = 1,
    attention: str = "auto",
    repair: str = "none",
    verify: bool = False,
    keep_class: bool = False,
) -> fx.GraphModule:
    """Remove channels of ``model`` as ``policy`` says and return the slim network as a ``torch.fx.GraphModule``.

    ``policy``: a ``Policy``, one sparsity for every group (0 keeps all), a mapping from group name to sparsity, or a policy file's path.
    ``round_to``: channels kept in every pruned dimension are rounded up to a multiple of it. ``verify``: run the zeroing oracle and raise
    ``VerificationError`` where it fails. ``repair``: what then mends the slim module on ``calibration`` without training (see
    ``fxprune.repair``): "bn" estimates BatchNorm statistics anew, "bias" puts what a layer's output lacks in the mean into its bias,
    "lstsq" fits the remaining weights anew to the original's responses; "none" leaves all as sliced.
    ``model`` may be a ``CouplingGraph``: then nothing is traced again and the weights its model holds now are sliced.

    ``keep_class``: return an instance of the model's own class with slim submodules, whose other methods work too, in place of a graph
    module. ``UnsupportedError`` names the node and line where that cannot be: where a number in the code changes with the channels.

    The slim module shares no storage with ``model``, keeps its parameter names, modes and ``requires_grad`` flags; ``record`` tells what
    was done.
    """
    chosen = _policy(policy)
    options = dict(chosen.options)
    ignore = tuple(ignore) or tuple(options.get("ignore") or ())
    attention = attention if attention != "auto" else str(options.get("attention") or "auto")
    round_to = round_to if round_to != 1 else int(options.get("round_to") or 1)
    importance = importance if importance != "auto" else str(options.get("importance") or "auto")
    if round_to < 1:
        raise InputError(f"round_to is {round_to}; it must be 1 or more")
    checked(repair)
    batches = None if calibration is None else list(calibration)
    if isinstance(model, CouplingGraph):
        carrier = traced_graph(model.walk.traced)
        carrier.meta["coupling"] = model
        example = example_inputs if example_inputs is not None else None
    else:
        model = _module(model)
        example = _example(model, example_inputs, chosen.inputs)
        carrier = analysed(model, example, ignore, attention)
    graph: CouplingGraph = carrier.meta["coupling"]
    wanted: Mapping[str, float] | float = (
        checked_sparsity(policy, "a uniform policy") if isinstance(policy, (int, float)) else chosen.sparsity
    )
    units = options.get("units") if importance == options.get("importance", "auto") else None

    def score(graph: CouplingGraph) -> Mapping[str, Any]:
        return _recorded(graph, wanted, units) or scores(graph, importance, batches)

    run_passes(carrier, [Plan(wanted, score, round_to), Slim(keep_class)])
    slim: fx.GraphModule = carrier.meta["slim"]
    slimmer: Slimmer = carrier.meta["slimmer"]
    keep = carrier.meta["keep"]
    used = {
        "attention": attention,
        "ignore": list(graph.options.get("ignore", ())),
        "round_to": round_to,
        "importance": importance if isinstance(importance, str) else "callable",
    }
    applied = {g.name: float(wanted) for g in graph.groups if g.prunable} if isinstance(wanted, (int, float)) else dict(wanted)
    made = made_record(graph, slimmer, keep, Policy(applied, graph.inputs, {**graph.options, **used}, chosen.meta), keep_class)
    slim.__dict__["_record"], slim.__dict__["_sources"] = made, Sources(graph.model)
    if verify:
        given = example if _has_values(example) else forms.build(graph.inputs, device=device_of(graph.model))
        zeroing_oracle(graph, keep, slim, *forms.call_form(given))
    if repair != "none":
        notes = Repairer(graph, batches or (), repair)(slim, slimmer)
        slim.__dict__["_record"] = made.with_repair(repair, notes)
    return slim


def _has_values(example: Any) -> bool:
    return example is not None and not any(t.device.type == "meta" for t in tree_leaves(example) if isinstance(t, torch.Tensor))


def _recorded(graph: CouplingGraph, wanted: Any, units: Any) -> Mapping[str, Any] | None:
    """Scores that choose again the units a policy lists; None where it lists none, or a sparsity was edited since."""
    if not isinstance(units, Mapping) or not isinstance(wanted, Mapping):
        return None
    found = {}
    for name, p in wanted.items():
        group = graph.by_name.get(name)
        count = units_removed(p, group.size) if group is not None else 0
        if group is None or not count:
            continue
        gone = indices(str(units.get(name, "")))
        if len(gone) != count or (count and int(gone.max()) >= group.size):
            return None
        found[name] = torch.ones(group.size)
        found[name][gone] = 0.0
    return found


def _policy(policy: Given) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, (str, os.PathLike)):
        return Policy.load(Path(policy))
    if isinstance(policy, Mapping):
        return Policy(policy)
    checked_sparsity(policy, "a uniform policy")
    return Policy({})


def _module(model: Any) -> nn.Module:
    """``model``, or the module of a ``torch.export.ExportedProgram``, a new one at each call that shares the program's parameters."""
    if isinstance(model, nn.Module):
        return model
    if type(model).__name__ != "ExportedProgram":  # by name: torch imports torch.export when it is asked for
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module or a torch.export.ExportedProgram")
    found: nn.Module = model.module()
    return found


def _example(model: nn.Module, given: Any, recorded: Any) -> Any:
    if given is not None:
        return given
    if recorded is not None:
        return forms.build(recorded, device="meta")
    earlier = getattr(model, "_record", None)
    if isinstance(earlier, PruningRecord) and earlier.policy.inputs is not None:
        return forms.build(earlier.policy.inputs, device="meta")
    if isinstance(model, fx.GraphModule) and (found := forms.of_graph(model)) is not None:
        return found
    raise InputError("example_inputs are missing; pass a tensor, a tuple or a dict, or a policy that records them")


def record(slim: nn.Module) -> PruningRecord:
    """What was done to a slim module. Raises ``FxPruneError`` for a module that fxprune did not make."""
    found = getattr(slim, "_record", None)
    if not isinstance(found, PruningRecord):
        raise FxPruneError(f"this {type(slim).__name__} carries no pruning record; pass what compress, search or load returned")
    return found


def made_record(graph: CouplingGraph, slimmer: Slimmer, keep: Any, policy: Policy, keep_class: bool = False) -> PruningRecord:
    """The record of one rewrite, in terms of the outermost original (Habit: facts are computed once and are plain data)."""
    skeleton = graph.walk.traced.skeleton
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
    made = PruningRecord(kept, removed, policy, "none", before, after, renumbered, graph.notes, keep_class=keep_class)
    earlier = getattr(graph.model, "_record", None)
    return _composed(earlier, made) if isinstance(earlier, PruningRecord) else made


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
    return replace(second, kept=kept, removed_units=removed, before=first.before, renumbered=renumbered, notes=notes, steps=steps)
