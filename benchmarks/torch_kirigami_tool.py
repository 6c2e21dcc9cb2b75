"""One network of the coverage table pruned by torch-kirigami, as its README does it: discovered candidates, a budget, a greedy strategy."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from benchmarks.networks import Case
from benchmarks.tools import Row, built, costs, described, saved
from benchmarks.torch_pruning_tool import tag, untag
from benchmarks.zeroing import is_norm, judged


def torch_kirigami_row(case: Case, sparsity: float) -> Row:
    """The same share of every channel axis that it finds, or of all parameters where an axis cannot give it. It leaves inputs and outputs
    alone by itself and refuses what it cannot prove."""
    model, inputs, meta = built(case)
    if meta:
        return {"verdict": "not run", "why": "too large to be run on the CPU"}
    row: Row = {"input": described(inputs)}
    twin = copy.deepcopy(model).double()  # numbers of elements are exact in double precision
    tag(twin)
    start = time.process_time()
    count, budget = prune(
        twin, tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs), sparsity
    )
    row |= {"seconds": time.process_time() - start, "prunable": count, "settings": budget}
    kept = untag(twin, model)
    if not kept:
        return row | {"verdict": "fails", "why": "nothing was removed"}
    row |= saved(costs(model, inputs), costs(twin, inputs))
    return row | judged(model, inputs, twin.eval(), kept, lambda: (0, twin, kept) if statistics(model) else None, count)


def statistics(model: nn.Module) -> bool:
    """Whether it has a norm over channels: zeroing is another thing than removing then, and only shapes are compared."""
    return any(map(is_norm, model.modules()))


def prune(model: nn.Module, inputs: Any, sparsity: float) -> tuple[int, str]:
    """Prune ``model`` in place; how many channel axes there were, and what the budget was in."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, ParameterBudget, PlanningError, Pruner

    graph = DependencyGraph.build(model, args=tuple(inputs))
    pruner = Pruner(model, graph=graph)
    candidates = pruner.discover_candidates()
    strategy, axes = Greedy(GroupMagnitude(p=2)), len(candidates.channel_axes)
    try:
        pruner.prune(candidates, budget=ChannelRatio(sparsity), strategy=strategy)
        return axes, "channels"
    except PlanningError:  # it asks for the share on every axis, and there is one that cannot give it
        most = int((1 - sparsity) * sum(p.numel() for p in model.parameters()))
        pruner.prune(candidates, budget=ParameterBudget(max_params=most), strategy=strategy)
        return axes, "parameters"
