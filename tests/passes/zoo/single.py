"""Networks that take a single channel out, write into one, or pick pairs of them: what is left must still be the same one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.zoo.catalogue import Body, add, image, tokens

VECTORS = image(2, 6)


class Narrow(nn.Module):
    """Two layers with a vector and a matrix of parameters between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.second = nn.Linear(12, 8)
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.kernel = nn.Parameter(torch.randn(10, 8))
        self.head = nn.Linear(10, 3)

    def narrowed(self, x: Tensor) -> Any:
        return self.second(torch.relu(self.first(x))) * self.gain


@add("single_number_of_a_parameter", VECTORS)
class NumberOfAParameter(Narrow):
    """One entry of a vector and of a matrix of parameters are numbers: their channels stay."""

    def forward(self, x: Tensor) -> Any:
        return self.head(F.linear(self.narrowed(x), self.kernel)) * self.gain[2] + self.kernel[1, 3]


@add("single_sample", image(1, 6))
class SingleSample(Narrow):
    """With one sample a channel is a tensor of one number too."""

    def forward(self, x: Tensor) -> Any:
        y = self.narrowed(x)
        return self.head(F.linear(y, self.kernel)) + y[:, 2] + y.select(1, 4) + y.narrow(1, 5, 1) + y[0, 1]


@add("single_elements_written", VECTORS, exact=False)
class ElementsWritten(Narrow):
    """Numbers are written at places that the code names."""

    def forward(self, x: Tensor) -> Any:
        extra = torch.zeros(10, 8)
        extra[1, 2] = 1.0
        extra[4, 5] = -2.0
        y = self.narrowed(x)
        y[0, 7] += 1.0
        return self.head(F.linear(y, self.kernel + extra))


@add("single_diagonal", VECTORS)
class Diagonal(Narrow):
    """Rows and columns that meet on a diagonal go together; beside the main one they stay."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Any:
        y = self.head(F.linear(self.narrowed(x), self.kernel)) + self.kernel.diagonal().sum()
        return y + torch.diagonal(self.other.weight, 1).sum() * self.other(torch.relu(self.first(x))).mean(1, keepdim=True)


@add("single_pairs", VECTORS)
class Pairs(Narrow):
    """Two lists pick pairs of a sample and a channel."""

    def forward(self, x: Tensor) -> Any:
        y = self.narrowed(x)
        y[torch.arange(2), torch.tensor([0, 6])] = 1.0
        return self.head(F.linear(y, self.kernel)) * y[torch.arange(2), torch.tensor([3, 5])].sum()


@add("single_values_read", VECTORS)
class ValuesRead(Narrow):
    """Python code turns a parameter into a number, which the slim module keeps."""

    def forward(self, x: Tensor) -> Any:
        return self.head(F.linear(self.narrowed(x), self.kernel)) * self.gain.detach()[3].item() + float(self.gain.detach().sum())


@add("single_lists", image(2, 6))
class Lists(Narrow):
    """Channels picked by ranges, by lists of lists and by an index of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: Any
        self.register_buffer("pairs", torch.arange(8).view(4, 2).t().contiguous())
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.narrowed(x)
        y = torch.cat([y[:, range(0, 8, 2)], y[:, list(range(1, 8, 2))]], 1)
        return self.last(y[:, self.pairs].amax(1) + y[:, [[0, 2, 4, 6], [1, 3, 5, 7]]].sum(1))


@add("single_mask", VECTORS)
class Mask(Narrow):
    """Channels are picked by a mask in a buffer, and turned into complex numbers and back."""

    def __init__(self) -> None:
        super().__init__()
        self.keep: Any
        self.register_buffer("keep", torch.tensor([True, False, True, True, False, True, True, True]))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        y = torch.complex(self.narrowed(x), torch.zeros(8)) * 1j
        return self.last(y.imag[:, self.keep])


@add("loops_over_parameters", VECTORS, exact=False)
class LoopsOverParameters(Narrow):
    """The network returns a penalty on its own weights, which it finds by looping over them."""

    def forward(self, x: Tensor) -> Any:
        penalty = sum(p.square().sum() for p in self.first.parameters())
        largest = torch.stack([p.abs().mean() for name, p in self.named_parameters() if name.endswith("weight")]).amax()
        return self.head(F.linear(self.narrowed(x), self.kernel)), penalty + largest


@add("distances", VECTORS)
class Distances(Narrow):
    """Channels of two towers meet in distances and products: those that are zero in both add nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(6, 8)
        self.apart, self.like = nn.PairwiseDistance(), nn.CosineSimilarity()

    def forward(self, x: Tensor) -> Any:
        a, b = self.narrowed(x), self.tower(x) * self.gain
        near = F.pairwise_distance(a, b, keepdim=True) + self.like(a, self.kernel[:1])[:, None]
        return self.head(F.linear(a, self.kernel)) * near + torch.linalg.vecdot(a, b)[:, None], self.apart(a, b)


@add("pixels_of_few_channels")
class PixelsOfFewChannels(Body):
    """More pixels than channels come of one channel; nine channels become one, which stays."""

    def build(self) -> None:
        self.wide, self.whole, self.mixed = nn.Conv2d(12, 18, 1), nn.Conv2d(12, 9, 1), nn.Conv2d(3, 12, 3, stride=3)

    def mix(self, x: Tensor) -> Any:
        many = F.pixel_shuffle(torch.relu(self.wide(x)), 3)
        return self.mixed(torch.cat([many, nn.PixelShuffle(3)(self.whole(x))], 1))


@add("transformer_whole", tokens(), exact=False)
class WholeTransformer(nn.Module):
    """Encoder and decoder; the decoder's keys and values are one product of what the encoder gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.body = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        return self.head(self.body(y, y[:, :4], tgt_mask=mask, tgt_is_causal=True))
