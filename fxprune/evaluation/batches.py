"""Calibration batches: which part of one are the inputs, and whether they fit the example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import InputError, kind_of

Form = Any
"""The example inputs as ``fxprune.example_inputs.describe`` records them; None where they are not known."""


def split(batch: Any, form: Form = None) -> tuple[Any, Any]:
    """A batch as inputs and targets, None where it has none.

    By the recorded form of the example: a network of two inputs takes a whole pair of tensors; of a dict it takes the keys that the
    example has, and what is left over are the targets.
    """
    if isinstance(batch, Mapping):
        known = form.get("dict") if isinstance(form, dict) else None
        if known is None:
            return dict(batch), None
        missing = [name for name in known if name not in batch]
        if missing:
            has = ", ".join(map(str, batch))
            raise InputError(f"a calibration batch has no {missing[0]!r}, which the example inputs have; it has {has}")
        left = {name: value for name, value in batch.items() if name not in known}
        targets = next(iter(left.values())) if len(left) == 1 else left or None  # a label by whatever name
        return {name: batch[name] for name in known}, targets
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and not _is_inputs(batch, form):
        return _inner(batch[0], form), batch[1]
    return (tuple(batch) if isinstance(batch, list) else batch), None


def _inner(inputs: Any, form: Form) -> Any:
    """The inputs of a pair, which may have labels of their own as well."""
    return split(inputs, form)[0] if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, list) else inputs


def _is_inputs(pair: Any, form: Form) -> bool:
    several = form.get("tuple", form.get("list")) if isinstance(form, dict) else None
    return several is not None and len(several) == 2 and all(isinstance(one, Tensor) for one in pair)


def inputs_of(batch: Any, form: Form = None) -> Any:
    """The inputs of a batch, which may have targets."""
    return split(batch, form)[0]


def alone(inputs: Sequence[Any]) -> list[tuple[Any, None]]:
    """Inputs as batches without targets, which nothing takes for pairs of inputs and targets."""
    return [(one, None) for one in inputs]


def checked(batches: list[Any] | None, form: Form) -> list[Any] | None:
    """``batches``, each of which fits the example in its structure, in the axes of its tensors and in their kind of numbers.

    Raises:
        InputError: says which batch does not, and how.
    """
    wanted = list(_tensors(form))
    for number, batch in enumerate(batches or ()):
        what = _misfit(inputs_of(batch, form), wanted, form)
        if what:
            raise InputError(f"calibration batch {number} {what}")
    return batches


def _misfit(inputs: Any, wanted: list[tuple[str, list[int], torch.dtype]], form: Form) -> str:
    found = list(_found(inputs))
    for one in found:
        if not isinstance(one, (Tensor, bool, int, float, str, type(None))):
            return f"holds {kind_of(one)}; pass tensors, as the example inputs are"
    tensors = [one for one in found if isinstance(one, Tensor)]
    if not tensors:
        return "holds no tensor; pass inputs as the example has them, or (inputs, targets)" if wanted or form is None else ""
    if any(not tensor.numel() for tensor in tensors):
        return "is empty"
    if wanted and len(tensors) != len(wanted):
        return f"has {len(tensors)} tensors as inputs where the example has {len(wanted)}; pass (inputs, targets), inputs as in the example"
    for tensor, (name, shape, dtype) in zip(tensors, wanted, strict=False):
        which = f"has a tensor for {name!r}" if name else "has a tensor"
        if tensor.ndim != len(shape):
            return f"{which} of shape {tuple(tensor.shape)} where the example's has {len(shape)} axes, {tuple(shape)}"
        if (tensor.is_floating_point() or tensor.is_complex()) != (dtype.is_floating_point or dtype.is_complex):
            return f"{which} of {tensor.dtype} where the example's is {dtype}"
    return ""


def _found(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _found(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _found(one)
    else:
        yield value


def _tensors(form: Form, name: str = "") -> Iterator[tuple[str, list[int], torch.dtype]]:
    """Name, shape and dtype of every tensor of a recorded example."""
    if not isinstance(form, dict):
        return
    if "tensor" in form:
        yield name, form["tensor"], getattr(torch, form["dtype"])
    for key, one in form.get("dict", {}).items():
        yield from _tensors(one, key)
    for one in form.get("tuple") or form.get("list") or ():
        yield from _tensors(one, name)
