"""Example inputs: how they are called, described in JSON, and made again from the description."""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import torch

from fxprune.errors import InputError, kind_of
from fxprune.passes.compat import tree_unflatten

Json = Any


def call_form(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a tensor, a tuple or list of positional inputs, or a dict of keyword inputs into ``(args, kwargs)``."""
    if isinstance(example, Mapping):
        return (), {str(k): v for k, v in example.items()}
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, torch.Tensor):
        return (example,), {}
    raise InputError(f"example_inputs is {kind_of(example)}; pass a tensor, a tuple of positional inputs or a dict of keyword inputs")


def of_graph(module: torch.fx.GraphModule) -> Any:
    """The inputs a graph was made with, as its placeholders remember them, on the meta device; None where they do not.

    An exported module is called by the names of its inputs, nested as they were; sizes that are dynamic have those of its example.
    """
    values = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
    if not values or not all(isinstance(v, torch.Tensor) for v in values):
        return None
    flat = [torch.empty([_hint(s) for s in v.shape], dtype=v.dtype, device="meta") for v in values]
    info = getattr(module.graph._codegen, "pytree_info", None)
    if info is None:
        return tuple(flat)
    nested = tree_unflatten(flat, info.in_spec)
    if len(nested) != 2 or not isinstance(nested[1], dict):
        return tuple(nested)
    return dict(zip((name.partition(":")[0] for name in info.orig_args), (*nested[0], *nested[1].values()), strict=True))


def _hint(size: Any) -> int:
    return size if type(size) is int else int(size.node.hint)


_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_SHORT = 64  # numbers


def describe(example: Any) -> Json:
    """Describe ``example`` as JSON: its structure, the shape and dtype of every tensor in it, and what a short list of integers holds.

    Such a list (the lengths of sequences, the step of a diffusion) says something of the other inputs, which no other numbers fit.
    """
    if isinstance(example, torch.Tensor):
        found: dict[str, Json] = {"tensor": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}
        if example.dtype in _INTEGERS and example.ndim < 2 and example.numel() <= _SHORT and not example.is_meta:
            found["values"] = example.detach().flatten().tolist()
        return found
    if isinstance(example, Mapping):
        return {"dict": {str(k): describe(v) for k, v in example.items()}}
    if isinstance(example, tuple):
        found = {"tuple": [describe(v) for v in example]}
        return found | {"fields": list(example._fields), "class": _class_of(type(example))} if hasattr(example, "_fields") else found
    if isinstance(example, list):
        return {"list": [describe(v) for v in example]}
    if example is None or isinstance(example, (bool, int, float, str)):
        return {"value": example}
    raise InputError(f"example_inputs hold {kind_of(example)}, which a policy file cannot describe")


def build(spec: Json, *, device: torch.device | str = "cpu", seed: int = 0) -> Any:
    """Make random inputs of the form that ``describe`` recorded (normal for floats, 0 or 1 for integers without values)."""
    generator = torch.Generator().manual_seed(seed)
    try:
        return _build(spec, torch.device(device), generator)
    except RecursionError as error:
        raise InputError("recorded inputs are malformed: they are nested too deeply") from error


def _build(spec: Json, device: torch.device, generator: torch.Generator) -> Any:
    if not isinstance(spec, dict):
        raise InputError(f"recorded inputs are malformed: expected an object, found {kind_of(spec)}")
    if "tensor" in spec:
        return _tensor(spec, device, generator)
    for kind, form in (("dict", dict), ("tuple", list), ("list", list)):
        if kind in spec and not isinstance(spec[kind], form):
            raise InputError(f"recorded inputs are malformed: {kind!r} holds {kind_of(spec[kind])}; it must hold a {form.__name__}")
    if "dict" in spec:
        return {k: _build(v, device, generator) for k, v in spec["dict"].items()}
    if "tuple" in spec:
        parts = [_build(v, device, generator) for v in spec["tuple"]]
        return tuple(parts) if "fields" not in spec else _named_tuple(spec)(*parts)
    if "list" in spec:
        return [_build(v, device, generator) for v in spec["list"]]
    if "value" in spec:
        return spec["value"]
    raise InputError(f"recorded inputs are malformed: {sorted(spec)} names no known kind of input")


def _class_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _named_tuple(spec: dict[str, Json]) -> Any:
    """The class of a named tuple, where the program has it: nothing is imported for it. Else one with the same fields."""
    fields, (home, _, path) = spec["fields"], str(spec.get("class", "")).partition(":")
    if not isinstance(fields, list) or len(fields) != len(spec["tuple"]) or not all(isinstance(f, str) for f in fields):
        raise InputError(f"recorded inputs are malformed: {str(fields)[:80]} are no names of {len(spec['tuple'])} parts")
    found: Any = sys.modules.get(home)
    for name in path.split("."):
        found = getattr(found, name, None)
    if isinstance(found, type) and issubclass(found, tuple) and getattr(found, "_fields", None) == tuple(fields):
        return found
    try:
        return namedtuple(path.rpartition(".")[2] or "Inputs", fields)
    except ValueError as error:
        raise InputError(f"recorded inputs are malformed: {error}") from error


def _tensor(spec: dict[str, Json], device: torch.device, generator: torch.Generator) -> torch.Tensor:
    dtype = getattr(torch, str(spec.get("dtype", "float32")), None)
    shape = spec["tensor"]
    if not isinstance(dtype, torch.dtype) or not isinstance(shape, list) or not all(isinstance(s, int) and s >= 0 for s in shape):
        raise InputError(f"recorded inputs are malformed: shape {shape!r}, dtype {spec.get('dtype')!r}")
    if device.type == "meta" and spec.get("values") is None:  # a few numbers stay: code makes sizes of them
        return torch.empty(shape, dtype=dtype, device=device)
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.randn(shape, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    else:
        made = torch.randint(0, 2, shape, generator=generator)
        given = spec.get("values")
        if given is not None:
            if not isinstance(given, list) or len(given) != made.numel() or not all(type(v) is int for v in given):
                raise InputError(f"recorded inputs are malformed: {str(given)[:80]} are no values of a tensor of shape {shape}")
            made = torch.tensor(given, dtype=torch.int64).reshape(shape)
    return made.to(device="cpu" if device.type == "meta" else device, dtype=dtype)
