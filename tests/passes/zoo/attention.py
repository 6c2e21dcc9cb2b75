"""Attention in the dialects that people write. Inputs are tokens (batch, length, 12) unless a network says otherwise."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.zoo.catalogue import Body, add, tokens


class Attention(nn.Module):
    """``mix`` between a layer in front and one behind; 4 heads of 5 on an embedding of 20."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back, self.head = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 4)
        self.build()

    def build(self) -> None:
        self.qkv = nn.Linear(20, 60)

    def mix(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        x = self.front(x)
        return self.head(x + self.back(self.mix(x)))


@add("attention_fused_literal", tokens())
class FusedLiteral(Attention):
    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 5).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-2, -1) * 5**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, n, 20)


@add("attention_fused_computed", tokens())
class FusedComputed(Attention):
    """Sizes and scale from the channel count of the input."""

    def mix(self, x: Tensor) -> Any:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q @ k.transpose(-2, -1)) * (c // 4) ** -0.5
        return (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c)


@add("attention_fused_chunk", tokens())
class FusedChunk(Attention):
    def mix(self, x: Tensor) -> Any:
        b, n, c = x.shape
        q, k, v = (t.view(b, n, 4, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@add("attention_heads_first", tokens())
class HeadsFirst(Attention):
    """(heads, 3, head_dim): each head's q, k and v lie together."""

    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 4, 3 * 5).permute(0, 2, 1, 3).chunk(3, -1)
        attn = torch.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(5), -1)
        return torch.matmul(attn, v).permute(0, 2, 1, 3).contiguous().view(b, n, -1)


class Separate(Attention):
    def build(self) -> None:
        self.q, self.k, self.v = nn.Linear(20, 20), nn.Linear(20, 20, bias=False), nn.Linear(20, 20)


@add("attention_separate", tokens())
class SeparateMatmul(Separate):
    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], 4, 5).permute(0, 2, 1, 3)

    def mix(self, x: Tensor) -> Any:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        y = (torch.softmax(q @ k.mT / math.sqrt(q.size(-1)), -1) @ v).permute(0, 2, 1, 3).contiguous()
        return y.view(y.size()[:-2] + (20,))


@add("attention_einsum", tokens())
class Einsum(Separate):
    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, 5) for f in (self.q, self.k, self.v))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(0.4).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(b, n, 20)


@add("attention_folded", tokens())
class Folded(Separate):
    """Heads folded into the batch, as fairseq and the first ``bmm`` implementations do."""

    def mix(self, x: Tensor) -> Any:
        b, n, c = x.shape
        q, k, v = (f(x).view(b, n, 4, c // 4).transpose(1, 2).reshape(b * 4, n, c // 4) for f in (self.q, self.k, self.v))
        y = torch.bmm(torch.bmm(q * (c // 4) ** -0.5, k.transpose(1, 2)).softmax(-1), v)
        return y.view(b, 4, n, c // 4).transpose(1, 2).reshape(b, n, c)


@add("attention_causal_sdpa", tokens())
class CausalSdpa(Separate):
    def mix(self, x: Tensor) -> Any:
        q, k, v = (f(x).unflatten(-1, (4, 5)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@add("attention_causal_triu", tokens())
class CausalTriu(Separate):
    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, 5).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = torch.triu(torch.ones(n, n, dtype=torch.bool, device=x.device), diagonal=1)
        a = (q @ k.transpose(-2, -1)).masked_fill(mask, float("-inf"))
        return (a.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1)


@add("attention_one_head", tokens())
class OneHead(Separate):
    def mix(self, x: Tensor) -> Any:
        return (self.q(x) @ self.k(x).transpose(1, 2) / 20**0.5).softmax(-1) @ self.v(x)


@add("attention_key_width", tokens())
class KeyWidth(Attention):
    """Keys narrower than values: 4 heads of 3 and of 5."""

    def build(self) -> None:
        self.qk, self.v = nn.Linear(20, 24), nn.Linear(20, 20)

    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q, k = self.qk(x).split([12, 12], -1)
        q, k, v = q.view(b, n, 4, 3).transpose(1, 2), k.view(b, n, 4, 3).transpose(1, 2), self.v(x).view(b, n, 4, 5).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 20)


@add("attention_masked", lambda: (torch.randn(2, 6, 12), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])))
class Masked(Separate):
    def forward(self, x: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        x = self.front(x)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, 5).transpose(1, 2) for f in (self.q, self.k, self.v))
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(torch.float32).min
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, n, 20)
        return self.head(x + self.back(y))


@add("attention_relative_table", tokens(6))
class RelativeTable(Attention):
    """A table of biases (offsets, heads), gathered by an index buffer (Swin)."""

    def build(self) -> None:
        super().build()
        self.table = nn.Parameter(torch.randn(11, 4))
        self.register_buffer("index", torch.arange(6)[:, None] - torch.arange(6)[None] + 5)
        self.index: Tensor

    def mix(self, x: Tensor) -> Any:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(6, 6, -1).permute(2, 0, 1).contiguous()
        attn = q * 0.4 @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return (attn.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)


@add("attention_relative_windows", lambda: (torch.randn(2, 6, 12),))
class RelativeWindows(Attention):
    """Tokens in windows of three, a mask per window held in a buffer, added through a view."""

    def build(self) -> None:
        super().build()
        self.table = nn.Parameter(torch.randn(4, 3, 3))
        self.register_buffer("mask", torch.where(torch.rand(2, 3, 3) > 0.7, -100.0, 0.0))
        self.mask: Tensor

    def mix(self, x: Tensor) -> Any:
        x = x.view(-1, 3, 20)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 5).permute(2, 0, 3, 1, 4).unbind(0)
        a = q @ k.transpose(-2, -1) + self.table
        a = (a.view(b // 2, 2, 4, n, n) + self.mask.unsqueeze(1).unsqueeze(0)).view(-1, 4, n, n)
        return (a.softmax(-1) @ v).transpose(1, 2).reshape(-1, 6, c)


@add("attention_grouped_expand", tokens())
class GroupedExpand(Attention):
    """Two heads of keys and values serve four of queries: expanded, then folded (Llama)."""

    def build(self) -> None:
        self.q, self.k, self.v = nn.Linear(20, 20), nn.Linear(20, 10), nn.Linear(20, 10)

    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 5).transpose(1, 2)
        k, v = (f(x).view(b, n, 2, 5).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t[:, :, None].expand(b, 2, 2, n, 5).reshape(b, 4, n, 5) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)


@add("attention_grouped_repeat", tokens())
class GroupedRepeat(GroupedExpand):
    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 5).transpose(1, 2)
        k, v = (f(x).view(b, n, 2, 5).transpose(1, 2).repeat_interleave(2, dim=1) for f in (self.k, self.v))
        return ((q @ k.transpose(2, 3) / 5**0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1)


@add("attention_multi_query", tokens())
class MultiQuery(Attention):
    """One head of keys and values for all queries: only the head dimension can go."""

    def build(self) -> None:
        self.q, self.kv = nn.Linear(20, 20), nn.Linear(20, 10)

    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 5).transpose(1, 2)
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(b, n, 20)


@add("attention_rotary", tokens())
class Rotary(Separate):
    """Rotary positions: the halves of each head are swapped and weighted, so the head dimension goes in pairs or not at all."""

    def build(self) -> None:
        self.q, self.k, self.v = nn.Linear(20, 24), nn.Linear(20, 24), nn.Linear(20, 24)
        self.back = nn.Linear(24, 20)
        angle = torch.arange(6)[:, None] * torch.tensor([1.0, 0.3, 0.1]).repeat(2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def turn(self, x: Tensor) -> Tensor:
        half = torch.cat([-x[..., 3:], x[..., :3]], -1)
        return x * self.cos + half * self.sin

    def mix(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(self.turn(q), self.turn(k), v).transpose(1, 2).reshape(b, n, 24)


@add("attention_rotary_prefix", tokens())
class RotaryPrefix(Rotary):
    """Tokens in front are not turned; a network that has none joins an empty slice, which carries no channel."""

    def turn(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :0], super().turn(x[:, :, 0:])], 2)


@add("attention_rotary_given", lambda: (torch.randn(2, 6, 12), torch.randn(6, 6), torch.randn(6, 6)))
class RotaryGiven(nn.Module):
    """The table is an input, so the head dimension is fixed by it: then whole heads go, of the values too, which it never meets."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.q, self.k, self.v = nn.Linear(12, 20), nn.Linear(20, 24), nn.Linear(20, 24), nn.Linear(20, 24)
        self.back, self.head = nn.Linear(24, 20), nn.Linear(20, 4)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 3:], x[..., :3]], -1) * sin

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        x = self.front(x)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turned(q, cos, sin), self.turned(k, cos, sin), v)
        return self.head(x + self.back(y.transpose(1, 2).reshape(b, n, 24)))


@add("attention_channels")
class ChannelAttention(Body):
    """Non-local block: spatial positions attend to each other through three 1x1 convolutions."""

    def build(self) -> None:
        self.theta, self.phi, self.g, self.w = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 1), nn.Conv2d(12, 7, 1), nn.Conv2d(7, 12, 1)

    def mix(self, x: Tensor) -> Any:
        n, _, h, w = x.size()
        theta = self.theta(x).view(n, 6, -1).permute(0, 2, 1)
        attn = torch.bmm(theta, self.phi(x).view(n, 6, -1)).softmax(-1)
        y = torch.bmm(attn, self.g(x).view(n, 7, -1).transpose(1, 2)).transpose(1, 2).reshape(n, 7, h, w)
        return x + self.w(y)


@add("attention_covariance", exact=False)
class CovarianceAttention(Body):
    """Channels attend to channels (XCiT): q and k are normalised along positions, the softmax runs over channels."""

    def build(self) -> None:
        self.qkv, self.temperature, self.out = nn.Linear(12, 36), nn.Parameter(torch.ones(3, 1, 1)), nn.Linear(12, 12)

    def mix(self, x: Tensor) -> Any:
        b, c, h, w = x.shape
        tokens_ = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens_).reshape(b, h * w, 3, 3, 4).permute(2, 0, 3, 4, 1).unbind(0)
        attn = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * self.temperature
        y = (attn.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, h * w, c)
        return self.out(y).transpose(1, 2).reshape(b, c, h, w)
