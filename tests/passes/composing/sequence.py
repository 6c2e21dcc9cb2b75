"""Blocks over tokens, rows and volumes: other convolutions, norms, recurrent layers, positions, folds, and code that reads shapes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.composing.attention import pictures, tokens
from tests.passes.composing.blocks import Block, Made, block, holding


@block
def conv_rows(c: int, s: int, v: int) -> Made:
    """Dilated one-dimensional convolution over the pixels in a row, its overhang cut off, gated as in WaveNet."""
    g = 2 if c % 2 == 0 and v % 2 else 1

    def run(x: Tensor, filters: nn.Module, out: nn.Module) -> Any:
        y = filters(x.flatten(2))
        y = y[:, :, : -2 * (1 + v % 2)] if v < 4 else y[..., : s * s]
        a, b = y.chunk(2, 1)
        return out(a.tanh() * b.sigmoid()).view(x.shape[0], -1, s, s) + x

    layer = nn.Conv1d(c, 4 * (1 + v % 3), 3, padding=2 * (1 + v % 2), dilation=1 + v % 2, groups=g)
    return Block(run, layer, nn.Conv1d(2 * (1 + v % 3), c, 1)), c, s


@block
def conv_volume(c: int, s: int, v: int) -> Made:
    g = 2 if c % 2 == 0 and v % 2 else 1

    def run(x: Tensor, f: nn.Module) -> Any:
        y = f(torch.stack([x, x.flip(3)], 2))
        return y.squeeze(2) if v % 3 == 0 else y.amax(2)

    o = 2 * (2 + v)
    layer = nn.Conv3d(c, o, (2 if v % 3 == 0 else 1, 3, 3), padding=(0, 1, 1), groups=g)
    return Block(run, nn.Sequential(layer, nn.BatchNorm3d(o))), o, s


@block
def transposed_rows(c: int, s: int, v: int) -> Made | None:
    if s < 2 or c % 2:
        return None

    def run(x: Tensor, down: nn.Module, up: nn.Module) -> Any:
        return up(F.relu(down(x.flatten(2)))).view(x.shape)

    return Block(run, nn.Conv1d(c, 4 + 2 * v, 2, stride=2), nn.ConvTranspose1d(4 + 2 * v, c, 2, stride=2, groups=1 + v % 2)), c, s


@block
def recurrent(c: int, s: int, v: int) -> Made:
    h, both = 3 + v % 3, bool(v % 2)
    make = (nn.LSTM, nn.GRU, nn.RNN)[v % 3]
    layer = make(c, h, num_layers=1 + v // 4, bidirectional=both, batch_first=v < 5)

    def run(x: Tensor, f: nn.Module, out: nn.Module) -> Any:
        y = tokens(x)
        y = f(y)[0] if v < 5 else f(y.transpose(0, 1))[0].transpose(0, 1)
        return pictures(out(y), x)

    return Block(run, layer, nn.Linear(h * (2 if both else 1), 5)), 5, s


@block
def last_state(c: int, s: int, v: int) -> Made:
    """The picture scaled by the state in which a recurrent layer ends."""

    def run(x: Tensor, f: nn.Module, out: nn.Module) -> Any:
        hidden = f(tokens(x))[1]
        hidden = hidden[0] if v % 2 else hidden
        y = torch.cat([hidden[-2], hidden[-1]], 1) if v < 4 else hidden.transpose(0, 1).flatten(1)
        return x * out(y)[..., None, None]

    return Block(run, (nn.LSTM if v % 2 else nn.GRU)(c, 3, bidirectional=True, batch_first=True), nn.Linear(6, c)), c, s


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


@block
def token_norm(c: int, s: int, v: int) -> Made:
    norm = (nn.LayerNorm(c), nn.RMSNorm(c), RootMeanSquare(c), nn.LayerNorm((c,), elementwise_affine=False))[v % 4]
    return Block(lambda x, f: f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm), c, s


@block
def mlp_mixer(c: int, s: int, v: int) -> Made:
    """Tokens are mixed by a layer over positions, channels by one over channels."""

    def run(x: Tensor, over: nn.Module, first: nn.Module, second: nn.Module, gamma: Any) -> Any:
        y = over(x.flatten(2)).transpose(1, 2) + tokens(x)
        return pictures(y + gamma.scale * second(F.gelu(first(y))), x)

    return Block(run, nn.Linear(s * s, s * s), nn.Linear(c, 3 + v), nn.Linear(3 + v, c), holding(scale=nn.Parameter(torch.rand(c)))), c, s


@block
def positions(c: int, s: int, v: int) -> Made:
    table, row = nn.Parameter(torch.randn(1, s * s, c)), nn.Parameter(torch.randn(1, c, s, 1))
    held = holding(table=table, row=row, fixed=torch.randn(1, c, s, s), where=torch.arange(s * s))
    looked_up = nn.Embedding(s * s, c)

    def run(x: Tensor, held: Any, looked_up: nn.Module) -> Any:
        if v % 4 == 0:
            return pictures(tokens(x) + held.table, x)
        if v % 4 == 1:
            return x + held.fixed
        if v % 4 == 2:
            return x + held.row
        where = held.where if v < 4 else torch.arange(s * s, device=x.device)
        return pictures(tokens(x) + looked_up(where), x)

    return Block(run, held, looked_up), c, s


@block
def class_token(c: int, s: int, v: int) -> Made:
    """A token in front, which then scales the others."""
    held = holding(token=nn.Parameter(torch.randn(1, 1, c)))

    def run(x: Tensor, f: nn.Module, held: Any) -> Any:
        y = torch.cat([held.token.expand(x.shape[0], -1, -1), tokens(x)], dim=1)
        y = y + f(y)
        return pictures(y[:, 1:] * y[:, :1].sigmoid() if v % 2 else y[:, 1:] + y[:, 0].unsqueeze(1), x)

    return Block(run, nn.Linear(c, c), held), c, s


@block
def patches(c: int, s: int, v: int) -> Made | None:
    """Unfold to patches, mix what lies in each, fold back."""
    if s % 2 or c > 16:
        return None

    def run(x: Tensor, f: nn.Module) -> Any:
        y = F.unfold(x, 2, stride=2)
        y = f(y) if v % 2 else f(y).relu()
        return F.fold(y, (s, s), 2, stride=2)

    return Block(run, nn.Conv1d(4 * c, 4 * c, 1, groups=c if v > 3 else 1)), c, s


@block
def neighbours(c: int, s: int, v: int) -> Made | None:
    """Each pixel a weighted sum of the nine around it, the weights computed: one kernel for a group of channels."""
    g = 2 if c % 2 == 0 and v % 2 else 1
    if c > 16:
        return None

    def run(x: Tensor, kernel: nn.Module) -> Any:
        n, k, h, w = x.shape
        weights = kernel(x).view(n, g, 1, 9, h, w).softmax(3)
        around = F.unfold(x, 3, padding=1).view(n, g, k // g, 9, h, w)
        return (weights * around).sum(3).view(n, k, h, w)

    return Block(run, nn.Conv2d(c, 9 * g, 1)), c, s


@block
def by_shape(c: int, s: int, v: int) -> Made:
    """Python code asks for sizes and goes one of two ways."""

    def run(x: Tensor, f: nn.Module, g: nn.Module) -> Any:
        y = f(x) if x.shape[1] > 8 else g(x)
        if x.size(-1) % 2 == 0 and v % 2:
            y = F.interpolate(F.avg_pool2d(y, 2), size=x.shape[-2:])
        elif v % 2:
            y = F.pad(y, (0, 1, 0, 1))[..., :s, :s]
        return torch.cat([y[:, i : i + 1] * (i + 1) for i in range(y.shape[1])], 1) if v > 4 else y

    return Block(run, nn.Conv2d(c, 4, 1), nn.Conv2d(c, 4, 3, padding=1)), 4, s
