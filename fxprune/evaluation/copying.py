"""Copies of the user's modules: ``copy.deepcopy``, for weights that are computed as well, and for what refuses to be copied."""

from __future__ import annotations

import copy
import threading
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fxprune.errors import InputError, first_line
from fxprune.passes.compat import ScriptFunction, tree_leaves

_DRAWN = (types.GeneratorType, types.AsyncGeneratorType, types.CoroutineType)  # what a run of the copy would use up for the original
_DEEP = 6  # how far into objects within objects what refuses is looked for


def copied(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy that shares no storage with ``model``.

    ``copy.deepcopy`` refuses tensors with a history. Modules hold such tensors where a hook computes a weight before each call
    (``torch.nn.utils.prune``, the old ``weight_norm`` and ``spectral_norm``) and where a forward pass kept a result; of these the copy
    has the values. It refuses scripted functions, open streams, locks and their kind, too, which both share. ``memo``: by ``id``, what
    both share or what stands for it. Raises ``InputError`` naming what can be neither copied nor shared.
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
    made = dict(known)
    try:
        twin = copy.deepcopy(model, made)
    except Exception as error:  # noqa: BLE001 - what refuses to be copied raises what it likes
        twin, made = _without_refusing(model, known, error), known
    for module, key, value in weak:
        if id(module) in made:
            made[id(module)].__dict__[key] = weakly(value, made)
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


def _without_refusing(model: nn.Module, known: dict[int, Any], first: Exception) -> nn.Module:
    """The copy with what refuses shared. It is looked for only now, since hardly any model holds something of the kind."""
    inside = {id(m): m for m in model.modules()} | {id(t): t for t in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if id(value) in known or id(value) in inside:
                continue
            for where, one in _refusing(value, f"{path}.{name}" if path else name, {**inside, **known}):
                if isinstance(one, _DRAWN):
                    raise InputError(f"{where} holds a {type(one).__name__}, which cannot be copied: {first_line(first)}") from first
                known[id(one)] = one.detach().clone() if isinstance(one, Tensor) else one
    try:
        for local in [one for one in known.values() if isinstance(one, threading.local)]:
            known[id(local)] = threading.local()
            known[id(local)].__dict__.update(copy.deepcopy(local.__dict__, known))
        return copy.deepcopy(model, known)
    except Exception as error:
        raise InputError(f"this {type(model).__name__} cannot be copied: {first_line(error)}") from error


def _refusing(value: Any, where: str, memo: dict[int, Any], deep: int = _DEEP) -> Iterator[tuple[str, Any]]:
    """The innermost objects that refuse to be copied, and where they are. ``memo``: what is not to be looked at."""
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:  # noqa: BLE001 - as above
        inner: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            inner = [(f"{where}[{key!r}]", one) for key, one in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            inner = [(f"{where}[{at}]", one) for at, one in enumerate(value)]
        elif not isinstance(value, Tensor) and type(getattr(value, "__dict__", None)) is dict:
            inner = [(f"{where}.{key}", one) for key, one in value.__dict__.items()]
        found = [pair for name, one in inner if deep and id(one) not in memo for pair in _refusing(one, name, memo, deep - 1)]
        yield from found or [(where, value)]
