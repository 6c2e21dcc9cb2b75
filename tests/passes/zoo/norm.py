"""Normalisation, per-channel parameters and buffers, positional tables, recurrent layers, embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.zoo.catalogue import Body, add, conv_bn, image, tokens, words


@add("group_norm", exact=False)
class GroupNorm(Body):
    def build(self) -> None:
        self.a, self.n, self.b = nn.Conv2d(12, 12, 3), nn.GroupNorm(3, 12), conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        return self.b(F.relu(self.n(self.a(x))))


@add("group_norm_single_channels")
class GroupNormSingle(Body):
    """As many groups as channels: no statistic is shared, so the oracle holds."""

    def build(self) -> None:
        self.a, self.n = nn.Conv2d(12, 12, 3), nn.GroupNorm(12, 12)

    def mix(self, x: Tensor) -> Any:
        return F.relu(self.n(self.a(x)))


@add("instance_norm")
class InstanceNorm(Body):
    def build(self) -> None:
        self.a, self.n, self.m = (
            nn.Conv2d(12, 12, 3),
            nn.InstanceNorm2d(12, affine=True),
            nn.InstanceNorm2d(12, affine=True, track_running_stats=True),
        )

    def mix(self, x: Tensor) -> Any:
        return self.m(F.relu(self.n(self.a(x))))


@add("instance_norm_plain")
class InstanceNormPlain(Body):
    def build(self) -> None:
        self.a, self.n = nn.Conv2d(12, 12, 3), nn.InstanceNorm2d(12)

    def mix(self, x: Tensor) -> Any:
        return F.relu(self.n(self.a(x)))


@add("layer_norm", tokens(), exact=False)
class LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.c = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Any:
        return self.c(F.gelu(self.b(self.n(self.a(x)))))


@add("layer_norm_literal", exact=False)
class LayerNormLiteral(nn.Module):
    """ConvNeXt's two dialects: ``F.layer_norm`` with a literal shape on the last axis, and statistics written out on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 10, 2, 2), nn.Conv2d(10, 9, 1), nn.Conv2d(9, 4, 1)
        self.w, self.s = nn.Parameter(torch.ones(10)), nn.Parameter(torch.zeros(10))
        self.gain, self.shift = nn.Parameter(torch.ones(9)), nn.Parameter(torch.zeros(9))

    def forward(self, x: Tensor) -> Any:
        x = F.layer_norm(self.a(x).permute(0, 2, 3, 1), (10,), self.w, self.s, 1e-6).permute(0, 3, 1, 2)
        x = self.b(x)
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return self.c(self.gain[:, None, None] * x + self.shift[:, None, None])


@add("rms_norm", tokens(), exact=False)
class RmsNorm(nn.Module):
    """``nn.RMSNorm``, and the same written out as Llama's networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.c = nn.Linear(12, 16), nn.RMSNorm(16), nn.Linear(16, 14), nn.Linear(14, 5)
        self.gain = nn.Parameter(torch.ones(14))

    def forward(self, x: Tensor) -> Any:
        x = self.b(self.n(self.a(x)))
        x = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return self.c(x)


@add("global_response_norm", exact=False)
class GlobalResponseNorm(Body):
    def build(self) -> None:
        self.a, self.gamma, self.beta = nn.Conv2d(12, 12, 1), nn.Parameter(torch.zeros(1, 1, 1, 12)), nn.Parameter(torch.zeros(1, 1, 1, 12))

    def mix(self, x: Tensor) -> Any:
        x = self.a(x).permute(0, 2, 3, 1)
        length = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        scale = length / (length.mean(dim=-1, keepdim=True) + 1e-6)
        return (self.gamma * (x * scale) + self.beta + x).permute(0, 3, 1, 2)


@add("channel_attention_pool", exact=False)
class SpatialAttention(Body):
    """CBAM's spatial gate: mean and maximum over the channels."""

    def build(self) -> None:
        self.a, self.gate, self.b = conv_bn(12, 12), nn.Conv2d(2, 1, 3, padding=1), conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        x = self.a(x)
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.b(x * torch.sigmoid(self.gate(both)))


@add("efficient_channel_attention")
class EfficientChannelAttention(Body):
    """A convolution that slides along the channels: they stay."""

    def build(self) -> None:
        self.a, self.slide, self.b = conv_bn(12, 12), nn.Conv1d(1, 1, 3, padding=1), conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        x = self.a(x)
        y = self.slide(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return self.b(x * torch.sigmoid(y))


@add("prelu")
class PReLU(Body):
    def build(self) -> None:
        self.a, self.p, self.q = nn.Conv2d(12, 12, 3), nn.PReLU(12), nn.PReLU()

    def mix(self, x: Tensor) -> Any:
        return self.q(self.p(self.a(x)))


@add("layer_scale")
class LayerScale(Body):
    def build(self) -> None:
        self.a, self.scale = nn.Conv2d(12, 12, 3, padding=1), nn.Parameter(1e-1 * torch.ones(12, 1, 1))
        self.gamma, self.b = nn.Parameter(torch.rand(12)), nn.Linear(12, 12)

    def mix(self, x: Tensor) -> Any:
        x = x + self.scale * self.a(x)
        return x + (self.gamma * self.b(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


@add("channel_buffers")
class ChannelBuffers(Body):
    """Fixed means, spreads and a channel mask held in buffers, one of them a plain attribute."""

    def build(self) -> None:
        self.register_buffer("middle", torch.rand(1, 12, 1, 1))
        self.register_buffer("spread", torch.rand(12) + 0.5, persistent=False)
        self.middle: Tensor
        self.spread: Tensor
        self.plain = torch.rand(12, 1, 1)

    def mix(self, x: Tensor) -> Any:
        return (x - self.middle) * self.spread.view(1, -1, 1, 1) * self.plain


@add("position_table")
class PositionTable(nn.Module):
    """Patches, a class token in front, a positional table: the body of a vision transformer without its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls, self.pos = nn.Conv2d(3, 10, 4, 4), nn.Parameter(torch.randn(1, 1, 10)), nn.Parameter(torch.randn(1, 5, 10))
        self.f1, self.f2, self.head = nn.Linear(10, 14), nn.Linear(14, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        x = x + self.f2(F.gelu(self.f1(x)))
        return self.head(x[:, 0])


@add("mask_buffer", tokens(6, 8))
class MaskBuffer(nn.Module):
    """A causal mask in a buffer, cut to the length that comes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.mask: Tensor
        self.register_buffer("mask", torch.tril(torch.ones(10, 10)).view(1, 10, 10))

    def forward(self, x: Tensor) -> Any:
        n = x.size(1)
        a = self.q(x) @ self.k(x).transpose(-2, -1) * 8**-0.5
        a = a.masked_fill(self.mask[:, :n, :n] == 0, float("-inf")).softmax(-1)
        return self.o(a @ self.v(x))


@add("mixer", tokens(6, 8))
class Mixer(nn.Module):
    """Linear layers along tokens and along channels in turn; hidden widths of both can be pruned, as can the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.t1, self.t2 = nn.Linear(8, 10), nn.Linear(6, 7), nn.Linear(7, 6)
        self.c1, self.c2, self.head = nn.Linear(10, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = x + self.t2(F.gelu(self.t1(x.transpose(1, 2)))).transpose(1, 2)
        x = x + self.c2(F.gelu(self.c1(x)))
        return self.head(x.mean(1))


@add("lstm", words())
class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.rnn, self.head = nn.Embedding(11, 8), nn.LSTM(8, 10, 2, batch_first=True, bidirectional=True), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Any:
        out, (h, c) = self.rnn(self.e(x))
        return self.head(out), h.size(0), self.head(torch.cat([h[-2], c[-1]], -1))


@add("lstm_projection", words())
class LstmProjection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.rnn, self.head = nn.Embedding(11, 8), nn.LSTM(8, 10, proj_size=6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.rnn(self.e(x))[0][:, -1])


@add("gru", words())
class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.rnn, self.top = (
            nn.Embedding(11, 8),
            nn.GRU(8, 10, 2, dropout=0.1, batch_first=True),
            nn.GRU(10, 6, bidirectional=True, batch_first=True),
        )
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        y, _ = self.rnn(self.e(x))
        y, last = self.top(y)
        return self.head(y.mean(1)) + self.head(last.transpose(0, 1).flatten(1))


@add("rnn_convolution", image(2, 3, 8, 8))
class RnnOverColumns(nn.Module):
    """A convolution's columns read by a recurrent layer (text recognition)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.head = conv_bn(3, 6), nn.RNN(6 * 8, 9, nonlinearity="relu"), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).permute(3, 0, 1, 2).flatten(2)
        return self.head(self.rnn(x)[0]).transpose(0, 1)


@add("tied_head", words())
class TiedHead(nn.Module):
    """The vocabulary matrix is embedding and classifier at once."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f1, self.f2, self.head = nn.Embedding(11, 10), nn.Linear(10, 14), nn.Linear(14, 10), nn.Linear(10, 11, bias=False)
        self.head.weight = self.e.weight

    def forward(self, x: Tensor) -> Any:
        x = self.e(x)
        return self.head(x + self.f2(torch.relu(self.f1(x))))


@add("tied_head_functional", words())
class TiedHeadFunctional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.p, self.f = nn.Embedding(11, 10), nn.Embedding(8, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Any:
        y = self.e(x) + self.p(torch.arange(x.size(1), device=x.device))
        return F.linear(torch.tanh(self.f(y)), self.e.weight)


@add("bilinear", lambda: (torch.randn(2, 5), torch.randn(2, 6)))
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 7), nn.Linear(6, 8), nn.Bilinear(7, 8, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.d(F.relu(self.c(self.a(x), self.b(y))))


@add("standardised_weight", exact=False)
class StandardisedWeight(Body):
    """Each output channel's weight is brought to mean 0 and variance 1 over its inputs: a statistic that the removed ones took part in."""

    def build(self) -> None:
        self.a, self.gain, self.b = nn.Conv2d(12, 10, 3), nn.Parameter(torch.rand(10) + 0.5), conv_bn(10, 12)

    def mix(self, x: Tensor) -> Any:
        weight = F.batch_norm(self.a.weight.reshape(1, 10, -1), None, None, weight=self.gain * 0.1, training=True).reshape_as(self.a.weight)
        return self.b(F.relu(F.conv2d(x, weight, self.a.bias)))
