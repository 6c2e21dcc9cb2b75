"""Sliced tensors and copied modules put together to a module tree with the original's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.evaluation.wrappers import class_of_copy
from fxprune.passes.ir.skeleton import at_or_below, fill
from fxprune.passes.ir.slim_module import FOLLOWING

_BLANK = nn.Module().__dict__
_OF_ITS_OWN = tuple((key, type(value)) for key, value in _BLANK.items() if isinstance(value, (dict, set)))
Copies = tuple[tuple[nn.Module, bool], ...]


def copies(original: nn.Module, keeps_class: Callable[[str], bool]) -> Copies:
    """Every module of ``original`` once, and whether its copy keeps its class: the others become plain modules that hold parameters."""
    found: dict[nn.Module, bool] = {}
    for path, module in original.named_modules(remove_duplicate=False):  # one name of several may be known to code that is not looked into
        found[module] = found.get(module, type(module) is nn.Module) or keeps_class(path)
    return tuple(found.items())


def assemble(modules: Copies, memo: dict[int, Any], constants: Mapping[str, torch.Tensor]) -> nn.Module:
    """The tree of ``modules``, the root first, with the tensors of ``memo`` (id of the original tensor -> new tensor).

    The new modules are added to ``memo`` (id of the original module -> new module). ``constants``: tensors to hold at other paths.
    """
    for module, keeps_class in modules:
        memo[id(module)] = object.__new__(class_of_copy(module) if keeps_class else nn.Module)
    for module, keeps_class in modules:
        twin = memo[id(module)]
        if keeps_class:
            fill(module, twin, memo)
            continue
        state = _BLANK.copy()
        object.__setattr__(twin, "__dict__", state)
        for key, fresh in _OF_ITS_OWN:
            state[key] = fresh()
        for kind in ("_parameters", "_buffers", "_modules"):
            held = module.__dict__[kind]
            if held:
                state[kind] = {k: None if v is None else memo[id(v)] for k, v in held.items()}
        if module._non_persistent_buffers_set:
            state["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        state["training"] = module.training
    root: nn.Module = memo[id(modules[0][0])]
    for name, tensor in constants.items():
        path, _, key = name.rpartition(".")
        home = root.get_submodule(path)
        follows = not (tensor.is_floating_point() or tensor.is_complex() or key in home.__dict__)
        setattr(home, key, tensor)
        if follows:  # an index goes to the device of the weights, though it is no buffer: names of tensors stay the original's
            home.__dict__[FOLLOWING] = (*home.__dict__.get(FOLLOWING, ()), key)
    return root


def replace_module(tree: nn.Module, old: nn.Module, new: fx.GraphModule) -> None:
    """Put ``new`` wherever ``old`` is: code may also hold it in a list or under a name of its own, so ``old`` becomes ``new`` if it can."""
    try:
        old.__class__ = type(new)
    except TypeError:  # a class with slots
        for module in tree.modules():
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = new
        return
    object.__setattr__(old, "__dict__", new.__dict__)
    for graph in new.__dict__["graphs"].values():
        graph.owning_module = old


def drop(slim: nn.Module, gone: set[str], called: set[str]) -> None:
    """Take tensors out of the tree, and the modules that hold nothing any more and that nothing calls."""
    modules: dict[str, Any] = dict(slim.named_modules(remove_duplicate=False))
    for name in sorted(gone):
        path, _, key = name.rpartition(".")
        for table in (modules[path]._parameters, modules[path]._buffers):
            table.pop(key, None)
    touched = {name.rpartition(".")[0] for name in gone}
    for path in sorted(modules, key=lambda p: -p.count(".")):
        if not path or any(at_or_below(c, path) for c in called):
            continue
        module = modules[path]
        hollow = not any(True for _ in (*module.parameters(), *module.buffers()))
        if hollow and any(at_or_below(t, path) for t in touched):
            parent, _, key = path.rpartition(".")
            modules[parent]._modules.pop(key, None)
