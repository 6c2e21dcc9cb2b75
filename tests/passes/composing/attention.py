"""Attention in its dialects, as blocks that hypothesis composes networks from: (batch, channels, side, side) in and out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.composing.blocks import Block, Made, block, holding

HEADS = 2


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def pictures(y: Tensor, like: Tensor) -> Tensor:
    n, _, height, width = like.shape
    return y.transpose(1, 2).reshape(n, -1, height, width)


def mixed(q: Tensor, k: Tensor, v: Tensor, bias: Any = None) -> Any:
    """Heads second: softmax of scaled products, written out."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


@block
def attention(c: int, s: int, v: int) -> Made:
    h, d = HEADS, 2 + v % 3

    def run(x: Tensor, qkv: nn.Module, out: nn.Module) -> Any:
        n, k, height, width = x.shape
        q, key, value = qkv(x.flatten(2).transpose(1, 2)).reshape(n, height * width, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        if v % 2:
            y = F.scaled_dot_product_attention(q, key, value)
        else:
            y = (q @ key.transpose(-2, -1) * d**-0.5).softmax(-1) @ value
        y = y.transpose(1, 2).reshape(n, height * width, h * d)
        return x + out(y).transpose(1, 2).view(n, k, height, width)

    return Block(run, nn.Linear(c, 3 * h * d), nn.Linear(h * d, c)), c, s


@block
def attention_computed(c: int, s: int, v: int) -> Made:
    """No literal but the number of heads."""

    def run(x: Tensor, qkv: nn.Module, out: nn.Module) -> Any:
        parts = qkv(tokens(x)).chunk(3, -1) if v % 2 else qkv(tokens(x)).tensor_split(3, -1)
        n, t, e = parts[0].shape
        q, k, value = (p.reshape(n, t, HEADS, e // HEADS).transpose(1, 2) for p in parts)
        return pictures(out(mixed(q, k, value).transpose(1, 2).flatten(2)), x)

    return Block(run, nn.Linear(c, 3 * HEADS * (2 + v)), nn.Linear(HEADS * (2 + v), 5)), 5, s


@block
def attention_einsum(c: int, s: int, v: int) -> Made:
    d = 2 + v

    def run(x: Tensor, q: nn.Module, kv: nn.Module, out: nn.Module) -> Any:
        y = tokens(x)
        n, t = y.shape[:2]
        query = q(y).view(n, t, HEADS, d)
        key, value = kv(y).view(n, t, 2, HEADS, d).unbind(2)
        weights = torch.einsum("bihd,bjhd->bhij", query, key).mul(d**-0.5).softmax(-1)
        return x + pictures(out(torch.einsum("bhij,bjhd->bihd", weights, value).reshape(n, t, HEADS * d)), x)

    return Block(run, nn.Linear(c, HEADS * d), nn.Linear(c, 2 * HEADS * d), nn.Linear(HEADS * d, c)), c, s


@block
def attention_masked(c: int, s: int, v: int) -> Made:
    """Causal: by a flag, by a mask in a buffer, by one made in forward."""
    d = 2 + v % 2
    held = holding(mask=torch.ones(s * s, s * s).tril().bool())

    def run(x: Tensor, qkv: nn.Module, out: nn.Module, held: Any) -> Any:
        q, k, value = (p.unflatten(-1, (HEADS, d)).transpose(1, 2) for p in qkv(tokens(x)).split(HEADS * d, -1))
        if v % 3 == 0:
            y = F.scaled_dot_product_attention(q, k, value, is_causal=True)
        elif v % 3 == 1:
            y = (q @ k.mT).masked_fill(~held.mask, -1e4).softmax(-1) @ value
        else:
            late = torch.full((q.shape[-2], q.shape[-2]), -1e4, device=q.device).triu(1)
            y = mixed(q, k, value, late)
        return pictures(out(y.transpose(1, 2).flatten(2)), x)

    return Block(run, nn.Linear(c, 3 * HEADS * d), nn.Linear(HEADS * d, 4 + v), held), 4 + v, s


@block
def attention_relative(c: int, s: int, v: int) -> Made:
    """A table of relative positions for each head, read through an index buffer."""
    d, t, reach = 2 + v % 3, s * s, 2 * s - 1
    grid = torch.stack(torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")).flatten(1)
    apart = (grid[:, :, None] - grid[:, None]).permute(1, 2, 0) + s - 1
    held = holding(index=apart[..., 0] * reach + apart[..., 1], table=nn.Parameter(torch.randn(reach * reach, HEADS)))

    def run(x: Tensor, qkv: nn.Module, out: nn.Module, held: Any) -> Any:
        n = x.shape[0]
        q, k, value = qkv(tokens(x)).view(n, t, 3, HEADS, d).permute(2, 0, 3, 1, 4)
        bias = held.table[held.index.view(-1)].view(t, t, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, value, attn_mask=bias) if v % 2 else mixed(q, k, value, bias)
        return x + pictures(out(y.transpose(1, 2).reshape(n, t, -1)), x)

    return Block(run, nn.Linear(c, 3 * HEADS * d), nn.Linear(HEADS * d, c), held), c, s


@block
def attention_grouped(c: int, s: int, v: int) -> Made:
    """Two queries share a key and a value."""
    d = 2 + v % 2

    def run(x: Tensor, q: nn.Module, k: nn.Module, value: nn.Module, out: nn.Module) -> Any:
        y = tokens(x)
        n, t = y.shape[:2]
        query = q(y).view(n, t, 2 * HEADS, d).transpose(1, 2)
        keys, values = (f(y).view(n, t, HEADS, d).transpose(1, 2) for f in (k, value))
        if v % 3 == 0:
            y = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        else:
            if v % 3 == 1:
                keys, values = (z.repeat_interleave(2, 1) for z in (keys, values))
            else:
                keys, values = (z[:, :, None].expand(n, HEADS, 2, t, d).reshape(n, 2 * HEADS, t, d) for z in (keys, values))
            y = mixed(query, keys, values)
        return x + pictures(out(y.transpose(1, 2).reshape(n, t, 2 * HEADS * d)), x)

    made = (nn.Linear(c, 2 * HEADS * d), nn.Linear(c, HEADS * d), nn.Linear(c, HEADS * d), nn.Linear(2 * HEADS * d, c))
    return Block(run, *made), c, s


@block
def attention_rotary(c: int, s: int, v: int) -> Made:
    d, t = 4, s * s
    angle = torch.arange(t)[:, None] / 10.0 ** torch.arange(d // 2)
    held = holding(cos=angle.cos().repeat(1, 2), sin=angle.sin().repeat(1, 2))

    def turned(x: Tensor, held: Any) -> Any:
        a, b = x.chunk(2, -1)
        return x * held.cos + torch.cat([-b, a], -1) * held.sin

    def run(x: Tensor, qkv: nn.Module, out: nn.Module, held: Any) -> Any:
        n = x.shape[0]
        q, k, value = qkv(tokens(x)).view(n, t, 3, HEADS, d).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(turned(q, held), turned(k, held), value if v % 2 else turned(value, held))
        return pictures(out(y.transpose(1, 2).reshape(n, t, HEADS * d)), x)

    return Block(run, nn.Linear(c, 3 * HEADS * d), nn.Linear(HEADS * d, c), held), c, s


@block
def attention_module(c: int, s: int, v: int) -> Made | None:
    if c % HEADS:
        return None
    width = 5 if v > 3 else None
    layer = nn.MultiheadAttention(c, HEADS, batch_first=True, bias=v != 2, add_bias_kv=v == 3, kdim=width, vdim=width)

    def run(x: Tensor, layer: nn.Module, narrow: nn.Module) -> Any:
        y = tokens(x)
        z = narrow(y) if v > 3 else y
        return x + pictures(layer(y, z, z, need_weights=bool(v % 2))[0], x)

    return Block(run, layer, nn.Linear(c, 5) if v > 3 else nn.Identity()), c, s


@block
def attention_linear(c: int, s: int, v: int) -> Made:
    """Without a softmax over tokens: sums of outer products, running or whole."""
    d = 2 + v % 3

    def run(x: Tensor, q: nn.Module, k: nn.Module, value: nn.Module, out: nn.Module) -> Any:
        y = tokens(x)
        query, key, z = F.relu(q(y)), F.relu(k(y)), value(y)
        if v % 2:
            state = torch.einsum("btd,bte->btde", key, z).cumsum(1) / y.shape[1]
            y = torch.einsum("btd,btde->bte", query, state)
        else:
            y = query @ (key.transpose(1, 2) @ z) / y.shape[1]
        return pictures(out(y), x)

    return Block(run, nn.Linear(c, d), nn.Linear(c, d), nn.Linear(c, 3 + v), nn.Linear(3 + v, c)), c, s


@block
def attention_latent(c: int, s: int, v: int) -> Made:
    """A few learned queries read all tokens; their mean scales the picture."""
    e = 3 + v
    held = holding(latents=nn.Parameter(torch.randn(4, e)))

    def run(x: Tensor, kv: nn.Module, out: nn.Module, held: Any) -> Any:
        k, value = kv(tokens(x)).chunk(2, dim=-1)
        q = held.latents.expand(x.shape[0], -1, -1) if v % 2 else held.latents.unsqueeze(0).repeat(x.shape[0], 1, 1)
        y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), value)
        return x * out(y.mean(1)).sigmoid()[:, :, None, None]

    return Block(run, nn.Linear(c, 2 * e), nn.Linear(e, c), held), c, s
