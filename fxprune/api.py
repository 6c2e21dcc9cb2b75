"""The façade: ``analyze``, ``compress`` and ``record`` over the passes."""

from __future__ import annotations

import fnmatch
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxprune import example_inputs as forms
from fxprune.allocation.targets import allocated, is_target
from fxprune.attached import Sources, attach, record_of, sources_of
from fxprune.errors import FxPruneError, InputError, PruningWarning, UnsupportedError
from fxprune.evaluation.running import device_of
from fxprune.evaluation.wrappers import unwrapped
from fxprune.importance.criteria import Importance, importance_name, scores
from fxprune.importance.criteria import resolved as resolved_importance
from fxprune.importance.gradients import Loss
from fxprune.index_lists import indices
from fxprune.passes.base import GraphPass, Observer, UserPass, run_passes
from fxprune.passes.coupling.blocks import Block
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.pipeline import NORMS, Plan, Slim, analysed, compilation, listed, module_names, traced_graph
from fxprune.passes.planning.cost import cost_model
from fxprune.passes.planning.naming import carried_over, left_out, limits, resolved
from fxprune.passes.planning.shortfall import shortfall
from fxprune.passes.rewriting.blocks import without_blocks
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.verify import verify as zeroing_oracle
from fxprune.passes.verify import verify_blocks
from fxprune.policies import Policy, checked_sparsity, units_removed
from fxprune.records import PruningRecord
from fxprune.repair.registry import named as named_repair
from fxprune.repair.repairer import Repairer

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Given = Policy | float | Mapping[str, float] | str | os.PathLike[str]
Ignore = str | nn.Module | type[nn.Module] | Iterable[Any]


def analyze(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    ignore: Ignore = (),
    attention: str = "auto",
    norms: str = "plain",
    blocks: bool = False,
) -> CouplingGraph:
    """Find which channels of ``model`` must be removed together. The model is not touched.

    Args:
        model: a module, bare or in the wrappers of ``torch.compile``, DDP or FSDP; of a ``torch.export.ExportedProgram`` its ``module()``.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; only shapes and dtypes are used.
        ignore: what keeps its output channels: a module, a qualified name, a glob over qualified names, a class of modules, or several.
        attention: prune "heads", "head_dim", or "auto" (the axis with more units).
        norms: what ``compress`` of the graph does at statistics over channels; see there.
        blocks: find what can be left out as a whole, too: ``CouplingGraph.blocks``.

    Returns:
        The coupling graph, which ``compress`` takes in place of the model.

    Raises:
        TraceError: the model cannot be traced; names the line in the user's source.
        InputError: the inputs are missing or do not fit, or ``ignore`` names nothing.
    """
    model = _module(model)
    example = _example(model, example_inputs, None)
    return analysed(model, example, listed(ignore), attention, norms=norms, blocks=blocks)


def compress(
    model: nn.Module | CouplingGraph | ExportedProgram,
    policy: Given,
    example_inputs: Any = None,
    *,
    ignore: Ignore = (),
    importance: Importance = "auto",
    calibration: Iterable[Any] | None = None,
    round_to: int | None = None,
    attention: str = "auto",
    repair: str | Callable[[nn.Module, Sequence[Any]], Any] = "none",
    verify: bool = False,
    keep_class: bool = False,
    most: float | Mapping[str, float] | None = None,
    loss: Loss | None = None,
    passes: Sequence[Any] = (),
    observe: Observer | None = None,
    norms: str | None = None,
) -> fx.GraphModule:
    """Remove channels of ``model`` as ``policy`` says and return the slim network as a ``torch.fx.GraphModule``.

    The slim module shares no storage with ``model``, keeps its parameter names, modes and ``requires_grad`` flags; ``record`` tells what
    was done.

    Args:
        model: as for ``analyze``; or a ``CouplingGraph``: then nothing is traced again and the weights its model holds now are sliced.
        policy: a ``Policy``; one sparsity for every group (0 keeps all); a mapping to sparsities from names of groups, names of modules
            (every group that the module's layers produce) and globs over both; a target, "macs=0.5" (or params, memory: what is left of
            the original; sparsity: the share of output channels that goes), met without a search: by error tables where there is
            ``calibration``, else by the same share of every group; or a policy file's path. An entry with the name of a block
            (``analyze(..., blocks=True)``) and sparsity 1 leaves the block out.
        example_inputs: as for ``analyze``; may be left out where the policy records them.
        ignore: as for ``analyze``.
        importance: what ranks the units of a group: "taylor", "l2", "l1", "variance", "random", "reconstruction", "auto" (taylor where
            there is ``calibration``, else l2), or a callable ``(group, module) -> scores``, one number a unit; the lowest go first.
        calibration: batches, ``(inputs, targets)`` or inputs alone, for the importance and the repair.
        round_to: channels kept in every pruned dimension are rounded up to a multiple of it; None: what the policy says, else 1.
        attention: as for ``analyze``.
        repair: what then repairs the slim module on ``calibration`` without training (see ``fxprune.repair``): "bn" estimates BatchNorm
            statistics again, "bias" puts what a layer's output lacks in the mean into its bias, "lstsq" fits the remaining weights again to
            the original's responses; "none" leaves all as sliced.
        verify: run the zeroing oracle.
        keep_class: return an instance of the model's own class with slim submodules, whose other methods work too, in place of a graph
            module. Attributes that hold sizes are set and named in ``record(slim).notes``; halves of a ``chunk`` stay even.
        most: the largest share of its units that any group loses; or a mapping with keys as in ``policy``, where the lowest counts.
        loss: ``f(output, batch) -> scalar``, what importances that need gradients differentiate; None: cross-entropy, where output and
            batch leave no doubt (``fxprune.importance.gradients``).
        passes: passes of your own that run on the slim graph module afterwards: ``torch.fx.passes`` passes, or functions from graph module
            to graph module. Each gets a copy, which it may edit.
        observe: called as ``observe(step, result, seconds)`` after each step: "Trace", "Couple", "Plan", "Slim" and your own passes.
        norms: "plain": layer, RMS and group norms, softmax and means over channels work on the channels that are left; "exact": they keep
            the divisor of the original, what is gone counting as zeros, so that the slim network equals the zeroed original there as
            well (``group.undefined`` says where it cannot). None: what the policy says, else "plain".

    Returns:
        The slim module.

    Raises:
        PolicyError: a key of the policy names nothing, or a sparsity is out of range.
        TargetError: the target that the policy names cannot be met; ``nearest`` is the policy that comes closest.
        UnsupportedError: ``keep_class`` where a number in the code changes with the channels; names the node and line.
        VerificationError: the zeroing oracle fails.

    Warns:
        PruningWarning: nothing was removed, or less than half of what was asked because the rest is locked.
    """
    target = policy if isinstance(policy, str) and is_target(policy) else None
    chosen = Policy({}) if target is not None else _policy(policy)
    options = dict(chosen.options)
    graph_given = isinstance(model, CouplingGraph)
    ignored, chosen_attention = listed(ignore), attention
    if not graph_given:
        ignored = ignored or listed(options.get("ignore") or ())
        chosen_attention = attention if attention != "auto" else str(options.get("attention") or "auto")
    multiple = round_to if round_to is not None else int(options.get("round_to") or 1)
    ranked_by = resolved_importance(importance)
    if importance == "auto":
        importance = ranked_by = str(options.get("importance") or "auto")
    if multiple < 1:
        raise InputError(f"round_to is {multiple}; it must be 1 or more")
    wanted_norms = norms if norms is not None else options.get("norms")
    repair_name, _ = named_repair(repair)
    batches = None if calibration is None else list(calibration)
    if isinstance(model, CouplingGraph):
        _fits_graph(model, ignored, attention)
        graph, example = model, example_inputs
    else:
        model = _module(model)
        example = _example(model, example_inputs, chosen.inputs)
        graph = analysed(model, example, ignored, chosen_attention, observe, str(wanted_norms or "plain"), bool(options.get("blocks")))
    if target is not None:
        tabled = repair if isinstance(repair, str) else "none"  # what a repair of the user's own does no table can say
        chosen = allocated(graph, target, batches, importance=importance, loss=loss, repair=tabled, round_to=multiple, most=most)
        options = dict(chosen.options)
    gone, shares = left_out(graph, chosen.sparsity)
    wanted = resolved(graph, checked_sparsity(policy, "a uniform policy") if isinstance(policy, (int, float)) else shares)
    if gone:
        if keep_class:
            raise UnsupportedError("keep_class cannot leave out blocks: the model's own code calls them; leave out keep_class")
        given = example if _has_values(example) else forms.build(graph.inputs, device=device_of(graph.model))
        cut = _cut(graph, gone, given if verify else None, observe)
        thinner = compress(
            cut,
            carried_over(graph, cut, wanted.sparsity),
            given,
            importance=importance,
            calibration=batches,
            round_to=multiple,
            repair=repair,
            verify=verify,
            most=most,
            loss=loss,
            passes=passes,
            observe=observe,
            norms=None if wanted_norms is None else str(wanted_norms),
        )
        return _named(thinner, {**wanted.sparsity, **{block.name: 1.0 for block in gone}})
    units = options.get("units") if importance_name(importance) == options.get("importance", "auto") else None

    def score(graph: CouplingGraph) -> Mapping[str, Any]:
        return _recorded(graph, wanted.sparsity, units) or scores(graph, ranked_by, batches, loss=loss)

    chosen_norms = str(wanted_norms or graph.options.get("norms", "plain"))
    if chosen_norms not in NORMS:
        raise InputError(f"norms is {chosen_norms!r}; it must be {' or '.join(map(repr, NORMS))}")
    carrier = traced_graph(graph.traced, graph)
    run_passes(carrier, [Plan(wanted.sparsity, score, multiple, most, keep_class), Slim(keep_class, chosen_norms)], observe)
    done = compilation(carrier)
    keep, (slimmer, made_slim) = done.planned(), done.rewritten()
    slim: Any = made_slim
    used = {**({"norms": chosen_norms} if chosen_norms != "plain" else {}), "round_to": multiple, "importance": importance_name(importance)}
    notes: tuple[str, ...] = graph.notes
    lacking = shortfall(graph, wanted, keep, multiple, limits(graph, most))
    if lacking:
        warnings.warn(lacking, PruningWarning, stacklevel=2)
        notes = (*notes, lacking)
    applied = Policy(wanted.sparsity, graph.inputs, {**graph.options, **used}, chosen.meta)
    made = made_record(graph, slimmer, keep, applied, keep_class, notes)
    attach(slim, made, Sources(graph.model))
    if verify:
        given = example if _has_values(example) else forms.build(graph.inputs, device=device_of(graph.model))
        zeroing_oracle(graph, keep, slim, *forms.call_form(given), chosen_norms)
    if repair_name != "none":
        repairer = Repairer(graph, batches or (), repair)
        notes = repairer(slim, slimmer)
        attach(slim, made.with_repair(repair_name, notes, repairer.layers))
    return _passed(slim, passes, observe)


def _named(slim: Any, sparsity: Mapping[str, float]) -> fx.GraphModule:
    """``slim``, whose record's policy names the groups and blocks of the network that the user gave."""
    done = record(slim)
    used = replace(done.policy, sparsity=sparsity, options={**done.policy.options, "blocks": True})
    attach(slim, replace(done, policy=used))
    return slim  # type: ignore[no-any-return]


def _cut(graph: CouplingGraph, blocks: Sequence[Block], example: Any, observe: Observer | None) -> CouplingGraph:
    """The network without ``blocks``, all channels kept, analysed as ``graph`` was. ``example``: for the oracle, None for no oracle."""
    whole = without_blocks(graph, blocks)
    whole.train(graph.model.training)
    if example is not None:
        verify_blocks(graph, blocks, whole, *forms.call_form(example))
    options = graph.options
    paths = [*dict(whole.named_modules()), *dict(whole.named_parameters())]
    ignored = [name for name in options.get("ignore", ()) if any(fnmatch.fnmatchcase(path, name) for path in paths)]
    inputs = forms.build(graph.inputs, device="meta")
    cut = analysed(whole, inputs, ignored, str(options["attention"]), observe, str(options.get("norms", "plain")))
    before, after = cost_model(graph).profile(), cost_model(cut).profile()
    done = {block.name: "removed" for block in blocks}
    policy = Policy(dict.fromkeys(done, 1.0), graph.inputs, {**options, "blocks": True})
    attach(whole, PruningRecord({}, {}, policy, "none", before, after, notes=graph.notes, blocks=done), Sources(graph.model))
    return cut


def _passed(slim: Any, passes: Sequence[Any], observe: Observer | None) -> fx.GraphModule:
    """``slim`` after the user's passes; the record, which goes along, names them."""
    if passes and not isinstance(slim, fx.GraphModule):
        name = type(slim).__name__
        raise InputError(f"passes= needs the graph of the whole network; this {name} has none (keep_class, or traced in parts)")
    steps = [step if isinstance(step, GraphPass) else UserPass(step) for step in passes]
    made: Any = run_passes(slim, steps, observe) if steps else slim
    if made is not slim:
        ran = ", ".join(step.name for step in steps)
        made_by = record(slim)
        note = f"after the rewrite {ran} ran, which load() does not run again"
        attach(made, replace(made_by, notes=(*made_by.notes, note)), sources_of(slim))
    return made  # type: ignore[no-any-return]


def _fits_graph(graph: CouplingGraph, ignored: tuple[Any, ...], attention: str) -> None:
    """What a graph was analysed with cannot be changed by ``compress``; a different wish is not passed over in silence."""
    analysed_with = graph.options.get("attention")
    if attention not in ("auto", analysed_with):
        raise InputError(f"the graph was analysed with attention={analysed_with!r}; pass attention={attention!r} to analyze")
    if ignored and module_names(graph.model, ignored) != list(graph.options.get("ignore", ())):
        raise InputError("the graph was analysed with another ignore=; pass ignore to analyze, which decides what is locked")


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
        return unwrapped(model)
    if type(model).__name__ != "ExportedProgram":  # by name: torch imports torch.export when it is asked for
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module or a torch.export.ExportedProgram")
    found: nn.Module = model.module()
    return found


def _example(model: nn.Module, given: Any, recorded: Any) -> Any:
    if given is not None:
        return given
    if recorded is not None:
        return forms.build(recorded, device="meta")
    earlier = record_of(model)
    if earlier is not None and earlier.policy.inputs is not None:
        return forms.build(earlier.policy.inputs, device="meta")
    if isinstance(model, fx.GraphModule) and (found := forms.of_graph(model)) is not None:
        return found
    raise InputError("example_inputs are missing; pass a tensor, a tuple or a dict, or a policy that records them")


def record(slim: nn.Module) -> PruningRecord:
    """What was done to a slim module.

    Args:
        slim: what ``compress``, ``search`` or ``load`` returned, bare or in the wrappers of ``torch.compile``, DDP or FSDP.

    Returns:
        The record, in terms of the outermost original.

    Raises:
        FxPruneError: fxprune did not make this module.
    """
    found = record_of(unwrapped(slim))
    if found is None:
        raise FxPruneError(f"this {type(slim).__name__} carries no pruning record; pass what compress, search or load returned")
    return found


def made_record(
    graph: CouplingGraph, slimmer: Slimmer, keep: Any, policy: Policy, keep_class: bool = False, notes: tuple[str, ...] = ()
) -> PruningRecord:
    """The record of one rewrite, in terms of the outermost original (Habit: facts are computed once and are plain data)."""
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
