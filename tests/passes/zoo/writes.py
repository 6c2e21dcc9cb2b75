"""Writes into parts of tensors, reads and sums at computed positions, and frequencies made in forward."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.zoo.catalogue import Body, add, image, tokens, words


class Tokens(nn.Module):
    """A layer in front and one behind ``mix`` on tokens of 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back, self.head = nn.Linear(12, 24), nn.Linear(24, 10), nn.Linear(10, 3)
        self.build()

    def build(self) -> None:
        """Make the layers of ``mix``."""

    def mix(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.back(self.mix(self.front(x)))))


@add("write_slices", tokens())
class WriteSlices(Tokens):
    """Parts are added to, replaced by a layer's output, scaled in place and set to zero, one of them a single channel."""

    def build(self) -> None:
        self.a, self.b = nn.Linear(24, 8), nn.Linear(24, 6)

    def mix(self, x: Tensor) -> Any:
        y = x * 1.0
        y[..., :8] += self.a(x)
        y[..., 8:20:2] = self.b(x)
        y[:, 1:, 20:22].mul_(0.5).add_(1.0)
        y[..., -1] = 0.0
        y[:, 0] = 0.0
        return y


@add("write_through_mask", lambda: (torch.randn(2, 6, 12), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()))
class WriteThroughMask(Tokens):
    """Masked tokens are replaced by a learnt one, negative entries by zero."""

    def build(self) -> None:
        self.token = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor, keep: Tensor) -> Any:  # type: ignore[override]
        y = self.front(x)
        y[~keep] = self.token
        y[y < -0.5] = 0.0
        return self.head(self.back(y))


@add("temporal_shift_written", tokens())
class TemporalShift(Tokens):
    """A quarter of the channels comes from the token before, a quarter from the one after, into a tensor of zeros (TSM)."""

    def mix(self, x: Tensor) -> Any:
        fold = x.size(-1) // 4
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out


@add("sinusoids_made_in_forward", words())
class Sinusoids(nn.Module):
    """Positions encoded from the number of channels: even channels are sines, odd ones cosines, so they go in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.head = nn.Embedding(11, 16), nn.Linear(16, 10), nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Any:
        x = self.e(ids)
        _, n, d = x.shape
        place = torch.arange(n, device=x.device, dtype=torch.float)[:, None]
        rate = torch.exp(torch.arange(0, d, 2, device=x.device).float() * (-math.log(10000.0) / d))
        code = torch.zeros(n, d, device=x.device)
        code[:, 0::2] = torch.sin(place * rate)
        code[:, 1::2] = torch.cos(place * rate)
        return self.head(F.relu(self.a(x + code)))


@add("time_embedding", lambda: (torch.randn(2, 6, 12), torch.rand(2)))
class TimeEmbedding(Tokens):
    """A diffusion model's step: frequencies, a small network, a scale and a shift."""

    def build(self) -> None:
        self.time = nn.Sequential(nn.Linear(16, 14), nn.SiLU(), nn.Linear(14, 48))

    def forward(self, x: Tensor, t: Tensor) -> Any:  # type: ignore[override]
        rates = torch.exp(-math.log(10000) * torch.arange(8, dtype=torch.float32, device=t.device) / 8)
        angles = t[:, None] * rates[None]
        scale, shift = self.time(torch.cat([angles.cos(), angles.sin()], -1))[:, None].chunk(2, -1)
        return self.head(self.back(F.silu(self.front(x) * (1 + scale) + shift)))


@add("graph_messages", lambda: (torch.randn(7, 12), torch.randint(0, 7, (2, 12))))
class GraphMessages(nn.Module):
    """Messages along edges are summed at their targets, weighted by attention per head; everybody reads the first node."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.message = nn.Linear(12, 16), nn.Linear(32, 14)
        self.left, self.right = nn.Parameter(torch.randn(1, 2, 7)), nn.Parameter(torch.randn(1, 2, 7))
        self.head = nn.Linear(30, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Any:
        x = F.relu(self.front(x))
        source, target = edges[0], edges[1]
        m = self.message(torch.cat([x[source], x[target]], -1)).view(-1, 2, 7)
        a = F.leaky_relu((m * self.left).sum(-1) + (m * self.right).sum(-1), 0.2).exp()
        total = torch.zeros(x.size(0), 2).scatter_add_(0, target.unsqueeze(-1).expand_as(a), a)
        m = m * (a / (total[target] + 1e-6)).unsqueeze(-1)
        out = torch.zeros(x.size(0), 14).index_add_(0, target, m.flatten(1))
        return self.head(torch.cat([out, x.gather(0, source.new_zeros(x.size(0), 1).expand(-1, 16))], 1))


@add("stepped_slice_and_list", image())
class SteppedSliceAndList(Body):
    """Every second channel at listed columns: two lists would be taken together."""

    width = 6

    def mix(self, x: Tensor) -> Any:
        return x[:, ::2, :, [0, 2, 5]]


@add("none_in_front", tokens())
class NoneInFront(Tokens):
    """``x[None]`` adds an axis in front; a number that the shape gives picks a channel."""

    def build(self) -> None:
        self.gain = nn.Parameter(torch.randn(24))

    def mix(self, x: Tensor) -> Any:
        return x * self.gain[None] + x[..., x.size(-1) - 1][..., None]


@add("constants_written_into", image())
class ConstantsWrittenInto(Body):
    """An index table that is written into after it was made is not what it was made as."""

    def mix(self, x: Tensor) -> Any:
        order = torch.arange(12)
        order[:6] = torch.tensor([5, 4, 3, 2, 1, 0])
        return x[:, order]


@add("written_before_a_product", tokens(), exact=False)
class WrittenBeforeProduct(Tokens):
    """Queries and keys are shifted in place, one through a view: removed channels no longer hold zeros where they meet."""

    def build(self) -> None:
        self.q, self.k, self.v = nn.Linear(24, 14), nn.Linear(24, 14), nn.Linear(24, 24)

    def mix(self, x: Tensor) -> Any:
        q, k = self.q(x), self.k(x)
        q.add_(0.5)
        k[:, :].add_(0.5)
        return (q @ k.mT).softmax(-1) @ self.v(x)


@add("stepped_view_written", tokens())
class SteppedViewWritten(Tokens):
    """Every second channel is scaled through a view; what is left of a step would be a copy, so those that are written stay."""

    def build(self) -> None:
        self.a = nn.Linear(24, 24)

    def mix(self, x: Tensor) -> Any:
        y = self.a(torch.tanh(x))
        y[..., ::2].mul_(3.0)
        return y
