"""Tensors, or whatever stands for them, in nested containers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence


def packed(data: Any, batch_sizes: Any, sorted_indices: Any = None, unsorted_indices: Any = None) -> Any:
    """A ``PackedSequence`` of anything; its own constructor wants lengths on the CPU."""
    return tuple.__new__(PackedSequence, (data, batch_sizes, sorted_indices, unsorted_indices))


def tensors(nested: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    collect(nested, torch.Tensor, found)
    return found


def has_tensor(nested: Any) -> bool:
    return bool(tensors(nested))


def collect(nested: Any, kind: type, found: list[Any]) -> None:
    """Append every instance of ``kind`` in nested containers, named tuples and dataclasses to ``found``, in order."""
    if isinstance(nested, kind):
        found.append(nested)
    elif isinstance(nested, dict):
        for v in nested.values():
            collect(v, kind, found)
    elif isinstance(nested, (tuple, list)):
        for v in nested:
            collect(v, kind, found)
    elif isinstance(nested, slice):
        collect((nested.start, nested.stop, nested.step), kind, found)
    elif is_dataclass(nested) and not isinstance(nested, type):
        collect([getattr(nested, f.name) for f in fields(nested)], kind, found)
