"""How many experts there are, where modules and their configurations say it: a kept class has to say how many are left."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxprune.passes.rewriting import attributes
from fxprune.passes.rewriting.attributes import Slot
from fxprune.passes.rewriting.slimmer import Slimmer

_COUNT = re.compile(r"experts$")  # num_experts, num_local_experts, n_routed_experts, moe_num_experts; not num_experts_per_tok
_OTHERS = re.compile(r"shared|zero|copy|const")  # experts that every token meets, or that compute nothing


def expert_counts(slimmer: Slimmer, made: nn.Module) -> dict[Slot, int]:
    """New values for the integers that count the experts of a router: those of the modules that hold them and of the modules around
    these, and of their configurations. Where several routers are counted by one integer and keep different numbers, it stays."""
    modules = dict(made.named_modules(remove_duplicate=False))
    wanted: dict[tuple[int, Any], set[int]] = defaultdict(set)
    slots: dict[tuple[int, Any], Slot] = {}
    for path, (old, new) in _around(slimmer):
        for keys, value in attributes.integers(modules[path]):
            name = keys[-1]
            if value == old and isinstance(name, str) and _COUNT.search(name) and not _OTHERS.search(name):
                key = id(_holder(modules[path], keys)), name
                wanted[key].add(new)
                slots.setdefault(key, Slot(path, keys))
    return {slots[key]: next(iter(values)) for key, values in wanted.items() if len(values) == 1}


def _around(slimmer: Slimmer) -> list[tuple[str, tuple[int, int]]]:
    """The modules that hold a router's experts, and those around them; each with how many there are, and how many stay."""
    found: dict[tuple[str, tuple[int, int]], None] = {}
    for group in slimmer.graph.groups:
        for name, dim, indices in group.members if group.experts else ():
            kept: Mapping[int, Any] = slimmer.kept_dims(name) or {}
            old = slimmer.skeleton.tensor(name).shape[dim]
            if len(indices) != old:
                continue
            path = name.rpartition(".")[0]
            while True:
                found[path, (old, len(kept[dim]) if dim in kept else old)] = None
                if not path:
                    break
                path = path.rpartition(".")[0]
    return list(found)


def _holder(module: nn.Module, keys: tuple[Any, ...]) -> Any:
    held: Any = module
    for key in keys[:-1]:
        held = attributes.read(held, key)
    return held
