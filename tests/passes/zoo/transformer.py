"""``nn.MultiheadAttention``, the Transformer layers, and a small language model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.quiet import encoder
from tests.passes.zoo.attention import Attention
from tests.passes.zoo.catalogue import add, tokens, words


@add("mha_self", tokens())
class MhaSelf(Attention):
    def build(self) -> None:
        self.mha = nn.MultiheadAttention(20, 4, batch_first=True)

    def mix(self, x: Tensor) -> Any:
        return self.mha(x, x, x, need_weights=False)[0]


@add("mha_weights", tokens(), exact=False)
class MhaWeights(Attention):
    """The averaged weights are an output: their mean over the heads changes when heads go."""

    def build(self) -> None:
        self.mha = nn.MultiheadAttention(20, 4, dropout=0.1)

    def forward(self, x: Tensor) -> Any:
        x = self.front(x).transpose(0, 1)
        y, weights = self.mha(x, x, x)
        return self.head(self.back(y)).transpose(0, 1), weights


@add("mha_cross", lambda: (torch.randn(2, 6, 12), torch.randn(2, 5, 7), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])))
class MhaCross(Attention):
    """Keys and values of other widths, a padding mask, and a mask of -inf above the diagonal."""

    def build(self) -> None:
        self.memory = nn.Linear(7, 9)
        self.mha = nn.MultiheadAttention(20, 4, kdim=9, vdim=9, batch_first=True, bias=False)
        self.register_buffer("mask", torch.triu(torch.full((6, 5), float("-inf")), 1))
        self.mask: Tensor

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Any:  # type: ignore[override]
        x, memory = self.front(x), self.memory(memory)
        away = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, float("-inf"))
        y, _ = self.mha(x, memory, memory, key_padding_mask=away, attn_mask=self.mask, need_weights=False)
        return self.head(x + self.back(y))


@add("mha_bias_kv", tokens())
class MhaBiasKv(Attention):
    def build(self) -> None:
        self.mha = nn.MultiheadAttention(20, 4, add_bias_kv=True, add_zero_attn=True, batch_first=True)

    def mix(self, x: Tensor) -> Any:
        return self.mha(x, x, x, need_weights=False)[0]


@add("transformer_encoder_layer", tokens(), exact=False)
class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        self.layers = encoder(nn.TransformerEncoderLayer(16, 4, 20, 0.1, batch_first=True, norm_first=True), 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layers(self.front(x)))


@add("transformer_decoder_layer", lambda: (torch.randn(2, 6, 12), torch.randn(2, 5, 12)), exact=False)
class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        self.layer = nn.TransformerDecoderLayer(16, 2, 20, activation="gelu", batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(6)
        return self.head(self.layer(self.front(x), self.front(memory), tgt_mask=mask))


@add("language_model", words(6), exact=False)
class LanguageModel(nn.Module):
    """GPT in small: positions, causal attention, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.ln, self.lnf = nn.Embedding(11, 16), nn.Embedding(8, 16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn, self.proj, self.fc, self.out = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Any:
        b, t = ids.size()
        x = self.wte(ids) + self.wpe(torch.arange(0, t, dtype=torch.long, device=ids.device))
        q, k, v = self.attn(self.ln(x)).split(16, dim=2)
        q, k, v = (y.view(b, t, 4, 16 // 4).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(b, t, 16)
        x = x + self.proj(y)
        return self.lm_head(self.lnf(x + self.out(F.gelu(self.fc(x)))))
