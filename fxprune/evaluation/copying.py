"""Copies of the user's modules: ``copy.deepcopy``, for weights that are computed as well."""

from __future__ import annotations

import copy
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
    for module in model.modules():
        held = (v for k, v in module.__dict__.items() if k != "_modules")
        for tensor in tree_leaves([*held]):
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                known.setdefault(id(tensor), tensor.detach().clone())
            if isinstance(tensor, ScriptFunction):
                known[id(tensor)] = tensor  # it has no state, and refuses
    return copy.deepcopy(model, known)
