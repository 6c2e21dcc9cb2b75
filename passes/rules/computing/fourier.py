"""Fourier transforms along other axes than the channels, short-time ones, and the two views between real and complex tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, named

_ONE = (torch.fft.fft, torch.fft.ifft, torch.fft.rfft, torch.fft.irfft, torch.fft.hfft, torch.fft.ihfft)
_TWO = (torch.fft.fft2, torch.fft.ifft2, torch.fft.rfft2, torch.fft.irfft2)
_MANY = (torch.fft.fftn, torch.fft.ifftn, torch.fft.rfftn, torch.fft.irfftn, torch.fft.fftshift, torch.fft.ifftshift)


def _along(ctx: LabelContext, node: fx.Node, x: Value, dims: Sequence[int]) -> Any:
    """Every output along ``dims`` reads every input there; the other axes keep their channels."""
    return ctx.through(node, x, mixed=tuple(d % x.ndim for d in dims))


@functions(*_ONE)
def one(ctx: LabelContext, node: fx.Node, input: Value, n: Any = None, dim: int = -1, norm: str | None = None) -> Any:
    return _along(ctx, node, input, (dim,))


@functions(*_TWO)
def two(ctx: LabelContext, node: fx.Node, input: Value, s: Any = None, dim: Sequence[int] = (-2, -1), norm: str | None = None) -> Any:
    return _along(ctx, node, input, dim)


@functions(*_MANY)
def many(ctx: LabelContext, node: fx.Node, input: Value, s: Any = None, dim: Any = None, **_: Any) -> Any:
    if dim is None and s is not None:
        dim = range(-len(s), 0)
    return _along(ctx, node, input, range(input.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim)


@named("stft", inplace=False)
def stft(ctx: LabelContext, node: fx.Node, input: Value, window: Any = None, **_: Any) -> Any:
    """(B, time) to (B, frequency, frame)."""
    return _framed(ctx, node, input, 1, window)


@named("istft", inplace=False)
def istft(ctx: LabelContext, node: fx.Node, input: Value, window: Any = None, **_: Any) -> Any:
    """(B, frequency, frame) to (B, time)."""
    return _framed(ctx, node, input, 2, window)


def _framed(ctx: LabelContext, node: fx.Node, x: Value, times: int, window: Any) -> Any:
    """The last ``times`` axes are mixed; one before them, into which channels may be folded, stays."""
    for axis in range(x.ndim - times, x.ndim):
        ctx.pin(x.axes.get(axis), "its channels are mixed with each other")
    if isinstance(window, Value):
        ctx.pin_all(window, "it is the window of a Fourier transform")
    kept = {axis: vector for axis, vector in x.axes.items() if axis < x.ndim - times}
    return ctx.make(node, kept, x.zero & kept.keys(), x.why)


def _whole(slim: Rewriter, node: fx.Node) -> None:
    """Pairs have to lie together at an even offset; a part of a tensor that lost an odd number of channels may not."""
    given = slim.argument(node, "input")
    slim.set_argument(node, "input", slim.new.call_method("clone", (given,), {"memory_format": torch.contiguous_format}))


@named("view_as_complex", rewrite=_whole, inplace=False, always=True)
def view_as_complex(ctx: LabelContext, node: fx.Node, input: Value) -> Any:
    """The last axis (real, imaginary) goes; others stay."""
    last = input.ndim - 1
    ctx.pin(input.axes.get(last), "it holds a real and an imaginary part")
    return ctx.make(node, {a: v for a, v in input.axes.items() if a != last}, [a for a in input.zero if a != last], input.why)


@named("view_as_real", inplace=False)
def view_as_real(ctx: LabelContext, node: fx.Node, input: Value) -> Any:
    return ctx.make(node, input.axes, input.zero, input.why)
