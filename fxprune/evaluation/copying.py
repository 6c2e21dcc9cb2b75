"""Copies of the user's modules: ``copy.deepcopy``, for weights that are computed as well."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxprune.passes.compat import ScriptFunction, tree_leaves


def copied(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy that shares no storage with ``model``.

    ``copy.deepcopy`` refuses tensors with a history. Modules hold such tensors where a hook computes a weight before each call
    (``torch.nn.utils.prune``, the old ``weight_norm`` and ``spectral_norm``) and where a forward pass kept a result; of these the copy
    has the values. It refuses scripted functions, too, which both share. ``memo``: by ``id``, what both share or what stands for it.
    """
    known: dict[int, Any] = dict(memo or {})
    weak: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for key, value in module.__dict__.items():
            if type(value) in WEAK:
                weak.append((module, key, value))
                known[id(value)] = value  # a proxy would be copied as what it stands for
        held = (v for k, v in module.__dict__.items() if k != "_modules")
        for tensor in tree_leaves([*held]):
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                known.setdefault(id(tensor), tensor.detach().clone())
            if isinstance(tensor, ScriptFunction):
                known[id(tensor)] = tensor  # it has no state, and refuses
    twin = copy.deepcopy(model, known)
    for module, key, value in weak:
        if id(module) in known:
            known[id(module)].__dict__[key] = weakly(value, known)
    return twin


WEAK = (weakref.ReferenceType, *weakref.ProxyTypes)


def weakly(value: Any, memo: Mapping[int, Any]) -> Any:
    """A weak reference to, or proxy of, the copy that ``memo`` has of what ``value`` refers to; ``value`` where it has none."""
    is_proxy = type(value) is not weakref.ReferenceType
    try:
        found = memo.get(id(value.__init__.__self__ if is_proxy else value()))
    except ReferenceError:
        return value
    if found is None:
        return value
    return weakref.proxy(found) if is_proxy else weakref.ref(found)
