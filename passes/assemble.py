"""Sliced tensors and copied modules put together to a module tree with the original's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxprune.passes.skeleton import fill


def cut(source: torch.Tensor, values: torch.Tensor | None, dims: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A copy of ``source`` with only the kept indices of each dimension (or with new ``values``); layout and parameter-ness stay."""
    made = source.detach() if values is None else values.to(source.device)
    for dim, indices in dims.items():
        made = made.index_select(dim, indices if made.device.type == "cpu" else indices.to(made.device))
    if not dims:
        made = made.clone() if made.device.type != "meta" else torch.empty_like(made)
    elif made.ndim == 4 and source.is_contiguous(memory_format=torch.channels_last) and not source.is_contiguous():
        made = made.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(made, requires_grad=source.requires_grad) if isinstance(source, nn.Parameter) else made


def assemble(
    original: nn.Module,
    memo: dict[int, Any],
    called: Callable[[str], bool],
    opaque: Callable[[str], bool],
    constants: Mapping[str, torch.Tensor],
) -> nn.Module:
    """The module tree of ``original`` with the tensors of ``memo`` (id of the original tensor -> new tensor).

    Modules the graph calls are copied with their class; the others hold their parameters under the same names as plain modules.
    """
    paths = list(original.named_modules(remove_duplicate=False))
    for path, module in paths:
        if id(module) in memo:
            continue
        memo[id(module)] = object.__new__(type(module)) if opaque(path) or called(path) else nn.Module()
    done: set[int] = set()
    for _, module in paths:
        twin = memo[id(module)]
        if id(module) in done:
            continue
        done.add(id(module))
        if type(twin) is nn.Module and type(module) is not nn.Module:
            twin._parameters = {k: None if v is None else memo[id(v)] for k, v in module._parameters.items()}
            twin._buffers = {k: None if v is None else memo[id(v)] for k, v in module._buffers.items()}
            twin._modules = {k: None if v is None else memo[id(v)] for k, v in module._modules.items()}
            twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
            twin.training = module.training
        else:
            fill(module, twin, memo)
    root: nn.Module = memo[id(original)]
    for name, tensor in constants.items():
        path, _, key = name.rpartition(".")
        setattr(root.get_submodule(path), key, tensor)
    return root


def replace_module(tree: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered."""
    for module in tree.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
