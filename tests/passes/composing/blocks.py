"""Blocks that hypothesis composes networks from. Each takes and gives (batch, channels, side, side)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """``run(x, *layers)`` as a module."""

    def __init__(self, run: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.run(x, *self.layers)


Made = tuple[nn.Module, int, int]
Maker = Callable[[int, int, int], Made | None]
BLOCKS: dict[str, Maker] = {}


def block(make: Maker) -> Maker:
    """Enter ``make(channels, side, variant) -> (module, channels, side)``, None where it does not fit."""
    BLOCKS[make.__name__] = make
    return make


def holding(**tensors: Tensor) -> nn.Module:
    """A module that holds parameters and buffers under these names."""
    held = nn.Module()
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            held.register_parameter(name, tensor)
        else:
            held.register_buffer(name, tensor)
    return held


def conv_norm(i: int, o: int, k: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, **options), nn.BatchNorm2d(o), nn.ReLU())


@block
def conv(c: int, s: int, v: int) -> Made:
    return conv_norm(c, 4 + v, 3 if v % 2 else 1), 4 + v, s


@block
def strided(c: int, s: int, v: int) -> Made | None:
    return (conv_norm(c, 5 + v, stride=2), 5 + v, s // 2) if s >= 4 else None


@block
def bare_conv(c: int, s: int, v: int) -> Made:
    return nn.Conv2d(c, c, 1, bias=bool(v % 2)), c, s


@block
def grouped(c: int, s: int, v: int) -> Made | None:
    g = 2 + v % 3
    return (nn.Conv2d(c, g * (1 + v), 3, padding=1, groups=g), g * (1 + v), s) if c % g == 0 else None


@block
def depthwise(c: int, s: int, v: int) -> Made:
    m = 1 + v % 3
    return nn.Sequential(nn.Conv2d(c, c * m, 3, padding=1, groups=c), nn.BatchNorm2d(c * m)), c * m, s


@block
def transposed(c: int, s: int, v: int) -> Made | None:
    g = 2 if v % 2 and c % 2 == 0 else 1
    return (nn.ConvTranspose2d(c, 2 * (2 + v), 2, stride=2, groups=g), 2 * (2 + v), 2 * s) if s <= 4 else None


@block
def squeeze_excitation(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, a: nn.Module, b: nn.Module) -> Any:
        n, k, _, _ = x.size()
        y = torch.sigmoid(b(F.relu(a(x.mean((2, 3))))))
        return x * (y.view(n, k, 1, 1) if v % 2 else y[..., None, None])

    return Block(run, nn.Linear(c, 3 + v), nn.Linear(3 + v, c)), c, s


@block
def shuffle(c: int, s: int, v: int) -> Made | None:
    g = 2 + v % 2
    if c % g:
        return None

    def run(x: Tensor) -> Any:
        n, k, h, w = x.shape
        return x.view(n, g, k // g, h, w).transpose(1, 2).reshape(n, k, h, w)

    return Block(run) if v < 4 else nn.ChannelShuffle(g), c, s


@block
def permuted(c: int, s: int, v: int) -> Made:
    order = torch.randperm(c, generator=torch.Generator().manual_seed(v))

    def run(x: Tensor, held: Any) -> Any:
        return x[:, held.order] if v % 2 else x.index_select(1, held.order)

    return Block(run, holding(order=order)), c, s


@block
def glu(c: int, s: int, v: int) -> Made:
    return Block(lambda x, f: F.glu(f(x), 1), nn.Conv2d(c, 2 * (2 + v), 1)), 2 + v, s


@block
def gate(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, a: nn.Module, b: nn.Module) -> Any:
        value, switch = a(x).split([c, c], 1)
        return value * b(switch).sigmoid() + x

    return Block(run, nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 3, padding=1, groups=c)), c, s


@block
def split(c: int, s: int, v: int) -> Made | None:
    cut = 1 + v % max(c - 1, 1)
    if c < 3:
        return None

    def run(x: Tensor, f: nn.Module) -> Any:
        a, b = torch.split(x, [cut, c - cut], 1)
        return torch.cat([f(b), a] if v % 2 else [a, f(b)], 1)

    return Block(run, conv_norm(c - cut, 3 + v)), cut + 3 + v, s


@block
def halves(c: int, s: int, v: int) -> Made | None:
    if c % 2:
        return None

    def run(x: Tensor) -> Any:
        a, b = x.chunk(2, 1)
        return (a + b, a * b.sigmoid(), torch.maximum(a, b.flip(1)))[v % 3]

    return Block(run), c // 2, s


@block
def sliced(c: int, s: int, v: int) -> Made | None:
    if c < 5:
        return None
    pick = (slice(1, -1), slice(None, None, 2), slice(-4, None), slice(2, 5))[v % 4]
    return Block(lambda x: torch.cat([x[:, pick], x.relu()], 1) if v > 3 else x[:, pick]), len(range(c)[pick]) + (c if v > 3 else 0), s


@block
def padded(c: int, s: int, v: int) -> Made:
    before, after = v % 3, v // 3
    return Block(lambda x: F.pad(x, (0, 0, 0, 0, before, after))), c + before + after, s


@block
def moved(c: int, s: int, v: int) -> Made:
    return Block(lambda x: (x.flip(1), x.roll(3, 1), torch.roll(x, (1, -2), (2, 1)), x.flip((1, 3)))[v % 4]), c, s


@block
def pixel(c: int, s: int, v: int) -> Made | None:
    if v % 2:
        return (Block(lambda x: F.pixel_unshuffle(x, 2)), 4 * c, s // 2) if s % 2 == 0 and c <= 8 and s > 1 else None
    return (Block(lambda x: F.pixel_shuffle(x, 2)), c // 4, 2 * s) if c % 4 == 0 and c > 4 and s <= 4 else None


@block
def scaled(c: int, s: int, v: int) -> Made:
    held = holding(gain=nn.Parameter(torch.randn(c, 1, 1)), shift=nn.Parameter(torch.randn(1, c, 1, 1)))
    return Block(lambda x, p: x * p.gain + p.shift, held), c, s


@block
def activation(c: int, s: int, v: int) -> Made:
    return (
        (
            nn.PReLU(c),
            nn.SiLU(),
            nn.LeakyReLU(0.1),
            nn.InstanceNorm2d(c, affine=True),
            nn.Dropout(0.2),
            nn.Sigmoid(),
            nn.MaxPool2d(3, 1, 1),
        )[v % 7],
        c,
        s,
    )


@block
def normed(c: int, s: int, v: int) -> Made | None:
    g = (1, 2, c)[v % 3]
    return (nn.GroupNorm(g, c), c, s) if c % g == 0 else None


@block
def channels_last(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, a: nn.Module, b: nn.Module) -> Any:
        return b(F.gelu(a(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    return Block(run, nn.Linear(c, 4 + v), nn.Linear(4 + v, c)), c, s


@block
def windows(c: int, s: int, v: int) -> Made | None:
    if s % 2:
        return None

    def run(x: Tensor, f: nn.Module) -> Any:
        n, k, h, w = x.shape
        y = x.view(n, k, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, k)
        y = f(y).view(n, h // 2, w // 2, 2, 2, k).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(n, k, h, w)

    return Block(run, nn.Linear(c, c)), c, s


@block
def stacked(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, f: nn.Module) -> Any:
        both = torch.stack([x, f(x)], 1 + v % 2)
        first, second = both.unbind(1 + v % 2)
        return first - second if v < 4 else both.sum(1 + v % 2)

    return Block(run, nn.Conv2d(c, c, 3, padding=1)), c, s


@block
def repeated(c: int, s: int, v: int) -> Made | None:
    return (Block(lambda x: x.repeat(1, 2, 1, 1) if v % 2 else x.repeat_interleave(2, 1)), 2 * c, s) if c <= 8 else None
