"""Blocks that write in place, gather and scatter, compute weights, share layers, or leave torch's own operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.composing.attention import pictures, tokens
from tests.passes.composing.blocks import Block, Made, block, holding


@block
def in_place(c: int, s: int, v: int) -> Made | None:
    if c < 4:
        return None

    def run(x: Tensor, f: nn.Module) -> Any:
        y = f(x)
        if v == 0:
            y += x
        elif v == 1:
            y[:, :2] = x[:, 2:4]
        elif v == 2:
            y[:, ::2] *= 2.0
        elif v == 3:
            half = y[:, 1:]
            half.mul_(0.5).add_(x[:, 1:])
        elif v == 4:
            y[:, [0, 2]] += x[:, [1, 3]]
        elif v == 5:
            y[..., 0] = 0.0
            y[:, -1].relu_()
        else:
            x = x.clone()
            x[:, 1:3] = y[:, :2].sigmoid()
            return x
        return y

    return Block(run, nn.Conv2d(c, c, 1)), c, s


@block
def written_buffer(c: int, s: int, v: int) -> Made:
    """A tensor made in forward and filled in pieces."""

    def run(x: Tensor, f: nn.Module, g: nn.Module) -> Any:
        n, k, h, w = x.shape
        out = x.new_zeros(n, 7, h, w) if v % 2 else torch.zeros(n, 7, h, w, device=x.device, dtype=x.dtype)
        out[:, :3] = f(x)
        out[:, 3:] = g(x)
        return out

    return Block(run, nn.Conv2d(c, 3, 1), nn.Conv2d(c, 4, 1)), 7, s


@block
def gathered(c: int, s: int, v: int) -> Made:
    held = holding(order=torch.randperm(c), pixels=torch.randperm(s * s), into=torch.arange(c) // 2)

    def run(x: Tensor, f: nn.Module, held: Any) -> Any:
        y = f(x)
        if v == 0:
            return y.gather(1, held.order.view(1, -1, 1, 1).expand(y.shape[0], -1, s, s))
        if v == 1:
            return y.flatten(2)[:, :, held.pixels].view(y.shape)
        if v == 2:
            return torch.zeros_like(y).index_add(1, held.order, y)
        if v == 3:
            return torch.zeros_like(y).scatter_add(1, held.into.view(1, -1, 1, 1).expand_as(y), y)
        if v == 4:
            best = y.flatten(2).mean(1).topk(max(s * s // 2, 1), dim=-1).indices
            kept = y.flatten(2).gather(2, best.unsqueeze(1).expand(-1, y.shape[1], -1))
            return y + kept.mean(2)[:, :, None, None]
        if v == 5:
            return torch.zeros_like(y).index_copy(1, held.order, y)
        return torch.take_along_dim(y, held.order[None, :, None, None], 1)

    return Block(run, nn.Conv2d(c, c, 1), held), c, s


@block
def chosen(c: int, s: int, v: int) -> Made:
    """Channels masked by a buffer, by values, by position."""
    held = holding(mask=torch.arange(c) % 3 != 1, soft=torch.rand(c, 1, 1))

    def run(x: Tensor, held: Any) -> Any:
        if v % 4 == 0:
            return torch.where(held.mask.view(1, -1, 1, 1), x, x * 0.5)
        if v % 4 == 1:
            return x.masked_fill(~held.mask[:, None, None], 0.0)
        if v % 4 == 2:
            return x * held.soft + torch.where(x > 0.1, x, torch.zeros_like(x))
        return x * (torch.arange(x.shape[1], device=x.device) % 2).view(1, -1, 1, 1)

    return Block(run, held), c, s


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-2, 2) ** 3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * 3 * x.clamp(-2, 2) ** 2


@block
def own_function(c: int, s: int, v: int) -> Made:
    return Block(lambda x, f: Cubed.apply(f(x)) + (x if v % 2 else 0.0), nn.Conv2d(c, c, 1)), c, s


@block
def computed_weight(c: int, s: int, v: int) -> Made:
    norm = (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm)[v % 2]
    layer = nn.Conv2d(c, 4 + v, 3 if v < 3 else 1, padding=1 if v < 3 else 0)
    if v > 4:
        return Block(lambda x, f: F.conv2d(x, f.weight.tanh(), f.bias), nn.Conv2d(c, 4 + v, 1)), 4 + v, s
    return norm(layer), 4 + v, s


@block
def shared_norm(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, a: nn.Module, b: nn.Module, norm: nn.Module) -> Any:
        one, two = norm(a(x)), norm(b(x))
        return one + two if v % 2 else torch.cat([one, two.relu()], 1)

    o = 3 + v
    return Block(run, nn.Conv2d(c, o, 1), nn.Conv2d(c, o, 3, padding=1), nn.BatchNorm2d(o)), o if v % 2 else 2 * o, s


@block
def film(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, f: nn.Module) -> Any:
        both = f(x.mean((2, 3)))
        gain, shift = both.chunk(2, 1) if v % 2 else (both[:, :c], both[:, c:])
        return x * (1 + gain[:, :, None, None]) + shift.view(*shift.shape, 1, 1)

    return Block(run, nn.Linear(c, 2 * c)), c, s


@block
def modulated(c: int, s: int, v: int) -> Made:
    """A kernel for each sample, applied with the batch as groups, as in StyleGAN 2."""
    o = 3 + v
    held = holding(weight=nn.Parameter(torch.randn(1, o, c, 1, 1)))

    def run(x: Tensor, style: nn.Module, held: Any) -> Any:
        n, k, h, w = x.shape
        weight = held.weight * style(x.mean((2, 3))).view(n, 1, k, 1, 1)
        y = F.conv2d(x.reshape(1, n * k, h, w), weight.view(n * o, k, 1, 1), groups=n)
        return y.view(n, o, h, w)

    return Block(run, nn.Linear(c, c), held), o, s


@block
def spectral(c: int, s: int, v: int) -> Made:
    held = holding(real=nn.Parameter(torch.randn(c, 4 + v)), imaginary=nn.Parameter(torch.randn(c, 4 + v)))

    def run(x: Tensor, held: Any) -> Any:
        y = torch.fft.rfft2(x)
        y = torch.einsum("bcxy,co->boxy", y, torch.complex(held.real, held.imaginary))
        return torch.fft.irfft2(y, s=x.shape[-2:])

    return Block(run, held), 4 + v, s


@block
def experts(c: int, s: int, v: int) -> Made:
    """Soft routing between three layers, their weights in one parameter."""
    o = 3 + v
    held = holding(bank=nn.Parameter(torch.randn(3, c, o)), bias=nn.Parameter(torch.randn(3, o)))

    def run(x: Tensor, router: nn.Module, held: Any) -> Any:
        y = tokens(x)
        share = router(y).softmax(-1)
        if v % 2:
            every = torch.einsum("btc,eco->bteo", y, held.bank) + held.bias
            return pictures((every * share.unsqueeze(-1)).sum(2), x)
        kernel = torch.einsum("be,eco->bco", share.mean(1), held.bank)
        return pictures(torch.bmm(y, kernel), x)

    return Block(run, nn.Linear(c, 3), held), o, s


@block
def spread(c: int, s: int, v: int) -> Made | None:
    """Outer products of two narrow maps, flattened to channels."""
    a, b = 2 + v % 2, 3

    def run(x: Tensor, f: nn.Module, g: nn.Module) -> Any:
        y = f(x).unsqueeze(2) * g(x).unsqueeze(1)
        return y.flatten(1, 2) if v < 4 else torch.einsum("bihw,bjhw->bijhw", f(x), g(x)).reshape(x.shape[0], a * b, s, s)

    return Block(run, nn.Conv2d(c, a, 1), nn.Conv2d(c, b, 1)), a * b, s


@block
def maxout(c: int, s: int, v: int) -> Made:
    o = 3 + v % 3

    def run(x: Tensor, f: nn.Module) -> Any:
        y = f(x)
        y = y.view(y.shape[0], o, 2, s, s) if v % 2 else y.unflatten(1, (2, o)).transpose(1, 2)
        return y.amax(2) if v < 4 else y[:, :, 0] * y[:, :, 1]

    return Block(run, nn.Conv2d(c, 2 * o, 1)), o, s


@block
def nearest_code(c: int, s: int, v: int) -> Made:
    """Each pixel's vector is replaced by the nearest of eight, and passes its gradient on."""
    held = holding(codes=nn.Parameter(torch.randn(8, c)))

    def run(x: Tensor, held: Any) -> Any:
        y = tokens(x)
        if v % 2:
            weights = -torch.cdist(y, held.codes.unsqueeze(0))
        else:
            weights = y @ held.codes.t()
        return pictures(weights.softmax(-1) @ held.codes, x)

    return Block(run, held), c, s
