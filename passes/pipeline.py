"""The compiler's steps as passes: trace, couple, plan, slim.

What they hand on is a ``Compilation``, which each step completes; it travels in the ``meta`` of the graph module that stands for it.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.errors import InputError, TraceError, kind_of
from fxprune.example_inputs import build, call_form, describe
from fxprune.passes import rules
from fxprune.passes.base import GraphPass, Observer, run_passes
from fxprune.passes.collector import paused_collector
from fxprune.passes.compat import tree_leaves
from fxprune.passes.coupling import grouping
from fxprune.passes.coupling.graph import SINGLE, CouplingGraph
from fxprune.passes.coupling.walk import Walk
from fxprune.passes.ir.notes import Note, NoteKind
from fxprune.passes.ir.outputs import Outputs, as_listed
from fxprune.passes.ir.slim_module import SlimModule
from fxprune.passes.ir.traced import TracedModel
from fxprune.passes.planning.even import evened
from fxprune.passes.planning.plan import Keep, keep_counts, plan
from fxprune.passes.rewriting.keep_class import kept_class, uneven
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.rules.functional_weights import output_dims
from fxprune.passes.rules.layer_specs import outputs_of
from fxprune.passes.tracing.guard.comparison import difference_of_slim, on_meta
from fxprune.passes.tracing.modes import trace
from fxprune.passes.tracing.partial import add_parts, calls_of, trace_parts
from fxprune.passes.tracing.side_effects.history import GUESSED, KEPT, KNOWN

NORMS = grouping.NORMS
_KEY = "compilation"


class TracedGraph(fx.GraphModule):
    """The traced graph on the way through the passes. It is never run, so no code is generated for it."""

    def recompile(self) -> Any:
        return None


@dataclass(frozen=True)
class Compilation:
    """How far the compilation of a model has come.

    ``traced``: the traced model. ``graph``: which channels go together. ``keep`` (units,): which units stay. ``slimmer``: the rewrite,
    which knows what was kept of each tensor. ``slim``: the slim network, a graph module unless only parts were traced or the class is kept.
    """

    traced: TracedModel
    graph: CouplingGraph | None = None
    keep: Keep | None = None
    slimmer: Slimmer | None = None
    slim: nn.Module | None = None

    def coupled(self) -> CouplingGraph:
        """The coupling graph. Raises ``InputError`` before ``Couple`` has run."""
        if self.graph is None:
            raise InputError("the model has not been analysed yet: run the pass Couple first")
        return self.graph

    def planned(self) -> Keep:
        """Which units stay. Raises ``InputError`` before ``Plan`` has run."""
        if self.keep is None:
            raise InputError("nothing has been planned yet: run the pass Plan first")
        return self.keep

    def rewritten(self) -> tuple[Slimmer, nn.Module]:
        """The rewrite and the slim network. Raises ``InputError`` before ``Slim`` has run."""
        if self.slimmer is None or self.slim is None:
            raise InputError("nothing has been rewritten yet: run the pass Slim first")
        return self.slimmer, self.slim


def compilation(carrier: fx.GraphModule) -> Compilation:
    """How far the compilation has come that ``carrier`` stands for. Raises ``InputError`` for any other module."""
    found = carrier.meta.get(_KEY)
    if not isinstance(found, Compilation):
        raise InputError("this graph module stands for no compilation; passes of fxprune take what passes.pipeline.traced_graph makes")
    return found


def _advance(carrier: fx.GraphModule, **found: Any) -> None:
    carrier.meta[_KEY] = replace(compilation(carrier), **found)


def traced_graph(traced: TracedModel, graph: CouplingGraph | None = None) -> TracedGraph:
    """The module that stands for the compilation of a traced model, maybe one that is analysed already."""
    carrier = TracedGraph(nn.Module(), fx.Graph())
    carrier._graph = next(iter(traced.graphs.values()))
    carrier.meta[_KEY] = Compilation(traced, graph)
    return carrier


def fixed_dimensions(model: nn.Module, ignore: Iterable[Any], functional: Mapping[str, Iterable[int]]) -> list[tuple[str, int]]:
    """The output dimensions of what ``ignore`` names: modules, classes of modules, qualified names, or globs over qualified names.

    A layer's output channels stay and its inputs may still go; a parameter named itself stays whole. ``functional``: the output
    dimensions of parameters that functions read as weights.
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    tensors = dict(model.named_parameters(remove_duplicate=False))
    found: set[tuple[str, int]] = set()
    for item in ignore:
        if isinstance(item, (nn.Module, type)):
            chosen = [p for p, m in paths.items() if _is_meant(m, item)]
            named = []
        else:
            chosen = [p for p in paths if p and fnmatch.fnmatchcase(p, str(item))]
            within = tuple(f"{p}." for p in chosen)
            named = [n for n in tensors if fnmatch.fnmatchcase(n, str(item)) and not n.startswith(within)]
        if not chosen and not named:
            named_as = repr(item) if isinstance(item, str) else item.__name__ if isinstance(item, type) else kind_of(item)
            raise InputError(f"ignore names {named_as}, which is no module or parameter of this model")
        found.update((n, d) for n in named for d in range(tensors[n].ndim))
        for path in chosen:
            for name in tensors:
                if path == "" or name.startswith(f"{path}."):
                    owner, _, key = name.rpartition(".")
                    dims = functional.get(name) or outputs_of(paths[owner], key, tensors[name].ndim)
                    found.update((name, d) for d in (range(tensors[name].ndim) if dims is None else dims))
    return sorted(found)


class Couple(GraphPass):
    """Which channels go together: completes the compilation's ``graph``."""

    def __init__(
        self,
        inputs: Any,
        ignore: Iterable[Any] = (),
        attention: str = "auto",
        norms: str = "plain",
        outputs: Outputs | None = None,
        experts: bool = False,
    ) -> None:
        self.inputs, self.ignore, self.attention, self.norms, self.outputs = inputs, tuple(ignore), attention, norms, outputs
        self.experts = experts

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        traced = compilation(module).traced
        fixed = fixed_dimensions(traced.skeleton.original, self.ignore, output_dims(traced) if self.ignore else {})
        walk = _settled(traced, self.attention, fixed, self.outputs, self.experts)
        names = module_names(traced.skeleton.original, self.ignore)
        options: dict[str, Any] = {"attention": self.attention, "ignore": names}
        options |= {"norms": self.norms} if self.norms != "plain" else {}
        options |= {"experts": True} if self.experts else {}
        options |= {"past": level} if (level := _level(traced)) != KNOWN else {}
        options |= {"outputs": list(self.outputs)} if self.outputs is not None else {}
        options |= {"parts": calls} if (calls := calls_of(traced)) is not None else {}
        graph = CouplingGraph(walk, self.inputs, options)
        graph = _finer(graph, walk, fixed)
        if narrower := graph.narrower_outputs():
            graph.notes += (Note(NoteKind.OUTPUTS, f"returned with fewer channels, as outputs= does not name them: {', '.join(narrower)}"),)
        _advance(module, graph=graph)
        return module


def _level(traced: TracedModel) -> str:
    """What was found out about what forward keeps, for an analysis that cannot run the model."""
    skeleton = traced.skeleton
    return str(skeleton.started.level) if skeleton.has_history and skeleton.started is not None else KNOWN


def listed(ignore: Any) -> tuple[Any, ...]:
    """What ``ignore`` names, as a tuple: one module, name, glob or class may stand alone."""
    if ignore is None or isinstance(ignore, (str, nn.Module, type)):
        return () if ignore is None else (ignore,)
    if not isinstance(ignore, Iterable):
        raise InputError(f"ignore is {kind_of(ignore)}; it takes modules, classes of modules, names and globs")
    return tuple(ignore)


def module_names(model: nn.Module, ignore: Iterable[Any]) -> list[str]:
    """``ignore`` as names and globs, as a policy records it: modules by their first name, classes by the names of their modules."""
    found: dict[str, None] = {}
    for item in ignore:
        if isinstance(item, str):
            found[item] = None
        else:
            found.update(dict.fromkeys(path for path, module in model.named_modules() if _is_meant(module, item)))
    return list(found)


def _is_meant(module: nn.Module, item: nn.Module | type) -> bool:
    return isinstance(module, item) if isinstance(item, type) else module is item


def _settled(traced: TracedModel, attention: str, fixed: list[tuple[str, int]], outputs: Outputs | None, experts: bool) -> Walk:
    """Walk; where an attention's tensors chose an axis that something else fixes (grouped queries, a rotary table), walk again
    with one axis for all of them, and take what leaves the fewest of them fixed."""
    walk = Walk(traced, attention, fixed, outputs=outputs, experts=experts).run()
    clashing = _clashing(walk)
    if not clashing:
        return walk
    best, fewest = walk, len(clashing)
    for wish in ("head_dim", "heads"):
        keys, grown = set(clashing), True
        while grown:  # what is contracted with them has to follow
            trial = Walk(traced, attention, fixed, dict.fromkeys(sorted(keys), wish), outputs, experts).run()
            left = set(_clashing(trial))
            grown = bool(left - keys)
            keys |= left
        if len(left) < fewest:
            best, fewest = trial, len(left)
    return best


def _finer(graph: CouplingGraph, first: Walk, fixed: list[tuple[str, int]]) -> CouplingGraph:
    """Whole groups of a grouped convolution may have been chosen for it alone, and tie everything into one unit further on (a channel
    shuffle between two of them): walk again with positions within the groups, and take what leaves more channels to prune."""
    keys = set(first.whole)
    if not keys or not any(g.reason == SINGLE for g in graph.groups):
        return graph
    while True:
        forced = {**first.forced, **dict.fromkeys(sorted(keys), "within")}
        walk = Walk(graph.traced, first.attention, fixed, forced, first.outputs, first.experts).run()
        if walk.whole <= keys:
            break
        keys |= walk.whole
    other = CouplingGraph(walk, graph.inputs, graph.options)
    return max(graph, other, key=_channels)  # of equals the first


def _channels(graph: CouplingGraph) -> int:
    return sum(len(indices) for g in graph.groups if g.prunable for _, _, indices in g.members)


def _clashing(walk: Walk) -> list[str]:
    """The choices of an axis whose labels met a fixed axis of a tensor that had chosen another."""
    if not walk.clashes or not walk.choices:
        return []
    chosen = {key: walk.labels.find(labels) for key, labels in walk.choices.items()}
    found: set[str] = set()
    for pair in walk.clashes:
        sides = [{key for key, labels in chosen.items() if np.isin(walk.labels.find(vector), labels).any()} for vector in pair]
        if all(sides):  # a mask or a table that chose nothing has nothing to choose again
            found.update(*sides)
    return [key for key in chosen if key in found]


class Plan(GraphPass):
    """Which units stay: completes the compilation's ``keep``.

    ``keep_class``: as many units stay of one part as of another where the model's class could not be kept otherwise.
    """

    def __init__(
        self,
        policy: Mapping[str, float] | float,
        score: Callable[[CouplingGraph], Mapping[str, Any]],
        round_to: int = 1,
        most: Mapping[str, float] | float | None = None,
        keep_class: bool = False,
    ) -> None:
        self.policy, self.score, self.round_to, self.most, self.keep_class = policy, score, round_to, most, keep_class

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        graph = compilation(module).coupled()
        nothing = not any(self.policy.values()) if isinstance(self.policy, Mapping) else self.policy == 0
        scores = {} if nothing else self.score(graph)
        keep = keep_counts(graph, {}, {}) if nothing else plan(graph, self.policy, scores, self.round_to, self.most)
        if self.keep_class and not nothing:
            keep = evened(graph, keep, scores, lambda keep: uneven(Slimmer(graph, keep)), self.round_to)
        _advance(module, keep=keep)
        return module


class Slim(GraphPass):
    """The rewrite: completes the compilation's ``slimmer`` and ``slim``.

    Where the whole network was traced the slim network is the pass's result; where only parts were, or the user's class is kept, it is no
    graph module.
    """

    def __init__(self, keep_class: bool = False, norms: str | None = None) -> None:
        self.keep_class, self.norms = keep_class, norms

    @paused_collector()
    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        known = compilation(module)
        slimmer = Slimmer(known.coupled(), known.planned(), self.norms)
        if self.keep_class:
            slimmer.check_class_can_stay()
        slim = kept_class(slimmer) if self.keep_class else slimmer.run()
        _advance(module, slimmer=slimmer, slim=slim)
        # Shared graphs are looked at once, not for each candidate of a search.
        return slim if isinstance(slim, SlimModule) and not slim.borrowed else module


def as_recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``analysed`` is given besides the model, the example, ``ignore`` and ``attention``, from the options that a policy recorded."""
    return {
        "norms": str(options.get("norms", "plain")),
        "outputs": as_listed(options.get("outputs")),
        "parts": options.get("parts"),
        "experts": bool(options.get("experts")),
        "past": str(options.get("past", KNOWN)),
    }


@paused_collector()
def analysed(
    model: nn.Module,
    example_inputs: Any,
    ignore: Iterable[Any],
    attention: str,
    observe: Observer | None = None,
    norms: str = "plain",
    blocks: bool = False,
    check: bool = True,
    outputs: Outputs | None = None,
    parts: Mapping[str, Any] | None = None,
    experts: bool = False,
    past: str | None = None,
) -> CouplingGraph:
    """Trace and couple; the steps every use of a model shares. ``check``: as for ``trace``. ``outputs``: which keep their widths.
    ``parts``: those that an earlier analysis recorded in its options, to be taken again where code cannot be traced.
    ``past``: likewise, how much of what forward keeps is a cache (``tracing.side_effects.history``)."""
    if past not in (None, GUESSED, KNOWN, KEPT):
        raise InputError(f"the policy's option past is {past!r}, which this fxprune does not know")
    if attention not in ("auto", "heads", "head_dim"):
        raise InputError(f'attention is {attention!r}; it must be "auto", "heads" or "head_dim"')
    if norms not in NORMS:
        raise InputError(f"norms is {norms!r}; it must be {' or '.join(map(repr, NORMS))}")
    start = time.perf_counter()
    rules.complete()

    def has_rule(target: Any) -> bool:
        return rules.registry.function_rule(target) is not None

    refused: dict[str, str] = {}
    while True:
        traced, values, cause = _traced(model, example_inputs, has_rule, check, refused, parts, past)
        rules.complete()  # forward itself may have imported torchvision first
        if observe is not None:
            observe("Trace", traced, time.perf_counter() - start)
        carrier = traced_graph(traced)
        run_passes(carrier, [Couple(describe(example_inputs), ignore, attention, norms, outputs, experts)], observe)
        graph = compilation(carrier).coupled()
        if not traced.parts or not check or values is None or _on_meta(values):
            break
        slim = Slimmer(graph, keep_counts(graph, {}, {})).run()
        wrong, place = difference_of_slim(model, slim, call_form(values), list(traced.parts))
        if not wrong:
            break
        nested = [path for path in traced.parts if traced.within(path)]
        doubtful = [path for path in nested if path == place] or nested
        if not doubtful:
            raise TraceError(f"{wrong}; it was traced in parts since {cause}")
        refused.update(dict.fromkeys(doubtful, f"traced by itself it computes something else ({wrong})"))
        start = time.perf_counter()
    if blocks:
        graph.blocks = graph.all_blocks
        graph.options["blocks"] = True
    return graph


def _traced(
    model: nn.Module,
    example: Any,
    has_rule: Callable[[Any], bool],
    check: bool,
    refused: Mapping[str, str],
    parts: Mapping[str, Any] | None,
    past: str | None,
) -> tuple[TracedModel, Any, TraceError | None]:
    """The traced model; the values that its parts were found with, None where there are no parts or they were recorded; and why the root
    could not be traced, if it could not."""

    def values() -> Any:
        # What parts are called with is known only by running the model, so recorded shapes become values first.
        return build(describe(example), device=device_of(model)) if _on_meta(example) else example

    try:
        traced = trace(model, example, rules.is_known, has_rule, check=check, level=past)
    except TraceError as error:
        given = None if parts is not None else values()
        taken = example if given is None else given
        return trace_parts(model, taken, rules.is_known, has_rule, error, refused, parts), given, error
    if not traced.opaque:
        return traced, None, None
    given = None if parts is not None or on_meta(model, ((), {})) else values()
    add_parts(traced, given, rules.is_known, has_rule, refused, parts)
    return traced, given, None


def _on_meta(example: Any) -> bool:
    return any(t.device.type == "meta" for t in tree_leaves(example) if isinstance(t, torch.Tensor))


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
