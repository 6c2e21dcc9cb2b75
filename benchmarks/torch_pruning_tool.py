"""One network of the coverage table pruned by Torch-Pruning, used as its own examples use it."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import nn

from benchmarks.networks import Case, Inputs
from benchmarks.tools import SEED, Row, built, costs, described, head_layers, saved
from benchmarks.zeroing import Kept, is_norm, judged, leaves


def torch_pruning_row(case: Case, sparsity: float, hints: Row, told_heads: bool) -> Row:
    """Half of every group that Torch-Pruning finds.

    ``hints``: fxprune's row, which names the output layers it must be told to leave alone. ``told_heads``: give it ``num_heads``.
    """
    model, inputs, meta = built(case)
    if meta:
        return {"verdict": "not run", "why": "too large to be run on the CPU"}
    row: Row = {"input": described(inputs)}
    start = time.process_time()
    slim, kept, count = _pruned(model, inputs, sparsity, hints, told_heads, None)
    row |= {"seconds": time.process_time() - start, "prunable": count}
    if not kept:
        return row | {"verdict": "fails", "why": "nothing was removed"}
    row |= saved(costs(model, inputs), costs(slim, inputs))

    def defined() -> tuple[int, nn.Module, Kept] | None:
        slim, kept, left = _pruned(model, inputs, sparsity, hints, told_heads, frozenset(hints.get("statistics", ())))
        return None if left == count else (left, slim, kept)

    return row | judged(model, inputs, slim, kept, defined, count)


def _pruned(
    model: nn.Module, inputs: Inputs, sparsity: float, hints: Row, told_heads: bool, statistics: frozenset[str] | None
) -> tuple[nn.Module, Kept, int]:
    """The pruned copy, what was kept, and how many groups went. ``statistics``: leave out groups that meet these, or a norm layer."""
    import torch_pruning as tp

    twin: Any = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    names = {m: n for n, m in modules.items()}
    classes = getattr(twin, "num_classes", None)
    ignored = [modules[n] for n in hints.get("outputs", ()) if n in modules]
    if not hints.get("outputs"):
        ignored = [m for m in twin.modules() if isinstance(m, nn.Linear) and m.out_features in (1000, 400, classes)]
    heads = {modules[n]: count for n, count in head_layers(twin).items()} if told_heads else {}
    pruner = tp.pruner.BasePruner(
        twin,
        inputs,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=sparsity,
        ignored_layers=ignored,
        num_heads=dict(heads),
        round_to=twin.encoder.layers[0].num_heads if hasattr(twin, "conv_proj") and hasattr(twin, "encoder") else None,
        in_channel_groups={},
        out_channel_groups={},
        forward_fn=lambda m, x: m(*copy.deepcopy(x)),
        output_transform=lambda out: [t for t in leaves(out) if t.grad_fn is not None],
    )
    tag(twin)
    count = 0
    torch.manual_seed(SEED)
    for group in pruner.step(interactive=True):
        if statistics is not None and any(
            _handled(pruner.DG, dep, names) in statistics or (isinstance(dep.target.module, nn.Module) and is_norm(dep.target.module))
            for dep, _ in group
        ):
            continue
        group.prune()
        count += 1
    kept = untag(twin, model)
    _settle(twin, pruner, heads, names)
    return twin.eval(), kept, count


def _settle(twin: Any, pruner: Any, heads: dict[nn.Module, int], names: dict[nn.Module, str]) -> None:
    """The numbers that networks keep as plain attributes, which its examples set by hand after pruning."""
    for module in twin.modules():
        for layer in module.children():
            if layer in heads and hasattr(module, "head_dim"):
                width = layer.out_features // (3 if names[layer].endswith("qkv") else 1)
                module.num_heads = pruner.num_heads[layer]
                module.head_dim = width // module.num_heads
                if hasattr(module, "attn_dim"):
                    module.attn_dim = width
    if hasattr(twin, "hidden_dim") and hasattr(twin, "conv_proj"):
        twin.hidden_dim = twin.conv_proj.out_channels


def _handled(graph: Any, dep: Any, names: dict[Any, str]) -> str:
    side = "out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"
    return f"{names.get(dep.target.module, '?')}:{side}"


def tag(model: nn.Module) -> None:
    """Fill every tensor with the numbers of its elements: what is left after pruning says which elements were kept."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim:
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)


def untag(slim: nn.Module, model: nn.Module) -> Kept:
    """Put the model's own values where the tags are and return the kept indices. Raises ``ValueError`` if what is left is no rectangle."""
    kept: dict[str, dict[int, torch.Tensor]] = {}
    originals = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    left = dict(slim.named_parameters(remove_duplicate=False)) | dict(slim.named_buffers(remove_duplicate=False))
    done: set[int] = set()
    for name, tensor in left.items():
        original = originals[name]
        if not tensor.ndim or id(tensor) in done:
            continue
        done.add(id(tensor))
        places = tensor.data.long()
        dims = {}
        flat = torch.zeros((), dtype=torch.long)
        step = original.numel()
        for dim, size in enumerate(original.shape):
            step //= size
            line = places[tuple(slice(None) if d == dim else slice(0, 1) for d in range(places.ndim))].flatten()
            index = line // step % size
            dims[dim] = index
            flat = flat.unsqueeze(-1) + index * step
        if places.shape != flat.shape or not torch.equal(places, flat):
            raise ValueError(f"what is left of {name} is no rectangle of the original")
        tensor.data = original.detach().flatten()[places].clone()
        changed = {d: i for d, i in dims.items() if len(i) != original.shape[d]}
        if changed:
            kept[name] = changed
    return kept
