"""The zeroing oracle: a slim network computes what the original computes with the removed slices set to zero."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import VerificationError
from fxprune.evaluation.running import set_training
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.labels.values import Value
from fxprune.passes.planning.plan import Keep
from fxprune.passes.rewriting.slimmer import Slimmer

TOLERANCE = 1e-4  # relative to the largest magnitude of the output, in float32
Kept = Mapping[str, Mapping[int, torch.Tensor]]


def zeroed(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of ``model`` with every slice that is not kept set to zero; running variances and index buffers stay."""
    twin = copy.deepcopy(model)
    set_training(twin, False)
    tensors = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, dims in kept.items():
            if name.endswith("running_var") or not tensors[name].is_floating_point():
                continue
            for dim, indices in dims.items():
                gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                gone[indices] = False
                tensors[name].index_fill_(dim, gone.nonzero().flatten().to(tensors[name].device), 0)
    return twin


def difference(reference: Any, other: Any) -> float:
    """Largest relative difference over all tensors of two nested outputs; infinite where shapes differ or a value is not finite."""
    worst = 0.0
    for a, b in zip(_leaves(reference), _leaves(other), strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            gap = ((a.double() - b.double()).abs().max() / (a.double().abs().max() + 1e-6)).item()
            worst = max(worst, gap) if gap == gap else float("inf")
    return worst


def verify(graph: CouplingGraph, keep: Keep, slim: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], norms: str = "plain") -> float:
    """Run the oracle on the given inputs, on the groups for which it is defined, and return the relative difference.

    Groups whose channels share a statistic (layer norm, softmax or a reduction over channels) are put back for the comparison; the whole
    slim network is then only run. Raises ``VerificationError`` naming the first node that differs, and its line.
    """
    training = {m: m.training for m in slim.modules()}
    slim.eval()
    try:
        with torch.no_grad():
            slim(*args, **kwargs)
            defined = keep.copy()
            for group in graph.groups:
                if group.undefined if norms == "exact" else group.notes:
                    defined[graph.starts[group.number] : graph.starts[group.number + 1]] = True
            part = slim if (defined == keep).all() else Slimmer(graph, defined, norms).run().eval()
            slimmer = Slimmer(graph, defined, norms)
            names = graph.walk.traced.skeleton
            kept = {alias: dims for n in names.names if (dims := slimmer.kept_dims(n)) for alias in names.aliases[n]}
            reference = zeroed(graph.model, kept)
            gap = difference(reference(*args, **kwargs), part(*args, **kwargs))
            if gap < TOLERANCE:
                return gap
            raise VerificationError(_report(graph, slimmer, reference, part, args, kwargs, gap))
    finally:
        for module, mode in training.items():
            module.training = mode


def _report(
    graph: CouplingGraph,
    slimmer: Slimmer,
    reference: nn.Module,
    slim: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gap: float,
) -> str:
    """Which node is wrong first: both graphs run node by node, the original's values cut to what is kept."""
    if graph.walk.traced.parts:
        return f"the outputs differ from the zeroed original by {gap:.1e}; report it"
    for name, tensor in graph.walk.traced.constants.items():
        path, _, key = name.rpartition(".")
        setattr(reference.get_submodule(path), key, tensor)
    traced = graph.walk.traced.graphs["eval"]
    flat = [*args, *kwargs.values()]
    first, second = _Recorder(reference, traced), _Recorder(slim, slim.graphs["eval"])
    first.run(*flat)
    second.run(*flat)
    for node in traced.nodes:
        value = graph.walk.env["eval"].get(node)
        mine, theirs = first.seen.get(node.name), second.seen.get(node.name)
        if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor) or not isinstance(value, Value):
            continue
        for axis in value.axes:
            kept = slimmer.kept(value, axis)
            mine = mine if kept is None else mine.index_select(axis, torch.from_numpy(kept))
        if (found := difference(mine, theirs)) >= TOLERANCE:
            what = f"node {node.name!r} differs from the zeroed original by {found:.1e} (outputs by {gap:.1e})"
            return f"{node.meta.get('where', '')}: {what}; report it, and pass its layer to ignore= meanwhile"
    return f"the outputs differ from the zeroed original by {gap:.1e}, no single node does; report it"


class _Recorder(fx.Interpreter):
    """Runs a graph on a module and keeps what every node gave."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n.name] = result.clone() if isinstance(result, torch.Tensor) else result
        return result


def _leaves(nested: Any) -> list[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        return [nested]
    if isinstance(nested, Mapping):
        return [t for v in nested.values() for t in _leaves(v)]
    if isinstance(nested, (tuple, list)):
        return [t for v in nested for t in _leaves(v)]
    return []
