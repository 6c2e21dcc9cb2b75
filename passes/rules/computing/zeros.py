"""What an operation makes of removed channels: it is run once, on zeros where removed channels hold zeros, with the call's own arguments.

The oracle sets removed slices of parameters to zero, and the result is exact as long as zeros come out wherever channels meet. Which
operations keep zeros depends on their arguments (``hardtanh(x, 0.5, 2)`` does not), so nothing is written down: it is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.passes.ir.nodes import reads
from fxprune.passes.labels.context import LabelContext

# What stands for an operand of which nothing is known: both signs, small and large, fractions.
_SAMPLES = 16
_READ = (2.6, -2.6, 0.4, -0.4)  # and for a number that is read from values
_MOST = 4  # indices along each axis that a probe has

_known: dict[Any, tuple[tuple[bool, bool], ...]] = {}


def after_zeros(node: fx.Node, module: nn.Module | None, zeros: Sequence[bool], full: bool = False) -> tuple[tuple[bool, bool], ...]:
    """For each tensor that ``node`` gives: whether it is zero where the operands ``zeros`` are, and whether it is finite there.

    Args:
        node: The call; its tensors are counted in the order of its arguments.
        module: What it calls, if it is a module.
        zeros: One flag per tensor; any numbers stand in for the others.
        full: Give the probes the form of the operands (an operation along axes), else a row of numbers (element by element).
    """
    tensors: list[fx.Node] = []
    map_arg(_given(node), lambda n: tensors.append(n) if isinstance(n.meta.get("val"), torch.Tensor) else None)
    kinds = tuple((n.meta["val"].dtype, tuple(n.meta["val"].shape) if full else n.meta["val"].ndim) for n in tensors)
    literals = repr(map_arg(_given(node), lambda n: _Named("T" if n in tensors else repr(n.meta.get("val")))))
    own = (type(module), module.extra_repr(), module.training) if module is not None else node.target
    read = tuple(n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (int, float)) and reads(n))
    key = (node.op, own, literals, kinds, tuple(zeros), full, bool(read))
    if key not in _known:
        if len(_known) > 10_000:
            _known.clear()
        probes = [_probe(node, module, tensors, zeros, full, dict.fromkeys(read, one)) for one in (_READ if read else (0,))]
        # Whatever a number is that code reads from values; of one that the operation does not take nothing is known.
        _known[key] = tuple((all(z for z, _ in of), all(f for _, f in of)) for of in zip(*probes, strict=True)) if all(probes) else ()
    return _known[key]


def _given(node: fx.Node) -> tuple[Any, dict[str, Any]]:
    return node.args, {key: value for key, value in node.kwargs.items() if key != "out"}


class _Named(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _probe(
    node: fx.Node, module: nn.Module | None, tensors: Sequence[fx.Node], zeros: Sequence[bool], full: bool, read: dict[fx.Node, float]
) -> tuple[tuple[bool, bool], ...]:
    def run(value: int) -> list[torch.Tensor]:
        given = [_sample(n, i, z, full, value) for i, (n, z) in enumerate(zip(tensors, zeros, strict=True))]
        return _run(node, module, tensors, given, read)

    at_zero = run(0)
    if not at_zero:
        return ()
    at_one = run(1)
    return tuple(
        (bool((got == 0).all()), bool(got.isfinite().all()) or not bool(beside.isfinite().all()))
        for got, beside in zip(at_zero, at_one, strict=True)
    )


def _sample(node: fx.Node, number: int, zero: bool, full: bool, value: int) -> torch.Tensor:
    meta = node.meta["val"]
    shape = [min(n, _MOST) for n in meta.shape] if full else [1] * (meta.ndim - 1) + [_SAMPLES] * (meta.ndim > 0)
    if zero:
        return torch.full(shape, value, dtype=meta.dtype)
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    if meta.dtype == torch.bool:
        return drawn > 0
    if not (meta.is_floating_point() or meta.is_complex()):
        drawn = drawn.round()
        drawn[drawn == 0] = 1
    return drawn.to(meta.dtype)


@torch.no_grad()
def _run(
    node: fx.Node, module: nn.Module | None, tensors: Sequence[fx.Node], given: Sequence[torch.Tensor], read: dict[fx.Node, float]
) -> list[torch.Tensor]:
    """The tensors that the operation gives, none where it does not run so; the user's random numbers stay where they are."""
    left = list(given)
    args, kwargs = map_arg(_given(node), lambda n: left.pop(0) if n in tensors else _number(n, read))
    kwargs = {key: value for key, value in kwargs.items() if key != "device"}
    run: Callable[..., Any] = module if module is not None else node.target  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            found = getattr(args[0], str(node.target))(*args[1:], **kwargs) if node.op == "call_method" else run(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return []
    found = list(found) if isinstance(found, (tuple, list)) else [found]
    return found if all(isinstance(t, torch.Tensor) for t in found) else []


def _number(node: fx.Node, read: dict[fx.Node, float]) -> Any:
    value = node.meta.get("val")
    if node not in read:
        return value
    return read[node] if isinstance(value, float) else int(read[node])


def elementwise(ctx: LabelContext, node: fx.Node, module: nn.Module | None = None) -> Any:
    """Element by element on all that is given: labels are united where they meet, and what is zero is computed."""
    values = ctx.given
    meta = node.meta["val"]
    if not isinstance(meta, torch.Tensor) or not values:
        return ctx.opaque(node, values)
    axes, _ = ctx.combine(tuple(meta.shape), values)
    zero = []
    for axis, vector in axes.items():
        # An operand that does not span the axis may hold anything there.
        flags = [axis - meta.ndim + v.ndim in v.zero for v in values]
        if not any(flags):
            continue
        found = after_zeros(node, module, flags)
        if found and found[0][0]:
            zero.append(axis)
        elif found and not found[0][1]:
            ctx.inexact(vector, "it is not finite where channels are zero")
    return ctx.make(node, axes, zero, next((v.why for v in values if v.ndim == meta.ndim), values[0].why))


def keeps_zero(node: fx.Node, module: nn.Module | None = None) -> tuple[bool, ...]:
    """For each tensor that an operation on one tensor gives: whether zeros in, other tensors whatever they are, means zeros out."""
    count = 0

    def add(n: fx.Node) -> None:
        nonlocal count
        count += isinstance(n.meta.get("val"), torch.Tensor)

    map_arg(_given(node), add)
    return tuple(zero for zero, _ in after_zeros(node, module, [i == 0 for i in range(count)], full=True))
