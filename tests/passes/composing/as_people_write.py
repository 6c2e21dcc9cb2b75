"""Blocks written as people write them: caches, memos of the last shape, computed weights, keyword calls, ``out=``, aliases, branches on
the mode and the dtype, subclassed layers, and sizes that may be one."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.passes.composing.blocks import Block, Made, block


@functools.lru_cache(maxsize=32)
def plan_of(sizes: tuple[int, ...], groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What einops does: a recipe by sizes, kept for the next call."""
    n, c, h, w = sizes
    return (n, groups, c // groups, h * w), (n, c, h, w)


@functools.lru_cache(maxsize=32)
def step(length: int) -> float:
    return 1.0 / (length + 1)


TABLES: dict[Any, Tensor] = {}


@block
def cached(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, f: nn.Module) -> Any:
        if v % 3 == 0 and c % 2 == 0:
            folded, back = plan_of(tuple(x.shape), 2)
            return f(x.reshape(folded).relu().reshape(back))
        if v % 3 == 1:
            return f(x + torch.arange(x.shape[-1], device=x.device) * step(x.shape[-1]))
        key = x.shape[2:]
        if key not in TABLES:
            TABLES[key] = torch.linspace(0, 1, x.shape[-1]).expand(x.shape[2:])
        return f(x + TABLES[key])

    return Block(run, nn.Conv2d(c, 4 + v, 1)), 4 + v, s


class Memo(nn.Module):
    """A grid that is made again where the shape changed; a table by size; the last shape alone."""

    def __init__(self, c: int, o: int, kind: int) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv2d(c, o, 3, padding=1), kind
        self.shape: Any = None
        self.grid: Any = None
        self.tables: dict[Any, Any] = {}

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.kind == 0:
            if self.shape != y.shape[2:]:
                self.grid, self.shape = torch.linspace(0, 1, y.shape[-1], device=y.device), y.shape[2:]
            return y * (1 + self.grid)
        if self.kind == 1:
            size = y.shape[-2], y.shape[-1]
            if size not in self.tables:
                self.tables[size] = torch.arange(size[0] * size[1], dtype=y.dtype, device=y.device).view(size) / 64
            return y + self.tables[size]
        if self.grid is None or self.grid.shape[-1] < y.shape[-1]:
            self.grid = torch.arange(y.shape[-1], device=y.device) / 8
        return y.sigmoid() * self.grid[: y.shape[-1]]


@block
def memo(c: int, s: int, v: int) -> Made:
    return Memo(c, 4 + v, v % 3), 4 + v, s


class ComputedConv(nn.Module):
    """A 1 x 1 convolution whose weight is computed from its parameters at every call."""

    def __init__(self, c: int, o: int, kind: int) -> None:
        super().__init__()
        self.weight, self.bias, self.kind = nn.Parameter(torch.randn(o, c, 1, 1) * 0.3), nn.Parameter(torch.randn(o)), kind
        self.gain = nn.Parameter(torch.rand(o, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Any:
        w = self.weight
        if self.kind == 0:
            return F.conv2d(x, w.exp() * 0.2, self.bias)
        if self.kind == 1:
            return F.conv2d(x, F.softplus(w) * 0.3, self.bias)
        if self.kind == 2:
            return F.conv2d(x, w + torch.eye(w.shape[0], w.shape[1])[:, :, None, None], self.bias)
        if self.kind == 3:
            return F.conv2d(x, self.gain * w, self.bias)
        if self.kind == 4:
            return F.conv2d(x, w.tanh(), self.bias.abs())
        if self.kind == 5:
            return torch.einsum("oi,nihw->nohw", w[:, :, 0, 0], x) + self.bias.view(1, -1, 1, 1)
        return F.conv2d(x, w * 1.5 + 0.0, self.bias.view(-1))


@block
def computed(c: int, s: int, v: int) -> Made:
    return ComputedConv(c, 5 + v, v), 5 + v, s


@block
def normed_weight(c: int, s: int, v: int) -> Made:
    """Weight and spectral norm, in the form of parametrizations."""
    layer = nn.Conv2d(c, 4 + v, 3, padding=1)
    norm = parametrizations.weight_norm if v % 2 else parametrizations.spectral_norm
    made: nn.Module = norm(layer)
    return nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU(), made), 4 + v, s


@block
def by_keyword(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, f: Any, g: nn.Module) -> Any:
        y = F.conv2d(input=x, weight=f.weight, bias=f.bias, padding=f.padding)
        if v == 0:
            y = torch.mul(input=y, other=torch.sigmoid(input=y))
        elif v == 1:
            y = torch.cat(tensors=[y, x], dim=1)[:, : y.size(dim=1)]
        elif v == 2:
            y = y - torch.mean(input=y, dim=(2, 3), keepdim=True)
        elif v == 3:
            flat = torch.flatten(input=y, start_dim=2)
            y = torch.bmm(input=flat, mat2=torch.softmax(input=flat.transpose(dim0=1, dim1=2) @ flat, dim=2)).view_as(other=y)
        elif v == 4:
            y = torch.transpose(input=torch.transpose(input=y, dim0=1, dim1=3).relu(), dim0=1, dim1=3)
        elif v == 5:
            y = F.interpolate(input=F.avg_pool2d(input=y, kernel_size=1), size=y.shape[2:], mode="nearest")
        else:
            y = torch.where(condition=y > 0, input=y, other=y * 0.1)
        return g(input=y)

    return Block(run, nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, 6, 1)), 6, s


@block
def written_out(c: int, s: int, v: int) -> Made:
    """``out=``, which autograd takes of what needs no gradient alone."""

    def run(x: Tensor, f: nn.Module, g: nn.Module) -> Any:
        a, b = f(x).detach(), g(x).detach()
        made = torch.empty_like(a)
        if v % 3 == 0:
            torch.add(a, b, out=made)
            return made
        if v % 3 == 1:
            return torch.cat([a, b], 1, out=a.new_empty(a.shape[0], 2 * a.shape[1], *a.shape[2:]))[:, : a.shape[1]]
        torch.mul(a, b, out=made)
        return made

    return Block(run, nn.Conv2d(c, 5, 1), nn.Conv2d(c, 5, 1)), 5, s


@block
def aliased(c: int, s: int, v: int) -> Made:
    """The same tensor under two names, one of them written to."""
    kinds = (nn.Identity(), nn.Dropout(0.0), nn.Identity())

    def run(x: Tensor, f: nn.Module, i: nn.Module) -> Any:
        y = f(x)
        z = i(y) if v % 3 < 2 else F.dropout(y, 0.5, training=False)
        if v < 3:
            y.mul_(0.5)
        elif v < 5:
            y += 1.0
        else:
            y[:, 0].zero_()
        return z + y

    return Block(run, nn.Conv2d(c, 5, 1), kinds[v % 3]).eval(), 5, s


class Modes(nn.Module):
    """Branches on the mode."""

    def __init__(self, c: int, kind: int) -> None:
        super().__init__()
        self.conv, self.extra, self.kind = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1), kind

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.training:
            if self.kind % 3 == 0:
                return y + torch.randn_like(y) * 0.1
            if self.kind % 3 == 1:
                return y + self.extra(x) * 0.3
            return y * (1 + y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.5))
        return y if self.kind < 4 else y.relu()


@block
def training_only(c: int, s: int, v: int) -> Made:
    return Modes(c, v), c, s


@block
def by_dtype(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, f: nn.Module) -> Any:
        y = f(x)
        if y.dtype in (torch.float16, torch.bfloat16):
            y = y.float()
        if v % 2:
            return y.to(x.dtype) + torch.finfo(y.dtype).eps
        return y.float().sigmoid().type_as(x) if x.dtype != torch.float64 else y.sigmoid()

    return Block(run, nn.Conv2d(c, 4 + v, 1)), 4 + v, s


class Standardised(nn.Conv2d):
    """Overrides what ``forward`` calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return super()._conv_forward(input, weight * 2.0, bias)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input) * 0.5 + input.mean()


class Channels(nn.LayerNorm):
    """Layer norm of (n, c, h, w), as ConvNeXt writes it."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input) + 0.1


@block
def subclassed(c: int, s: int, v: int) -> Made:
    if v % 4 == 0:
        return nn.Sequential(Standardised(c, 5, 3, padding=1), nn.ReLU()), 5, s
    if v % 4 == 1:
        return Block(lambda x, f: f(x.movedim(1, -1)).movedim(-1, 1), Scaled(c, 6)), 6, s
    if v % 4 == 2:
        return nn.Sequential(nn.Conv2d(c, 5, 1), Channels(5)), 5, s
    return nn.Sequential(nn.Conv2d(c, 5, 1), Shifted(5)), 5, s


@block
def folded(c: int, s: int, v: int) -> Made:
    """Batch and channels as one axis, and back, whatever their sizes."""

    def run(x: Tensor, f: nn.Module) -> Any:
        y = f(x).contiguous()  # behind a transpose a convolution gives channels last
        n, k, h, w = y.shape
        if v == 0:
            return F.avg_pool2d(y.view(n * k, 1, h, w), 1).view(n, k, h, w)
        if v == 1:
            z = y.reshape(n * k, -1)
            return (z - z.amax(1, keepdim=True)).reshape(n, k, h, w)
        if v == 2:
            return torch.relu(y.view(n, k * h * w)).view(n, k, h, w)
        if v == 3:
            return y.reshape(n, k, h * w).transpose(1, 2).reshape(n * h * w, k).relu().view(n, h * w, k).transpose(1, 2).view(n, k, h, w)
        if v == 4:
            return y.view(n, k, -1).unsqueeze(1).expand(n, 2, k, h * w).reshape(2 * n, k, h, w)[:n]
        if v == 5:
            return y.flatten(0, 1).view(-1, h * w).tanh().unflatten(0, (n, k)).unflatten(2, (h, w))
        return y.view(1, n * k, h, w).mul(2.0).view(-1, k, h, w)

    return Block(run, nn.Conv2d(c, 4 + v, 1)), 4 + v, s
