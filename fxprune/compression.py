"""How a policy becomes a slim network: the steps between ``fxprune.compress`` and the passes."""

from __future__ import annotations

import fnmatch
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune import example_inputs as forms
from fxprune.allocation.target_policies import allocated, is_target
from fxprune.attached import Sources, attach, record_of, sources_of
from fxprune.errors import (
    FAULTS,
    FileError,
    FxPruneError,
    InputError,
    PolicyError,
    PruningWarning,
    UnsupportedError,
    in_a_line,
    kind_of,
    shown,
)
from fxprune.evaluation.batches import checked
from fxprune.evaluation.running import device_of
from fxprune.evaluation.synthetic import as_the_example, calibration_batches, listed_batches, without_labels
from fxprune.evaluation.wrappers import sliceable, unwrapped
from fxprune.importance.criteria import Importance, importance_name, scores
from fxprune.importance.criteria import resolved as resolved_importance
from fxprune.importance.gradients import Loss
from fxprune.imports import suggestion
from fxprune.index_lists import indices, ranges
from fxprune.passes.base import GraphPass, Observer, UserPass, run_passes
from fxprune.passes.compat import tree_leaves
from fxprune.passes.coupling.blocks import Block
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.outputs import as_listed
from fxprune.passes.pipeline import NORMS, Plan, Slim, analysed, as_recorded, compilation, listed, module_names, traced_graph
from fxprune.passes.planning.cost_model import cost_model
from fxprune.passes.planning.naming import Wanted, carried_over, limits, resolved, twin_units
from fxprune.passes.planning.shortfall import shortfall
from fxprune.passes.rewriting.absent import class_without_blocks
from fxprune.passes.rewriting.blocks import without_blocks
from fxprune.passes.verify import verify as zeroing_oracle
from fxprune.passes.verify import verify_blocks
from fxprune.policies import Policy, check_options, checked_sparsity, units_removed
from fxprune.recording import made_record
from fxprune.records import PruningRecord
from fxprune.repair.registry import Repair
from fxprune.repair.registry import named as named_repair
from fxprune.repair.repairer import Repairer

Given = Policy | float | Mapping[str, float] | str | os.PathLike[str]


@dataclass(frozen=True)
class Choices:
    """What ``compress`` was asked for beside the policy; what the caller left open a policy's recorded options fill in.

    The fields are the arguments of ``fxprune.compress``; ``calibration`` is a list here, or "none" until
    ``with_inputs`` makes them. ``ranked_by``: ``importance`` as a criterion.
    ``norms`` and ``multiple``, that of ``round_to``, are None where neither the caller nor the policy says.
    """

    importance: Importance
    ranked_by: Any
    calibration: list[Any] | str | None
    multiple: int | None
    repair: Repair
    verify: bool
    keep_class: bool
    most: float | Mapping[str, float] | None
    loss: Loss | None
    passes: Sequence[Any]
    observe: Observer | None
    norms: str | None
    check: bool = True

    @classmethod
    def of(
        cls,
        options: Mapping[str, Any],
        importance: Importance,
        calibration: Iterable[Any] | str | None,
        round_to: int | None,
        repair: Repair,
        norms: str | None,
        **as_given: Any,
    ) -> Choices:
        """The arguments of ``compress`` with the ``options`` that a policy recorded. Raises ``InputError`` where one is out of range."""
        multiple: Any = options.get("round_to") if round_to is None else round_to
        if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, Integral)):
            raise InputError(f"round_to is {shown(multiple)}; it must be a whole number, 1 or more")
        if multiple is not None and multiple < 1:
            raise InputError(f"round_to is {multiple}; it must be 1 or more")
        ranked_by = resolved_importance(importance)
        if importance == "auto":
            importance = ranked_by = str(options.get("importance") or "auto")
        wanted = norms if norms is not None else options.get("norms")
        if wanted is not None and wanted not in NORMS:
            raise InputError(f"norms is {shown(wanted)}; it must be {' or '.join(map(repr, NORMS))}")
        named_repair(repair)
        if as_given["loss"] is not None and not callable(as_given["loss"]):
            raise InputError(f"loss is {kind_of(as_given['loss'])}; pass a function f(output, batch) -> scalar tensor")
        batches = calibration if isinstance(calibration, str) else listed_batches(calibration)
        return cls(importance, ranked_by, batches, None if multiple is None else int(multiple), repair, norms=wanted, **as_given)

    @property
    def round_to(self) -> int:
        """What numbers of channels are multiples of; a target may have chosen another, which its policy says."""
        return self.multiple or 1

    @property
    def batches(self) -> list[Any] | None:
        """The calibration inputs, made where they had to be."""
        assert not isinstance(self.calibration, str)
        return self.calibration

    def with_inputs(self, graph: CouplingGraph, example: Any, target: str | None) -> Choices:
        """With calibration inputs where they are to be made without data. These have no labels, so "auto" ranks by what needs none."""
        if not isinstance(self.calibration, str):
            return replace(self, calibration=checked(as_the_example(self.calibration, example), graph.inputs))
        made = replace(self, calibration=calibration_batches(self.calibration, graph.model, _with_values(graph, example)))
        ranked = without_labels(self.importance, self.calibration, self.repair)
        if ranked == self.importance or target is not None:
            return made
        return replace(made, importance=ranked, ranked_by=resolved_importance(ranked))


def by_names(given: Any, model: Any, argument: str) -> Any:
    """A policy, or ``most``, with names where its keys are modules or classes of modules; a number of any type as a float.

    Raises:
        PolicyError: a key is no module of ``model``, and no name.
    """
    if not isinstance(given, bool) and isinstance(given, Real):
        return float(given)
    if not isinstance(given, Mapping) or all(isinstance(key, str) for key in given):
        return given
    module = model.model if isinstance(model, CouplingGraph) else module_of(model)
    found: dict[str, Any] = {}
    for key, share in given.items():
        paths = [key] if isinstance(key, str) else module_names(module, [key]) if isinstance(key, (nn.Module, type)) else []
        if not paths:
            raise PolicyError(
                f"a key of {argument} is {kind_of(key)}, which is no module of this model; keys are modules, their classes and names"
            )
        found.update((path or "*", share) for path in paths)
    return found


def understood(policy: Given | Any) -> tuple[Policy, str | None]:
    """A policy in any form that ``compress`` takes: as a ``Policy``, and as a target where it is one, which is then empty."""
    if isinstance(policy, str) and is_target(policy):
        return Policy({}), policy
    if isinstance(policy, Policy):
        check_options(policy)
        return policy, None
    if isinstance(policy, (str, os.PathLike)):
        return Policy.load(Path(policy)), None
    if isinstance(policy, Mapping):
        return Policy(policy), None
    if not isinstance(policy, Real):
        raise PolicyError(
            f"policy is {kind_of(policy)}; pass a sparsity (0.5), a mapping from names to sparsities, a Policy, a target ('macs=0.5') "
            "or the path of a policy file, and the example inputs after it"
        )
    checked_sparsity(policy, "a uniform policy")
    return Policy({}), None


def coupled(
    model: Any, example_inputs: Any, policy: Policy, ignore: Any, attention: str, outputs: Any, experts: bool | None, choices: Choices
) -> tuple[CouplingGraph, Any]:
    """The coupling graph that was given, or that of the model that was given; and the example inputs, as far as they are known."""
    if isinstance(model, CouplingGraph):
        _fits_graph(model, listed(ignore), attention, as_listed(outputs), experts)
        return model, example_inputs
    options = policy.options
    ignored = listed(ignore) or listed(options.get("ignore") or ())
    axis = attention if attention != "auto" else str(options.get("attention") or "auto")
    kept = as_listed(outputs if outputs is not None else options.get("outputs"))
    module = module_of(model)
    example = example_of(module, example_inputs, policy.inputs)
    blocks = bool(options.get("blocks"))
    parts, past = (options.get("parts"), as_recorded(options)["past"]) if example_inputs is None else (None, None)
    whole = bool(options.get("experts")) if experts is None else experts
    norms = choices.norms or "plain"
    graph = analysed(module, example, ignored, axis, choices.observe, norms, blocks, choices.check, kept, parts, whole, past)
    return graph, example


def met(graph: CouplingGraph, target: str, choices: Choices) -> Policy:
    """The policy that meets a target without a search."""
    return allocated(
        graph,
        target,
        choices.batches,
        importance=choices.importance,
        loss=choices.loss,
        repair=choices.repair if isinstance(choices.repair, str) else "none",  # what a repair of the user's own does no table can say
        round_to=choices.multiple,
        most=choices.most,
        observe=choices.observe,
    )


def slimmed(
    graph: CouplingGraph, policy: Policy, wanted: Wanted, example: Any, choices: Choices, whole: CouplingGraph | None = None
) -> fx.GraphModule:
    """The slim network with its record: planned, rewritten, verified, repaired, and through the user's passes. ``whole``: the network with
    its blocks, where ``graph`` is without some."""
    options = policy.options
    units = options.get("units") if importance_name(choices.importance) == options.get("importance", "auto") else None

    def score(graph: CouplingGraph) -> Mapping[str, Any]:
        return _recorded(graph, wanted.sparsity, units) or scores(graph, choices.ranked_by, choices.batches, loss=choices.loss)

    norms = choices.norms or str(graph.options.get("norms", "plain"))
    plan = Plan(wanted.sparsity, score, choices.round_to, choices.most, choices.keep_class)
    carrier = traced_graph(graph.traced, graph)
    run_passes(carrier, [plan, Slim(choices.keep_class, norms)], choices.observe)
    done = compilation(carrier)
    keep, (slimmer, made_slim) = done.planned(), done.rewritten()
    slim: Any = made_slim
    notes: tuple[str, ...] = graph.notes
    lacking = shortfall(graph, wanted, keep, choices.round_to, limits(graph, choices.most))
    if lacking:
        warnings.warn(lacking, PruningWarning, stacklevel=4)  # at the call of compress
        notes = (*notes, lacking)
    used: dict[str, Any] = {} if norms == "plain" else {"norms": norms}
    used |= {"round_to": choices.round_to, "importance": importance_name(choices.importance)}
    applied = Policy(wanted.sparsity, graph.inputs, {**graph.options, **used}, policy.meta)
    made = made_record(graph, slimmer, keep, applied, choices.keep_class, notes)
    attach(slim, made, Sources(graph.model))
    if choices.verify:
        zeroing_oracle(graph, keep, slim, *forms.call_form(_with_values(graph, example)), norms)
    if choices.repair != "none":
        name, _ = named_repair(choices.repair)
        repairer = Repairer(whole or graph, choices.batches or (), choices.repair)
        said = repairer(slim, slimmer)
        attach(slim, made.with_repair(name, said, repairer.layers))
    return _passed(slim, choices.passes, choices.observe)


def without(graph: CouplingGraph, gone: Sequence[Block], example: Any, choices: Choices) -> tuple[CouplingGraph, Any]:
    """The network without the blocks ``gone``, analysed; and example inputs for it."""
    given = _with_values(graph, example)
    checked = choices.verify or choices.keep_class  # the user's code, which calls what is left, is always compared
    return cut_from(graph, gone, given if checked else None, choices.observe, choices.keep_class), given


def carried(graph: CouplingGraph, cut: CouplingGraph, policy: Policy, wanted: Wanted) -> tuple[Policy, Wanted]:
    """``policy`` as one for ``cut``, which is ``graph`` with blocks left out: by the units that it lists, if any, else by its shares."""
    listed_units = policy.options.get("units")
    scored = _recorded(graph, wanted.sparsity, listed_units) if listed_units else None
    if scored is None:
        return Policy({}), resolved(cut, carried_over(graph, cut, wanted.sparsity))
    stays = np.ones(int(graph.starts[-1]) + 1, dtype=bool)  # the last: what is no unit of the graph
    for name, kept in scored.items():
        group = graph.by_name[name]
        stays[graph.starts[group.number] : graph.starts[group.number + 1]] = np.asarray(kept) > 0
    stays = stays[twin_units(graph, cut)]
    sparsity, units = {}, {}
    for group in cut.groups:
        gone = np.flatnonzero(~stays[cut.starts[group.number] : cut.starts[group.number + 1]])
        if group.prunable and 0 < len(gone) < group.size:
            sparsity[group.name], units[group.name] = len(gone) / group.size, ranges(torch.from_numpy(gone))
    options = {"units": units, "importance": policy.options.get("importance", "auto")}
    return Policy({}, options=options), resolved(cut, sparsity)


def renamed(slim: Any, wanted: Mapping[str, float], gone: Sequence[Block]) -> fx.GraphModule:
    """``slim``, whose record's policy names the groups and blocks of the network that the user gave."""
    done = _record(slim)
    sparsity = {**wanted, **{block.name: 1.0 for block in gone}}
    used = replace(done.policy, sparsity=sparsity, options={**done.policy.options, "blocks": True})
    attach(slim, replace(done, policy=used))
    return slim  # type: ignore[no-any-return]


def _record(slim: Any) -> PruningRecord:
    found = record_of(slim)
    assert found is not None, "slimmed attaches one"
    return found


def cut_from(
    graph: CouplingGraph, blocks: Sequence[Block], example: Any = None, observe: Observer | None = None, keep_class: bool = False
) -> CouplingGraph:
    """The network without ``blocks``, all channels kept, analysed as ``graph`` was. ``example``: for the oracle, None for no oracle."""
    whole = class_without_blocks(graph, blocks) if keep_class else without_blocks(graph, blocks)
    whole.train(graph.model.training)
    if example is not None:
        try:
            verify_blocks(graph, blocks, whole, *forms.call_form(example))
        except FAULTS as error:
            if not keep_class or isinstance(error, FxPruneError):
                raise
            names = ", ".join(repr(block.name) for block in blocks)
            raise UnsupportedError(
                f"keep_class: the model's own code does not run with nn.Identity for {names}: {in_a_line(error)}; leave out keep_class"
            ) from error
    options = graph.options
    paths = [*dict(whole.named_modules()), *dict(whole.named_parameters())]
    ignored = [name for name in options.get("ignore", ()) if any(fnmatch.fnmatchcase(path, name) for path in paths)]
    inputs = forms.build(graph.inputs, device="meta")
    cut = analysed(whole, inputs, ignored, str(options["attention"]), observe, **as_recorded(options))
    cut.left_out = tuple(blocks)
    before, after = cost_model(graph).profile(), cost_model(cut).profile()
    done = {block.name: "removed" for block in blocks}
    policy = Policy(dict.fromkeys(done, 1.0), graph.inputs, {**options, "blocks": True})
    made = PruningRecord({}, {}, policy, "none", before, after, notes=graph.notes, blocks=done, keep_class=keep_class)
    attach(whole, made, Sources(graph.model))
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
        made_by = _record(slim)
        note = f"after the rewrite {ran} ran, which load() does not run again"
        attach(made, replace(made_by, notes=(*made_by.notes, note)), sources_of(slim))
    return made  # type: ignore[no-any-return]


def _fits_graph(
    graph: CouplingGraph, ignored: tuple[Any, ...], attention: str, outputs: tuple[Any, ...] | None, experts: bool | None
) -> None:
    """What a graph was analysed with cannot be changed by ``compress``; a different wish is not passed over in silence."""
    analysed_with = graph.options.get("attention")
    if attention not in ("auto", analysed_with):
        raise InputError(f"the graph was analysed with attention={analysed_with!r}; pass attention={attention!r} to analyze")
    if experts is not None and experts != bool(graph.options.get("experts")):
        raise InputError(f"the graph was analysed with experts={not experts}; pass experts={experts} to analyze")
    if outputs is not None and list(outputs) != graph.options.get("outputs"):
        raise InputError("the graph was analysed with other outputs=; pass outputs to analyze, which decides what is locked")
    if ignored and module_names(graph.model, ignored) != list(graph.options.get("ignore", ())):
        raise InputError("the graph was analysed with another ignore=; pass ignore to analyze, which decides what is locked")


def _with_values(graph: CouplingGraph, example: Any) -> Any:
    """``example`` where it holds values; else, where it is missing or on meta, random inputs of the recorded form."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor)]
    if example is not None and not any(t.device.type == "meta" for t in tensors):
        return example
    return forms.build(graph.inputs, device=device_of(graph.model))


def _recorded(graph: CouplingGraph, wanted: Any, units: Any) -> Mapping[str, Any] | None:
    """Scores that choose again the units a policy lists; None where it lists none, or a sparsity was edited since. Raises ``PolicyError``
    where they are no units of this network."""
    if units is None or not isinstance(wanted, Mapping):
        return None
    gone = _units_listed(graph, units)
    found = {}
    for name, p in wanted.items():
        group = graph.by_name.get(name)
        count = units_removed(p, group.size) if group is not None else 0
        if group is None or not count:
            continue
        if name not in gone or len(gone[name]) != count:
            return None
        found[name] = torch.ones(group.size)
        found[name][gone[name]] = 0.0
    return found


def _units_listed(graph: CouplingGraph, units: Any) -> dict[str, torch.Tensor]:
    """The option ``units`` of a policy, group name -> indices."""
    if not isinstance(units, Mapping):
        raise PolicyError(
            f"the policy's option units is {shown(units)}; it maps group names to units, as in {{'conv1': '0-3,7'}}, or is left out"
        )
    found: dict[str, torch.Tensor] = {}
    for name, text in units.items():
        group = graph.by_name.get(name)
        if group is None:
            raise PolicyError(
                f"the policy's option units names {shown(name)}, which is no group of this model{suggestion(str(name), graph.by_name)}"
            )
        try:
            found[name] = indices(text)
        except FileError:
            found[name] = torch.tensor([group.size])  # out of range, as the message below says of both
        if len(found[name]) and int(found[name].max()) >= group.size:
            raise PolicyError(
                f"the policy's option units has {shown(text)} for group {name!r}; "
                f"write ascending numbers from 0 to {group.size - 1}, as in '0-3,7', or leave units out"
            )
    return found


def module_of(model: Any) -> nn.Module:
    """``model``, or the module of a ``torch.export.ExportedProgram``, a new one at each call that shares the program's parameters."""
    if isinstance(model, nn.Module):
        module = sliceable(unwrapped(model))
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"the model is {kind_of(module)}, compiled by torch.jit, and cannot be traced; pass the module it was made of"
            )
        return module
    if type(model).__name__ != "ExportedProgram":  # by name: torch imports torch.export when it is asked for
        raise InputError(f"model is {kind_of(model)}; pass a torch.nn.Module or a torch.export.ExportedProgram")
    found: nn.Module = model.module()
    return found


def example_of(model: nn.Module, given: Any, recorded: Any) -> Any:
    """The example inputs: those given, else those that a policy, an earlier pruning or the graph itself recorded."""
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
