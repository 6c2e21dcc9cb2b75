"""Sequences of different lengths, rotary positions as complex numbers, latent attention, optional inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.passes.zoo.attention import Separate
from tests.passes.zoo.catalogue import add, tokens


@add("packed_lstm", lambda: (torch.randint(1, 11, (2, 6)), torch.tensor([4, 6])))
class PackedLstm(nn.Module):
    """Sequences are packed by their lengths; the last states of both directions and the mean of the outputs are read."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.rnn = nn.Embedding(11, 8, padding_idx=0), nn.LSTM(8, 10, 2, batch_first=True, bidirectional=True)
        self.a, self.head = nn.Linear(40, 9), nn.Linear(9, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(self.e(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        packed, (h, _) = self.rnn(packed)
        y, _ = pad_packed_sequence(packed, batch_first=True)
        return self.head(torch.relu(self.a(torch.cat([h[-2], h[-1], y.mean(1)], -1))))


@add("packed_gru", lambda: (torch.randn(6, 2, 12), torch.tensor([6, 4])))
class PackedGru(nn.Module):
    """Sorted already, time first; a layer between two recurrent ones works on the packed data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.GRU(12, 10), nn.RNN(10, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        first, _ = self.a(pack_padded_sequence(x, lengths))
        second, h = self.b(first)
        return self.head(h[0]), self.head(pad_packed_sequence(second)[0])


def turns(dim: int, end: int) -> Tensor:
    rates = 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim))
    angles = torch.outer(torch.arange(end).float(), rates)
    return torch.polar(torch.ones_like(angles), angles)


def turned(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table[None, :, None]).flatten(3).type_as(x)


@add("attention_rotary_complex", tokens())
class RotaryComplex(Separate):
    """Pairs of channels are complex numbers, turned by a complex table; two key heads serve four (Llama)."""

    def build(self) -> None:
        self.q, self.k, self.v, self.back = nn.Linear(20, 24), nn.Linear(20, 12), nn.Linear(20, 12), nn.Linear(24, 20)
        self.register_buffer("table", turns(6, 16), persistent=False)
        self.table: Tensor

    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, 6) for f in (self.q, self.k, self.v))
        q, k = turned(q, self.table[:n]), turned(k, self.table[:n])
        k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return y.transpose(1, 2).reshape(b, n, 24)


@add("attention_latent", tokens())
class LatentAttention(Separate):
    """Keys and values from a narrow latent, with a part of the head that is turned and shared by all heads (DeepSeek)."""

    def build(self) -> None:
        self.q, self.down, self.up, self.back = nn.Linear(20, 40), nn.Linear(20, 12), nn.Linear(8, 44), nn.Linear(20, 20)
        self.register_buffer("table", turns(4, 16), persistent=False)
        self.table: Tensor

    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        plain, turning = self.q(x).view(b, n, 4, 10).split([6, 4], -1)
        latent, shared = self.down(x).split([8, 4], -1)
        key, value = self.up(latent).view(b, n, 4, 11).split([6, 5], -1)
        shared = turned(shared.unsqueeze(2), self.table[:n]).expand(-1, -1, 4, -1)
        q, k = torch.cat([plain, turned(turning, self.table[:n])], -1), torch.cat([key, shared], -1)
        weights = torch.einsum("bshd,bthd->bsht", q, k) * 10**-0.5
        return torch.einsum("bsht,bthd->bshd", weights.softmax(-1), value).flatten(2)


@add("none_between_inputs", lambda: (torch.randn(2, 6, 12), None, torch.randn(2, 6, 12)))
class NoneBetween(nn.Module):
    """An optional input is left out by position."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> Any:
        h = self.a(x)
        if mask is not None:
            h = h * mask
        if other is not None:
            h = h + self.a(other)
        return self.head(F.relu(h))


@add("smallest_number", lambda: (torch.randn(2, 6, 12), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()))
class SmallestNumber(Separate):
    """What is masked gets the smallest number of the scores' own type."""

    def forward(self, x: Tensor, keep: Tensor) -> Any:  # type: ignore[override]
        x = self.front(x)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, 5).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1)
        scores.mul_(5**-0.5).masked_fill_(~keep[:, None, None, :], torch.finfo(scores.dtype).min)
        y = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return self.head(x + self.back(y.transpose(1, 2).reshape(b, n, 20)))
