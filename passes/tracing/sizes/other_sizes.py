"""What shapes the tensors of a traced graph have for inputs of other sizes, as far as the network takes these: run on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxprune.errors import FAULTS
from fxprune.passes.compat import tree_leaves, tree_map_only
from fxprune.passes.ir.nodes import is_read
from fxprune.passes.ir.traced import TracedModel
from fxprune.passes.tracing.meta_execution import execute, hides_structure, run_for_real
from fxprune.passes.tracing.sizes import counted
from fxprune.passes.tracing.sizes.fixed_sizes import is_fixed

Shapes = Mapping[fx.Node, torch.Size]
_KEY = "other sizes"


def shapes_at_other_sizes(graph: fx.Graph, traced: TracedModel) -> tuple[Shapes, ...] | None:
    """The shapes of all tensors of a graph, for every other size of its inputs that was tried and that it takes; None where none could be
    tried, for a module in it is kept whole. Kept with the graph."""
    first = next(iter(graph.nodes))
    if _KEY not in first.meta:
        whole = any(n.op == "call_module" and hides_structure(n, set(traced.opaque), traced.skeleton) for n in graph.nodes)
        tried = () if whole else _others(graph, traced)
        taken = [_first_taken(graph, traced, ways) for ways in tried]
        first.meta[_KEY] = None if whole else tuple(one for one in taken if one is not None)
    found: tuple[Shapes, ...] | None = first.meta[_KEY]
    return found


def _others(graph: fx.Graph, traced: TracedModel) -> Iterator[list[dict[fx.Node, Any]]]:
    """Inputs of other sizes: another batch, more along each axis alone and along all of them; each in several ways, for networks take
    multiples of what they halve, or no more than a table holds."""
    module = traced.skeleton.module
    inputs = {node: node.meta["val"] for node in graph.nodes if node.op == "placeholder"}
    largest = max((t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)), key=lambda t: t.ndim, default=None)
    if largest is None or not largest.ndim:
        return
    source = next((node for node, value in inputs.items() if value is largest), None)
    free = [a for a in range(1, largest.ndim) if source is None or not is_fixed(source, a, module)]

    def resized(factor: float, more: int, *axes: int) -> dict[fx.Node, Any]:
        def one(tensor: torch.Tensor) -> torch.Tensor:
            shape = list(tensor.shape)
            for axis in axes:
                if axis < tensor.ndim and shape[axis] == largest.shape[axis]:
                    shape[axis] = max(int(shape[axis] * factor) + more, 1)
            return torch.empty(shape, dtype=tensor.dtype, device="meta")

        found: dict[fx.Node, Any] = tree_map_only(torch.Tensor, one, inputs)
        return found

    yield [resized(1, 1, 0), resized(2, 0, 0)]
    for axes in [[a] for a in free] + ([free] if len(free) > 1 else []):
        yield [resized(2, 0, *axes), resized(0.5, 0, *axes), resized(1, 1, *axes), resized(1, -1, *axes)]
    if free:
        yield [resized(2, 0, 0, *free)]


def _first_taken(graph: fx.Graph, traced: TracedModel, ways: list[dict[fx.Node, Any]]) -> Shapes | None:
    for inputs in ways:
        if all(a.shape == b.meta["val"].shape for b, a in inputs.items() if isinstance(a, torch.Tensor)):
            continue  # half of one
        try:
            return _run(graph, traced, inputs)
        except FAULTS:
            continue
    return None


def _run(graph: fx.Graph, traced: TracedModel, inputs: dict[fx.Node, Any]) -> Shapes:
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            env[node] = inputs[node]
        elif node.op == "get_attr" or (node.target is getattr and node.args[1] == "device"):
            held = node.meta["val"]
            env[node] = held.detach() if isinstance(held, torch.Tensor) else held  # code may give it another shape in place
        else:
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = _result(node, args, kwargs, traced)
    return {node: value.shape for node, value in env.items() if isinstance(value, torch.Tensor)}


def _result(node: fx.Node, args: Any, kwargs: Any, traced: TracedModel) -> Any:
    if is_read(node):
        return node.meta["val"]
    picked = counted.picked(node, args, kwargs)
    if picked is not None:
        return picked[0]
    try:
        return execute(node, args, kwargs, traced.skeleton)
    except FAULTS:
        if not hides_structure(node, set(traced.opaque), traced.skeleton):
            raise
        return run_for_real(node, args, kwargs, traced.skeleton)
