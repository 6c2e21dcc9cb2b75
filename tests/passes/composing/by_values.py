"""Blocks whose code looks at values: which module runs, how often, and on which rows. They cannot be traced; what they call can."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.composing.blocks import Block, Made, block, conv_norm


def inner(c: int, h: int, o: int, v: int) -> nn.Module:
    """Something to prune with an interface, of one of several kinds."""
    if v % 4 == 0:
        return nn.Sequential(nn.Conv2d(c, h, 1), nn.ReLU(), nn.Conv2d(h, o, 1))
    if v % 4 == 1:
        return nn.Sequential(conv_norm(c, h), nn.Conv2d(h, h, 3, padding=1, groups=h), nn.Hardswish(), nn.Conv2d(h, o, 1))
    if v % 4 == 2:
        return Block(lambda x, a, b: b(torch.cat([a(x), x], 1).relu()), nn.Conv2d(c, h, 1), nn.Conv2d(h + c, o, 1))
    return Block(lambda x, a, n, b: b(F.gelu(n(a(x)))), nn.Conv2d(c, 2 * h, 1), nn.GroupNorm(2, 2 * h), nn.Conv2d(2 * h, o, 1))


class Expert(nn.Module):
    def __init__(self, c: int, h: int, gated: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(c, 2 * h if gated else h), nn.Linear(h, c)
        self.gated = gated

    def forward(self, x: Tensor) -> Any:
        y = self.up(x)
        if self.gated:
            gate, y = y.chunk(2, -1)
            return self.down(F.silu(gate) * y)
        return self.down(y.tanh())


@block
def looped_experts(c: int, s: int, v: int) -> Made:
    """Each pixel goes to the experts that its router ranks first."""

    def run(x: Tensor, router: nn.Module, *experts: nn.Module) -> Any:
        n, k, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2).reshape(-1, k)
        share, chosen = router(tokens).softmax(-1).topk(1 + v % 2)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(experts):
            row, place = torch.where(chosen == i)
            if v % 3 == 0 and row.numel() == 0:
                continue
            if v % 3 == 1 and not (chosen == i).any():
                continue
            if v % 3 == 2 and len(row.tolist()) == 0:
                continue
            out.index_add_(0, row, expert(tokens[row]) * share[row, place].unsqueeze(1))
        return out.view(n, h * w, k).transpose(1, 2).reshape(n, k, h, w)

    return Block(run, nn.Linear(c, 3), *(Expert(c, 5 + v, v % 2 == 0) for _ in range(3))), c, s


@block
def one_of_two(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, first: nn.Module, second: nn.Module) -> Any:
        return first(x) if x.mean() > 0 else second(x)

    return Block(run, inner(c, 6, 4 + v, v), inner(c, 9, 4 + v, v + 1)), 4 + v, s


@block
def rows_that_pass(c: int, s: int, v: int) -> Made:
    """Pictures that pass a gate go through more layers."""

    def run(x: Tensor, light: nn.Module, heavy: nn.Module) -> Any:
        y = light(x)
        keep = x.mean((1, 2, 3)) > -0.3
        if not keep.any():
            return y
        return y.index_add(0, keep.nonzero()[:, 0], heavy(x[keep]))

    return Block(run, inner(c, 5, 4 + v, v), inner(c, 8, 4 + v, v + 2)), 4 + v, s


@block
def until_done(c: int, s: int, v: int) -> Made:
    """A step that is repeated as long as the result is small; its module is called on the same channels each time."""

    def run(x: Tensor, step: nn.Module) -> Any:
        y = x
        for _ in range(1 + v % 3):
            y = x + 0.5 * step(y)
            if bool((y.abs().amax() > 1e3).item()):
                break
        return y

    return Block(run, inner(c, 7, c, v)), c, s


class Mask(nn.Module):
    """A mask that is left out where it masks nothing, and layers that code around reads as well."""

    def __init__(self, c: int, v: int) -> None:
        super().__init__()
        self.body, self.read, self.kind = inner(c, 6, c, v), nn.Sequential(nn.Conv2d(c, 5, 1), nn.ReLU(), nn.Conv2d(5, c, 1)), v % 4

    def forward(self, x: Tensor) -> Any:
        mask: Tensor | None = x.abs().amax(1, keepdim=True) > 1e4
        if not mask.any():  # type: ignore[union-attr]
            mask = None
        y = self.body(x) + self.read(x)
        layer: Any = self.read[0]
        if self.kind == 1:
            y = y + F.conv2d(F.conv2d(x, layer.weight), self.read[2].weight)  # type: ignore[arg-type]
        elif self.kind == 2:
            y = y * layer.out_channels**-0.5
        elif self.kind == 3:
            y = y + layer(x).mean(1, keepdim=True)
        return y if mask is None else y.masked_fill(mask, 0.0)


@block
def mask_left_out(c: int, s: int, v: int) -> Made:
    return Mask(c, v), c, s


class Tower(nn.Module):
    """A part with a module in it that cannot be traced and has parts of its own."""

    def __init__(self, c: int, v: int) -> None:
        super().__init__()
        self.before, self.after = conv_norm(c, 6), nn.Conv2d(6, 4 + v, 1)
        made = looped_experts(6, 1, v)
        assert made is not None
        self.middle = made[0]

    def forward(self, x: Tensor) -> Any:
        return self.after(self.middle(self.before(x)))


@block
def parts_in_parts(c: int, s: int, v: int) -> Made:
    return Block(lambda x, f: f(x) if x.abs().max() < 1e6 else f(x.tanh()), Tower(c, v)), 4 + v, s
