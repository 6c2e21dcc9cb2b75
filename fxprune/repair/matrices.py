"""A convolution or linear layer as a matrix product: rows of its inputs and outputs at chosen places, and its weights as matrices.

Rows come as (groups, rows, features), so that ungrouped, grouped and depthwise layers are one batched product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

LAYERS = (nn.Linear, _ConvNd)
EVERY = (slice(None), slice(None))  # every sample and channel
Places = tuple[Tensor, ...]
"""Where rows are taken: one index tensor for each spatial axis of a convolution's output; one over all rows for a linear layer."""


def choose(module: nn.Module, output: Tensor, limit: int, seed: int) -> Places:
    """Places for about ``limit`` rows of ``output``, drawn without replacement by ``seed``: the same ones in every sample of the batch."""
    drawn = torch.Generator().manual_seed(seed)
    if isinstance(module, nn.Linear):
        count = output[..., 0].numel()
        chosen = torch.randperm(count, generator=drawn)[:limit] if count > limit else torch.arange(count)
        return (chosen.to(output.device),)
    shape = _batched(module, output).shape
    count = shape[2:].numel()
    wanted = max(1, limit // shape[0])
    flat = torch.randperm(count, generator=drawn)[:wanted] if count > wanted else torch.arange(count)
    return tuple(index.to(output.device) for index in torch.unravel_index(flat, shape[2:]))


def output_rows(module: Any, output: Tensor, places: Places) -> Tensor:
    """Rows of a tensor shaped like the layer's output, (rows, channels)."""
    if isinstance(module, nn.Linear):
        return output.reshape(-1, output.shape[-1]).index_select(0, places[0]).float()
    x = _batched(module, output)
    ones = (1,) * len(places)
    return _gathered(x, places, ones, ones, ones).transpose(1, 2).flatten(0, 1).float()


def grouped(module: Any, rows: Tensor) -> Tensor:
    """Rows of outputs, (rows, channels), as (groups, rows, channels of a group)."""
    split: Tensor = rows.unflatten(1, (getattr(module, "groups", 1), -1))
    return split.transpose(0, 1)


def input_rows(module: Any, inputs: Tensor, places: Places) -> Tensor:
    """What the layer's weights are multiplied with at ``places``, (groups, rows, features of a group)."""
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1]).index_select(0, places[0]).unsqueeze(0).float()
    x = _batched(module, inputs)
    x, stride = (_stuffed(module, x), (1,) * (x.ndim - 2)) if isinstance(module, _ConvTransposeNd) else (_padded(module, x), module.stride)
    picked = _gathered(x, places, module.kernel_size, stride, module.dilation)
    split: Tensor = picked.unflatten(1, (module.groups, -1)).permute(1, 2, 0, 3)  # (groups, features, samples, places)
    return split.flatten(2).transpose(1, 2).float()


def matrices(module: Any) -> Tensor:
    """The weights as (groups, outputs of a group, features of a group), in the order of ``input_rows``."""
    weight: Tensor = module.weight.detach()
    if isinstance(module, nn.Linear):
        return weight.unsqueeze(0)
    if isinstance(module, _ConvTransposeNd):  # (inputs, outputs of a group, *kernel): what it spreads, read from the output's side
        weight = weight.flip(tuple(range(2, weight.ndim)))
    split: Tensor = weight.unflatten(0, (module.groups, -1))
    return (split.transpose(1, 2) if isinstance(module, _ConvTransposeNd) else split).flatten(3).flatten(2)


def set_matrices(module: Any, found: Tensor) -> None:
    """Write ``found``, in the form of ``matrices``, into the layer's weights."""
    weight = module.weight
    if isinstance(module, _ConvTransposeNd):
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


def _batched(module: Any, x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.ndim == module.weight.ndim - 1 else x


def _padded(module: Any, x: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)


def _stuffed(module: Any, x: Tensor) -> Tensor:
    """The input of the ordinary convolution that a transposed one is: zeros between the samples and around them."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[EVERY + tuple(slice(None, None, step) for step in module.stride)] = x
    pads: list[int] = []
    for kernel, apart, pad, extra in zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True):
        pads = [apart * (kernel - 1) - pad, apart * (kernel - 1) - pad + extra, *pads]
    return F.pad(spread, pads)
