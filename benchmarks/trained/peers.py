"""The same network to half its MACs by other tools, as their own examples use them: uniform, by L2 norms, BatchNorm estimated again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxprune
from benchmarks.trained.network import Task
from benchmarks.zeroing import leaves
from fxprune.evaluation.accuracy import recalibrate_batchnorm
from fxprune.evaluation.running import call

TARGET = 0.5
STEPS = 5  # of bisection for the sparsity whose MACs are half


def torch_pruning(task: Task, graph: Any) -> nn.Module:
    """Torch-Pruning's ``BasePruner``, with the output layers left alone, which it has to be handed."""
    import torch_pruning as tp

    outputs = {n.rpartition(".")[0] for g in graph.groups if g.reason.startswith("it reaches the") for n, d, _ in g.members if d == 0}

    def pruned(sparsity: float) -> nn.Module:
        twin = _trainable(task.model)
        modules = dict(twin.named_modules())
        pruner = tp.pruner.BasePruner(
            twin,
            task.example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=sparsity,
            ignored_layers=[modules[n] for n in sorted(outputs) if n in modules],
            forward_fn=lambda m, x: call(m, copy.deepcopy(x)),
            output_transform=lambda out: [t for t in leaves(out) if t.grad_fn is not None],
        )
        pruner.step()
        return twin

    return _halved(task, pruned)


def torch_kirigami(task: Task, graph: Any) -> nn.Module:
    """torch-kirigami as its README has it: candidates that it discovers, a channel budget, a greedy strategy."""
    from benchmarks.torch_kirigami_tool import prune

    del graph

    def pruned(sparsity: float) -> nn.Module:
        twin = _trainable(task.model)
        if isinstance(task.example, dict):
            raise TypeError("it takes positional inputs alone")
        prune(twin, task.example if isinstance(task.example, tuple) else (task.example,), sparsity)
        return twin

    return _halved(task, pruned)


PEERS: dict[str, Callable[[Task, Any], nn.Module]] = {"Torch-Pruning": torch_pruning, "torch-kirigami": torch_kirigami}


def _trainable(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return twin


def _halved(task: Task, pruned: Callable[[float], nn.Module]) -> nn.Module:
    """The result that is nearest to half the MACs from below. Raises ``ValueError`` where nothing the tool removes reaches it."""
    before = fxprune.profile(task.model, task.example).macs
    low, high, best = 0.0, 0.9, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        slim = pruned(middle).eval()
        with torch.no_grad():
            call(slim, copy.deepcopy(task.example))
        if fxprune.profile(slim, task.example).macs <= TARGET * before:
            high, best = middle, slim
        else:
            low = middle
    if best is None:
        raise ValueError(f"{high:.0%} of the channels that it finds leave more than half of the MACs")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in best.modules()):
        recalibrate_batchnorm(best, task.calibration)
    return best
