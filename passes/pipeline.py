"""The compiler's steps as passes: trace, couple, plan, slim. Facts a step finds travel in the graph module's ``meta``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import fx, nn

from fxprune.errors import InputError
from fxprune.inputs import describe
from fxprune.passes import rules
from fxprune.passes.base import GraphPass
from fxprune.passes.coupling import CouplingGraph
from fxprune.passes.labels import Walk
from fxprune.passes.plan import Keep, keep_counts, plan
from fxprune.passes.slim import Slimmer
from fxprune.passes.trace import TracedModel, trace


class TracedGraph(fx.GraphModule):
    """The traced graph on the way through the passes. It is never run, so no code is generated for it."""

    def recompile(self) -> Any:
        return None


def traced_graph(traced: TracedModel) -> TracedGraph:
    carrier = TracedGraph(nn.Module(), fx.Graph())
    carrier._graph = traced.graphs["eval"]
    carrier.meta["traced"] = traced
    return carrier


def fixed_parameters(model: nn.Module, ignore: Iterable[Any]) -> list[str]:
    """Names of the parameters that ``ignore`` names: of modules, qualified names, or globs over qualified names."""
    import fnmatch

    paths = dict(model.named_modules(remove_duplicate=False))
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    found: list[str] = []
    for item in ignore:
        if isinstance(item, nn.Module):
            chosen = [p for p, m in paths.items() if m is item]
        else:
            chosen = [p for p in (*paths, *names) if p and fnmatch.fnmatchcase(p, str(item))]
        if not chosen:
            raise InputError(f"ignore names {item if isinstance(item, str) else type(item).__name__!r}, which is no module or parameter of this model")
        found += [n for n in names for p in chosen if n == p or p == "" or n.startswith(f"{p}.")]
    return sorted(set(found))


class Couple(GraphPass):
    """Which channels go together: puts a ``CouplingGraph`` under ``meta["coupling"]``."""

    def __init__(self, inputs: Any, ignore: Iterable[Any] = (), attention: str = "auto") -> None:
        self.inputs, self.ignore, self.attention = inputs, tuple(ignore), attention

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        traced: TracedModel = module.meta["traced"]
        fixed = fixed_parameters(traced.skeleton.original, self.ignore)
        walk = _settled(traced, self.attention, fixed)
        names = [n if isinstance(n, str) else _path(traced.skeleton.original, n) for n in self.ignore]
        module.meta["coupling"] = CouplingGraph(walk, self.inputs, {"attention": self.attention, "ignore": names})
        return module


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(p for p, m in model.named_modules() if m is module)


def _settled(traced: TracedModel, attention: str, fixed: list[str]) -> Walk:
    """Walk; where two tensors of one attention chose different axes (grouped queries), walk again with one axis for both."""
    walk = Walk(traced, attention, fixed).run()
    clashing = _clashing(walk)
    if not clashing:
        return walk
    best, fewest = walk, len(clashing)
    for wish in ("head_dim", "heads"):
        trial = Walk(traced, attention, fixed, dict.fromkeys(clashing, wish)).run()
        left = len(_clashing(trial))
        if left < fewest:
            best, fewest = trial, left
    return best


def _clashing(walk: Walk) -> list[str]:
    """The choices of an axis whose labels met a fixed axis of a tensor that had chosen another."""
    if not walk.clashes or not walk.choices:
        return []
    met = np.unique(walk.labels.find(np.concatenate([v for pair in walk.clashes for v in pair])))
    return [key for key, labels in walk.choices.items() if np.isin(walk.labels.find(labels), met).any()]


class Plan(GraphPass):
    """Which units stay: puts one boolean per unit under ``meta["keep"]``."""

    def __init__(self, policy: Mapping[str, float] | float, score: Callable[[CouplingGraph], Mapping[str, Any]], round_to: int = 1) -> None:
        self.policy, self.score, self.round_to = policy, score, round_to

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        graph: CouplingGraph = module.meta["coupling"]
        nothing = not any(self.policy.values()) if isinstance(self.policy, Mapping) else self.policy == 0
        module.meta["keep"] = keep_counts(graph, {}, {}) if nothing else plan(graph, self.policy, self.score(graph), self.round_to)
        return module


class Slim(GraphPass):
    """The rewrite: a ``SlimModule`` with the kept units of ``meta["keep"]``."""

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        graph: CouplingGraph = module.meta["coupling"]
        keep: Keep = module.meta["keep"]
        slimmer = Slimmer(graph, keep)
        slim = slimmer.run()
        slim.meta.update(module.meta, slimmer=slimmer)
        return slim


def analysed(model: nn.Module, example_inputs: Any, ignore: Iterable[Any], attention: str) -> TracedGraph:
    """Trace and couple; the steps every use of a model shares."""
    if attention not in ("auto", "heads", "head_dim"):
        raise InputError(f'attention is {attention!r}; it must be "auto", "heads" or "head_dim"')
    carrier = traced_graph(trace(model, example_inputs, rules.is_known, rules.registry.FUNCTIONS.__contains__))
    Couple(describe(example_inputs), ignore, attention)(carrier)
    return carrier
