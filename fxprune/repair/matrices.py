"""A convolution or linear layer as a matrix product: rows of its inputs and outputs at chosen places, and its weights as matrices.

Rows come as (groups, rows, features), so that ungrouped, grouped and depthwise layers are one batched product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.passes.compat import ConvNd, ConvTransposeNd

EVERY = (slice(None), slice(None))  # every sample and channel
Places = tuple[Tensor, ...]
"""Where rows are taken: one index tensor for each spatial axis of a convolution's output; one over all rows for a linear layer."""


@dataclass(frozen=True)
class Form:
    """How a layer multiplies its inputs with a weight, whether it is a module or a function called with a parameter.

    ``kind``: "linear" (weight: outputs x features), "matmul" (features x outputs), "conv" or "conv_transpose". ``pads``: of a
    convolution, as ``F.pad`` takes them; of a transposed one what its ``padding`` is, by axis. ``extra``: ``output_padding``.
    """

    kind: str
    stride: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    groups: int = 1
    mode: str = "constant"

    @property
    def space(self) -> int:
        """Number of spatial axes; none for a linear layer."""
        return len(self.stride)


def form_of(module: nn.Module) -> Form | None:
    """The form of a convolution or linear module; None for any other, and for a subclass that computes something else."""
    if isinstance(module, nn.Linear):
        return Form("linear") if type(module).forward is nn.Linear.forward else None
    if not isinstance(module, ConvNd):
        return None
    kept: Any = next((c for c in type(module).__mro__ if c.__module__ == nn.Conv2d.__module__), None)
    names = ("forward", "_conv_forward", "_output_padding")
    if kept is None or any(getattr(type(module), name, None) is not getattr(kept, name, None) for name in names):
        return None
    stride, dilation = tuple(module.stride), tuple(module.dilation)
    if isinstance(module, ConvTransposeNd):
        padding: Any = module.padding
        return Form("conv_transpose", stride, tuple(padding), dilation, tuple(module.output_padding), module.groups)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return Form("conv", stride, tuple(module._reversed_padding_repeated_twice), dilation, (), module.groups, mode)


def convolution(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Form | None:
    """The form of a call of ``F.conv1d``, ``conv2d`` or ``conv3d`` with these arguments; None where they are not plain numbers."""
    space = weight.ndim - 2
    steps, apart = _each(stride, space), _each(dilation, space)
    if steps is None or apart is None or not isinstance(groups, int):
        return None
    if padding in ("same", "valid"):
        total = [a * (k - 1) if padding == "same" else 0 for a, k in zip(apart, weight.shape[2:], strict=True)]
        pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    else:
        around = _each(padding, space)
        if around is None:
            return None
        pads = [side for p in reversed(around) for side in (p, p)]
    return Form("conv", steps, tuple(pads), apart, (), groups)


def transposed_convolution(weight: Tensor, stride: Any, padding: Any, extra: Any, groups: int, dilation: Any) -> Form | None:
    """The form of a call of ``F.conv_transpose1d``, ``2d`` or ``3d``; None where its arguments are not plain numbers."""
    found = [_each(one, weight.ndim - 2) for one in (stride, padding, dilation, extra)]
    if any(one is None for one in found) or not isinstance(groups, int):
        return None
    steps, around, apart, more = (one or () for one in found)
    return Form("conv_transpose", steps, around, apart, more, groups)


def _each(value: Any, space: int) -> tuple[int, ...] | None:
    given = (value,) * space if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    given = given * space if len(given) == 1 else given
    return given if len(given) == space and all(isinstance(v, int) for v in given) else None


def choose(form: Form, weight: Tensor, inputs: Tensor, limit: int, seed: int) -> Places:
    """Places for about ``limit`` rows of the output for ``inputs``, drawn by ``seed``: the same ones in every sample."""
    drawn = torch.Generator().manual_seed(seed)
    if not form.space:
        count = inputs.numel() // max(1, inputs.shape[-1])
        chosen = torch.randperm(count, generator=drawn)[:limit] if count > limit else torch.arange(count)
        return (chosen.to(inputs.device),)
    x = _batched(form, inputs)
    sizes = _output_sizes(form, tuple(weight.shape[2:]), tuple(x.shape[2:]))
    count = math.prod(sizes)
    wanted = max(1, limit // max(1, x.shape[0]))
    flat = torch.randperm(count, generator=drawn)[:wanted] if count > wanted else torch.arange(count)
    return tuple(index.to(inputs.device) for index in torch.unravel_index(flat, sizes))


def _output_sizes(form: Form, kernel: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    if form.kind == "conv_transpose":
        axes = zip(sizes, form.stride, form.pads, form.dilation, kernel, form.extra, strict=True)
        return tuple((size - 1) * step - 2 * pad + apart * (width - 1) + extra + 1 for size, step, pad, apart, width, extra in axes)
    pads = form.pads or (0,) * (2 * form.space)
    around = [before + after for before, after in zip(pads[::2], pads[1::2], strict=True)][::-1]
    axes = zip(sizes, around, form.dilation, kernel, form.stride, strict=True)
    return tuple((size + pad - apart * (width - 1) - 1) // step + 1 for size, pad, apart, width, step in axes)


def output_rows(form: Form, output: Tensor, places: Places) -> Tensor:
    """Rows of a tensor shaped like the layer's output, (rows, channels)."""
    if not form.space:
        return output.reshape(-1, output.shape[-1]).index_select(0, places[0]).float()
    x = _batched(form, output)
    ones = (1,) * len(places)
    return _gathered(x, places, ones, ones, ones).transpose(1, 2).flatten(0, 1).float()


def grouped(form: Form, rows: Tensor) -> Tensor:
    """Rows of outputs, (rows, channels), as (groups, rows, channels of a group)."""
    split: Tensor = rows.unflatten(1, (form.groups, -1))
    return split.transpose(0, 1)


def input_rows(form: Form, weight: Tensor, inputs: Tensor, places: Places) -> Tensor:
    """What the layer's weights are multiplied with at ``places``, (groups, rows, features of a group)."""
    if not form.space:
        return inputs.reshape(-1, inputs.shape[-1]).index_select(0, places[0]).unsqueeze(0).float()
    x, kernel = _batched(form, inputs), tuple(weight.shape[2:])
    if form.kind == "conv_transpose":
        x, stride = _stuffed(form, kernel, x), (1,) * form.space
    else:
        x, stride = F.pad(x, form.pads, mode=form.mode) if any(form.pads) else x, form.stride
    picked = _gathered(x, places, kernel, stride, form.dilation)
    split: Tensor = picked.unflatten(1, (form.groups, -1)).permute(1, 2, 0, 3)  # (groups, features, samples, places)
    return split.flatten(2).transpose(1, 2).float()


def matrices(form: Form, weight: Tensor) -> Tensor:
    """The weights as (groups, outputs of a group, features of a group), in the order of ``input_rows``."""
    weight = weight.detach()
    if not form.space:
        return (weight.t() if form.kind == "matmul" else weight).unsqueeze(0)
    if form.kind == "conv_transpose":  # (inputs, outputs of a group, *kernel): what it spreads, read from the output's side
        weight = weight.flip(tuple(range(2, weight.ndim)))
    split: Tensor = weight.unflatten(0, (form.groups, -1))
    return (split.transpose(1, 2) if form.kind == "conv_transpose" else split).flatten(3).flatten(2)


def input_axis(form: Form) -> int:
    """The axis of the weight along which the input channels (of a group) lie."""
    return 0 if form.kind in ("matmul", "conv_transpose") else 1


def set_matrices(form: Form, weight: Tensor, found: Tensor) -> None:
    """Write ``found``, in the form of ``matrices``, into the layer's weights."""
    if form.kind == "matmul":
        found = found.transpose(1, 2)
    if form.kind == "conv_transpose":
        kernel = weight.shape[2:]
        found = found.reshape(*found.shape[:2], -1, *kernel).transpose(1, 2).flatten(0, 1)
        found = found.flip(tuple(range(2, weight.ndim)))
    with torch.no_grad():
        weight.copy_(found.reshape(weight.shape))


def _gathered(x: Tensor, places: Places, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """The windows of ``x`` at ``places``, (samples, channels times what a window has, places).

    One ``index_select`` along the flattened space: several times as fast as indexing an unfolded view by every axis.
    """
    index = torch.zeros(1, len(places[0]), dtype=torch.long, device=x.device)  # (what a window has, places)
    for place, size, width, step, apart in zip(places, x.shape[2:], kernel, stride, dilation, strict=True):
        along = place * step + apart * torch.arange(width, device=x.device).unsqueeze(1)
        index = (index.unsqueeze(1) * size + along).flatten(0, 1)
    return x.flatten(2).index_select(2, index.flatten()).reshape(x.shape[0], -1, len(places[0]))


def _batched(form: Form, x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.ndim == form.space + 1 else x


def _stuffed(form: Form, kernel: tuple[int, ...], x: Tensor) -> Tensor:
    """The input of the ordinary convolution that a transposed one is: zeros between the samples and around them."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], form.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[EVERY + tuple(slice(None, None, step) for step in form.stride)] = x
    pads: list[int] = []
    for width, apart, pad, extra in zip(kernel, form.dilation, form.pads, form.extra, strict=True):
        pads = [apart * (width - 1) - pad, apart * (width - 1) - pad + extra, *pads]
    return F.pad(spread, pads)
