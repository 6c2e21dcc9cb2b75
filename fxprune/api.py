"""The façade: ``analyze``, ``compress`` and ``record`` over the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from fxprune.attached import record_of
from fxprune.compression import (
    Choices,
    Given,
    by_names,
    carried,
    coupled,
    example_of,
    met,
    module_of,
    renamed,
    slimmed,
    understood,
    without,
)
from fxprune.errors import FxPruneError
from fxprune.evaluation.callers_modes import in_plain_modes
from fxprune.evaluation.wrappers import unwrapped
from fxprune.importance.criteria import Importance
from fxprune.importance.gradients import Loss
from fxprune.passes.base import Observer
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.outputs import as_listed
from fxprune.passes.pipeline import analysed, listed
from fxprune.passes.planning.naming import left_out, resolved
from fxprune.passes.rewriting.original_layers import OriginalLayers
from fxprune.policies import checked_sparsity
from fxprune.records import PruningRecord

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Ignore = str | nn.Module | type[nn.Module] | Iterable[Any]


@in_plain_modes
def analyze(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    ignore: Ignore = (),
    attention: str = "auto",
    norms: str = "plain",
    blocks: bool = False,
    check: bool = True,
    outputs: str | int | Iterable[str | int] | None = None,
    experts: bool = False,
) -> CouplingGraph:
    """Find which channels of ``model`` must be removed together. The model is not touched.

    Args:
        model: a module, bare or in the wrappers of ``torch.compile``, DDP or FSDP; of a ``torch.export.ExportedProgram`` its ``module()``.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs; beside ``check`` only shapes and
            dtypes are used.
        ignore: what keeps its output channels: a module, a qualified name, a glob over qualified names, a class of modules, or several.
        attention: prune "heads", "head_dim", or "auto" (the axis with more units).
        norms: what ``compress`` of the graph does at statistics over channels; see there.
        blocks: find what can be left out as a whole, too: ``CouplingGraph.blocks``.
        check: run the traced graph, nothing pruned, and the model once on the example and compare the two, in both modes where they differ;
            everything is afterwards as it was. Code so plain that a trace cannot get it wrong is not run. What differs is traced in parts
            or refused, with its line. False saves up to two forward passes a mode.
        outputs: which of what the model returns keep their widths: names (keys of a dict, fields) and places; None: all. The others come
            out narrower where their channels go, which a note says: hidden states beside the logits would otherwise lock the widths.
        experts: let whole experts of a mixture go, too: groups whose units are experts (``group.experts``).

    Returns:
        The coupling graph, which ``compress`` takes in place of the model.

    Raises:
        TraceError: the model cannot be traced; names the line in the user's source.
        InputError: the inputs are missing or do not fit, or ``ignore`` names nothing.
    """
    model = module_of(model)
    example = example_of(model, example_inputs, None)
    kept = as_listed(outputs)
    return analysed(model, example, listed(ignore), attention, norms=norms, blocks=blocks, check=check, outputs=kept, experts=experts)


@in_plain_modes
def compress(
    model: nn.Module | CouplingGraph | ExportedProgram,
    policy: Given,
    example_inputs: Any = None,
    *,
    ignore: Ignore = (),
    importance: Importance = "auto",
    calibration: Iterable[Any] | str | None = None,
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
    check: bool = True,
    outputs: str | int | Iterable[str | int] | None = None,
    original: nn.Module | None = None,
    experts: bool | None = None,
) -> fx.GraphModule:
    """Remove channels of ``model`` as ``policy`` says and return the slim network as a ``torch.fx.GraphModule``.

    The slim module shares no storage with ``model``, keeps its parameter names, modes and ``requires_grad`` flags; ``record`` tells what
    was done.

    Args:
        model: as for ``analyze``; or a ``CouplingGraph``: then nothing is traced again and the weights its model holds now are sliced.
        policy: how much goes, in one of these forms. A number: the sparsity of every group (0 keeps all). A mapping to sparsities from
            names of groups, modules or their names (every group that the module's layers produce), classes of modules, and globs over
            names. A ``Policy``, or the path of a policy file. A target, "macs=0.5" (or params, memory: what is left of the original;
            sparsity: the share of output channels that goes), met without a search: by error tables and trials
            (``fxprune.allocation.trying``) where there is ``calibration``, else by the same share of every group.
            An entry with the name of a block (``analyze(..., blocks=True)``) and sparsity 1 leaves the block out.
        example_inputs: as for ``analyze``; may be left out where the policy records them.
        ignore: as for ``analyze``.
        importance: what ranks the units of a group: "taylor", "l2", "l1", "variance", "random", "reconstruction", "auto" (taylor where
            there is ``calibration``, else l2), or a callable ``(group, module) -> scores``, one number a unit; the lowest go first.
            Or the name of a registered ``Criterion`` (``fxprune.importance``).
        calibration: batches, ``(inputs, targets)`` or inputs alone, for the importance and the repair. "none": there are no data, so inputs
            are made from what the BatchNorm layers remember (``fxprune.synthetic_batches``), and "auto" ranks without labels.
        round_to: channels kept in every pruned dimension are rounded up to a multiple of it; None: what the policy says, else 1, but for a
            target 8 where the network is convolutional and wide (80 channels a group or more in the mean), since most runtimes are slow
            at other widths.
        attention: as for ``analyze``.
        repair: what then repairs the slim module on ``calibration`` without training (see ``fxprune.repair``): "bn" estimates BatchNorm
            statistics again, "bias" puts what a layer's output lacks in the mean into its bias, "lstsq" fits the remaining weights again to
            the original's responses, "joint" then moves all of them together towards the original's outputs, which takes about three
            times as long; "none" leaves all as sliced.
        verify: run the zeroing oracle.
        keep_class: return an instance of the model's own class with slim submodules, whose other methods work too, in place of a graph
            module. Attributes that hold sizes are set and named in ``record(slim).notes``; halves of a ``chunk`` stay even.
        most: the largest share of its units that any group loses; or a mapping with keys as in ``policy``, where the lowest counts.
        loss: ``f(output, batch) -> scalar``, what importances that need gradients differentiate; None: cross-entropy, where output and
            batch leave no doubt (``fxprune.importance.gradients``).
        passes: passes of your own that run on the slim graph module afterwards: ``torch.fx.passes`` passes, or functions from graph module
            to graph module. Each gets a copy, which it may edit.
        observe: called as ``observe(step, result, seconds)`` after each step: "Trace", "Couple", "Plan", "Slim" and your own passes; for a
            target also "Try", after each allocation that is tried.
        norms: "plain": layer, RMS and group norms, softmax and means over channels work on the channels that are left; "exact": they keep
            the divisor of the original, removed channels counting as zeros, so that the slim network equals the zeroed original there as
            well (``group.undefined`` says where it cannot). None: what the policy says, else "plain".
        check: as for ``analyze``.
        outputs: as for ``analyze``. None: what the policy says, else all.
        original: the module that ``model`` was exported from: the slim graph module then calls its layers (``nn.Linear``, convolutions,
            embeddings, layer and group norms) under their names, with slim weights, where the export left calls of functions.
        experts: as for ``analyze``. None: what the policy says, else False.

    Returns:
        The slim module.

    Raises:
        PolicyError: a key of the policy names nothing, a sparsity is out of range, or the policy file is damaged.
        InputError: example inputs or calibration batches are missing or do not fit, or another argument is none that it may be.
        TraceError: the model cannot be traced; names the line in the user's source.
        EvaluationError: the network gave no finite number on the calibration batches, or cannot be differentiated there.
        TargetError: the target that the policy names cannot be met; ``nearest`` is the policy that comes closest.
        UnsupportedError: ``keep_class`` where a number in the code changes with the channels; names the node and line.
        VerificationError: the zeroing oracle fails.

    Warns:
        PruningWarning: nothing was removed, or less than half of what was asked because the rest is locked.
    """
    policy, most = by_names(policy, model, "policy"), by_names(most, model, "most")
    chosen, target = understood(policy)
    choices = Choices.of(
        chosen.options,
        importance,
        calibration,
        round_to,
        repair,
        norms,
        verify=verify,
        keep_class=keep_class,
        most=most,
        loss=loss,
        passes=passes if original is None else (OriginalLayers(unwrapped(original)), *passes),
        observe=observe,
        check=check,
    )
    graph, example = coupled(model, example_inputs, chosen, ignore, attention, outputs, experts, choices)
    choices = choices.with_inputs(graph, example, target)
    if target is not None:
        chosen = met(graph, target, choices)
        choices = replace(choices, multiple=int(chosen.options["round_to"]))
    gone, shares = left_out(graph, chosen.sparsity)
    wanted = resolved(graph, checked_sparsity(policy, "a uniform policy") if isinstance(policy, (int, float)) else shares)
    if not gone:
        return slimmed(graph, chosen, wanted, example, choices)
    cut, given = without(graph, gone, example, choices)
    chosen, thinner = carried(graph, cut, chosen, wanted)
    return renamed(slimmed(cut, chosen, thinner, given, choices, graph), wanted.sparsity, gone)


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
