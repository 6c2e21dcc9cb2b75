"""Channels folded with a batch, or a grid of pixels, of which the example has one: other sizes compute what the zeroed original does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, zeroed


class Folded(nn.Module):
    def __init__(self, middle: Callable[[Folded, Tensor], Tensor]) -> None:
        super().__init__()
        self.middle, self.first, self.last = middle, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.kernel, self.one = nn.Parameter(torch.randn(8, 1, 3, 3)), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.middle(self, self.first(x).relu()))
        assert isinstance(made, Tensor)
        return made


def depthwise_over_the_batch(net: Folded, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return F.conv2d(y.view(1, b * c, h, w), net.kernel.repeat(b, 1, 1, 1), padding=1, groups=b * c).view(b, c, h, w)


def one_filter(net: Folded, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    made = net.one(y.view(b * c, 1, h, w)).view(b, c, h, w)
    assert isinstance(made, Tensor)
    return made


def lengths(net: Folded, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    z = y.reshape(b * c, h * w)
    length: Tensor = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return (z / (length + 1)).view(b, c, h, w)


def transposed(net: Folded, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    z = y.transpose(0, 1).reshape(c, -1)
    return (z - z.mean(1, keepdim=True)).view(c, b, h, w).transpose(0, 1)


def largest(net: Folded, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    z = y.reshape(b * c, -1)
    return y + z.gather(1, z.argmax(1)[:, None]).view(b, c, 1, 1)


def sampled(net: Folded, y: Tensor) -> Tensor:
    """A grid for each channel of each sample."""
    b, c, h, w = y.shape
    grid = F.affine_grid(torch.eye(2, 3).repeat(b * c, 1, 1), [b * c, 1, h, w], align_corners=False)
    return F.grid_sample(y.view(b * c, 1, h, w), grid, align_corners=False).view(b, c, h, w)


def offsets(net: Folded, y: Tensor) -> Tensor:
    """A grid that the network computes for each channel."""
    b, c, h, w = y.shape
    grid = torch.stack([y.tanh(), y.sigmoid()], -1).reshape(b * c, h, w, 2)
    return F.grid_sample(y.reshape(b * c, 1, h, w), grid, align_corners=False).view(b, c, h, w)


def counted(net: Folded, y: Tensor) -> Tensor:
    """Positions that are counted up to the folded size."""
    b, c, h, w = y.shape
    return y.view(b * c, h, w)[torch.arange(b * c)].view(b, c, h, w)


def selected(net: Folded, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return y.view(b * c, h, w).index_select(0, torch.arange(b * c - 1, -1, -1)).view(b, c, h, w)


def chunks(net: Folded, y: Tensor) -> Tensor:
    """As many parts as there are samples."""
    return torch.stack(y.flatten(0, 1).chunk(y.shape[0]))


def sections(net: Folded, y: Tensor) -> Tensor:
    return torch.stack(torch.tensor_split(y.flatten(0, 1), len(y), dim=0))


def parts_by_height(net: Folded, y: Tensor) -> Tensor:
    """As many parts of the channels as there are rows."""
    return y + y.chunk(y.shape[2], dim=1)[0].mean(1, keepdim=True)


Middle = Callable[[Folded, Tensor], Tensor]
PRUNED: list[Middle] = [depthwise_over_the_batch, one_filter, lengths, transposed, largest, offsets, chunks, sections]
KEPT: dict[Middle, str] = {
    sampled: "it meets a tensor of fixed size",
    counted: "the size of the input decides",
    selected: "the size of the input decides",
}


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 3, 1, 1), (1, 3, 1, 1)])
@pytest.mark.parametrize("middle", [*PRUNED, *KEPT])
def test_other_sizes_than_one(middle: Middle, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Folded(middle).eval(), torch.randn(*shape)
    graph = fxprune.analyze(model, x)
    (first,) = [g for g in graph.groups if g.name == "first"]
    assert first.prunable == (middle not in KEPT) and KEPT.get(middle, "") in str(first.reason or "")
    policy = {g.name: 0.5 for g in graph.groups if g.prunable and not g.notes}
    slim = fxprune.compress(graph, policy, x)
    kept = fxprune.record(slim).kept
    with torch.no_grad():
        for other in (x, torch.randn(1, 3, 4, 5), torch.randn(3, 3, 4, 5), torch.randn(2, 3, 1, 6), torch.randn(3, 3, 1, 1)):
            assert gap(zeroed(model, kept)(other), slim(other)) < 1e-4
    assert not [note for note in fxprune.record(slim).notes if "specialised" in note]


def test_as_many_parts_of_the_channels_as_there_are_rows() -> None:
    graph = fxprune.analyze(Folded(parts_by_height), torch.randn(2, 3, 4, 5))
    groups = [g for g in graph.groups if g.name.startswith("first[")]
    assert groups and all("the size of the input decides" in str(g.reason) for g in groups)
