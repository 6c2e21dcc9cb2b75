"""One network of the coverage table: built, primed, pruned by fxprune, and judged."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks import Case, Inputs
from benchmarks.zeroing import Kept, called, is_norm, judged, leaves, prime

Row = dict[str, Any]
LARGE = 2e9  # bytes of weights above which a network is only run on the meta device
SEED = 0


def built(case: Case) -> tuple[nn.Module, Inputs, bool]:
    """The network in evaluation mode with inputs it takes, and whether it is on the meta device because of its size."""
    torch.manual_seed(SEED)
    with torch.device("meta"):
        try:
            size = sum(p.numel() * p.element_size() for p in case.build().parameters())
        except (RuntimeError, NotImplementedError):  # its constructor reads values, which meta tensors have not; such networks are small
            size = 0
    if size > LARGE:
        with torch.device("meta"):
            return case.build().eval(), case.inputs[0](), True
    model = case.build().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for make in case.inputs:
        inputs = make()
        try:
            with torch.no_grad():
                copy.deepcopy(model)(*copy.deepcopy(inputs))
        except (AssertionError, RuntimeError, ValueError):
            if make is case.inputs[-1]:
                raise
            continue
        break
    return prime(model, inputs), inputs, False


def costs(model: nn.Module, inputs: Any) -> tuple[int, int]:
    """Parameters and multiply-accumulates of one call, counted by torch as the operations run."""
    counter = FlopCounterMode(display=False)
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:  # the counter hooks into the gradients of what modules are given, parameters among them
        parameter.requires_grad_(False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into the fused attention of nn.MultiheadAttention
    try:
        with counter, torch.no_grad():
            called(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in wanted:
            parameter.requires_grad_(True)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def described(inputs: Any) -> str:
    if isinstance(inputs, torch.Tensor):
        return "x".join(map(str, inputs.shape))
    if isinstance(inputs, (list, tuple)):
        return ", ".join(described(i) for i in inputs)
    if isinstance(inputs, dict):
        return ", ".join(f"{name} {described(value)}" for name, value in inputs.items())
    return str(inputs)


def saved(before: tuple[int, int], after: tuple[int, int]) -> Row:
    return {"params": 1 - after[0] / before[0], "macs": 1 - after[1] / max(before[1], 1)}


def fxprune_row(case: Case, sparsity: float) -> Row:
    import fxprune

    model, inputs, meta = built(case)
    row: Row = {"input": described(inputs), "size": sum(p.numel() for p in model.parameters())}
    start = time.process_time()
    graph = fxprune.analyze(model, inputs)
    row["analyse"] = time.process_time() - start
    prunable = {g.name: sparsity for g in graph.groups if g.prunable}
    traced = graph.traced
    row |= {
        "traced": "parts" if traced.parts else "whole",
        "parts": list(traced.parts),
        "opaque": dict(sorted(traced.opaque.items())),
        "prunable": len(prunable),
        "locked": len(graph.groups) - len(prunable),
        "notes": list(graph.notes),
        "outputs": _outputs(graph),
        "heads": len(head_layers(model)),
        "statistics": with_statistics(graph, model),
    }
    if not prunable:
        return row | {"verdict": "fails", "why": "no prunable group", "in_the_way": in_the_way(graph, model)}

    def pruned(policy: Mapping[str, float]) -> tuple[nn.Module, Kept]:
        slim = fxprune.compress(graph, policy, inputs, importance="random" if meta else "auto")
        return slim.eval(), fxprune.record(slim).kept

    start = time.process_time()
    slim, kept = pruned(prunable)
    row["seconds"] = row["analyse"] + time.process_time() - start
    left = set(row["statistics"])
    free = {g.name: sparsity for g in graph.groups if g.prunable and not g.notes and not left & {end(*m[:2]) for m in g.members}}
    row["free"] = len(free)
    row |= saved(costs(model, inputs), costs(slim, inputs))
    row["in_the_way"] = in_the_way(graph, model)
    if meta:
        return row | {"verdict": "shapes only", **_same_shapes(model, slim, inputs)}
    again = (lambda: (len(free), *pruned(free))) if len(free) < len(prunable) else (lambda: None)
    return row | judged(model, inputs, slim, kept, again, len(prunable))


def _same_shapes(model: nn.Module, slim: nn.Module, inputs: Inputs) -> Row:
    with torch.no_grad():
        before, after = ([t.shape for t in leaves(m(*inputs))] for m in (model, slim))
    return {} if before == after else {"verdict": "fails", "why": f"output shapes {before[:3]} became {after[:3]}"}


def end(name: str, dim: int) -> str:
    return f"{name.rpartition('.')[0]}:{'out' if dim == 0 else 'in'}"


def _outputs(graph: Any) -> list[str]:
    """Layers whose output channels are the network's outputs: no tool may remove them, and Torch-Pruning has to be told."""
    found = {n.rpartition(".")[0] for g in graph.groups if g.reason.startswith("it reaches the") for n, d, _ in g.members if d == 0}
    return sorted(found)


def with_statistics(graph: Any, model: nn.Module) -> list[str]:
    """The ends of layers whose channels meet a statistic over channels: the oracle is not defined there."""
    modules = dict(model.named_modules())
    found: set[str] = set()
    for group in graph.groups:
        ends = {end(n, d) for n, d, _ in group.members}
        if group.notes or any(is_norm(modules[e.rpartition(":")[0]]) for e in ends if e.rpartition(":")[0] in modules):
            found |= ends
    return sorted(found)


def in_the_way(graph: Any, model: nn.Module) -> list[tuple[str, float]]:
    """Why channels are locked, with the share of the network's parameters that each reason touches, largest first."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    total = max(sum(p.numel() for p in model.parameters()), 1)
    touched: dict[str, float] = {}
    for group in graph.groups:
        if group.prunable:
            continue
        share = sum(t.numel() * len(i) / t.shape[d] for n, d, i in group.members if (t := tensors.get(n)) is not None and t.ndim)
        touched[group.reason] = touched.get(group.reason, 0.0) + share / total
    return sorted(touched.items(), key=lambda item: -item[1])[:6]


def head_layers(model: nn.Module) -> dict[str, int]:
    """The projections of attention modules that say how many heads they have, by name."""
    found = {}
    for path, module in model.named_modules():
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int):
            for name, layer in module.named_children():
                if isinstance(layer, nn.Linear) and name in ("qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj"):
                    found[f"{path}.{name}" if path else name] = heads
    return found
