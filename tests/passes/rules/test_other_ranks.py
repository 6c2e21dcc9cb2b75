"""Axes that code counts from the end are counted from the end in the slim network: tensors of more axes, or of fewer, go through it too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import TOLERANCE, gap, zeroed


class Lines(nn.Module):
    """Linear layers around something; they take tensors of any rank."""

    def __init__(self, middle: Callable[[Lines, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.middle, self.first, self.last, self.norm = middle, nn.Linear(10, 16), nn.Linear(width, 4), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.middle(self, self.first(x)))
        assert isinstance(made, Tensor)
        return made


def gated(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] * parts[1].sigmoid()


def scaled(net: Lines, y: Tensor) -> Tensor:
    y = y.clone()
    y[..., :4].mul_(2)
    return y


def assigned(net: Lines, y: Tensor) -> Tensor:
    y = y.clone()
    y[..., :4] = 0.0
    return y


def two_lists(net: Lines, y: Tensor) -> Tensor:
    """A stepped slice beside a list: two lists would be taken together, so one picks before."""
    pairs = torch.stack([y, y.relu()], -1)
    return pairs[..., ::2, [0]].flatten(-2)


MIDDLES: dict[str, tuple[Callable[[Lines, Tensor], Tensor], int]] = {
    "slice": (lambda n, y: y[..., :8], 8),
    "first": (lambda n, y: y * y[..., :1], 16),
    "stepped": (lambda n, y: y[..., ::2] * y[..., 1::2], 8),
    "number": (lambda n, y: y * y[..., 3].unsqueeze(-1), 16),
    "list": (lambda n, y: y[..., [0, 2, 4, 6, 8, 10, 12, 14]], 8),
    "new_axis": (lambda n, y: (y[..., None] * torch.ones(3)).sum(-1), 16),
    "new_axis_before": (lambda n, y: (y[..., None, :] * torch.ones(3, 1)).mean(-2), 16),
    "in_front_of_others": (lambda n, y: y.unflatten(-1, (4, 4))[..., :3, :].flatten(-2), 12),
    "two_lists": (two_lists, 8),
    "half_turned": (lambda n, y: torch.cat([-y[..., 8:], y[..., :8]], -1) * 0.3 + y, 16),
    "split": (lambda n, y: gated(y.split(8, -1)), 8),
    "split_by_function": (lambda n, y: gated(torch.split(y, [8, 8], dim=-1)), 8),
    "chunk": (lambda n, y: gated(y.chunk(2, dim=-1)), 8),
    "tensor_split": (lambda n, y: gated(torch.tensor_split(y, 2, -1)), 8),
    "squeeze": (lambda n, y: y[..., None].squeeze(-1), 16),
    "scaled": (scaled, 16),
    "assigned": (assigned, 16),
    "layer_norm": (lambda n, y: n.norm(y), 16),
    "softmax": (lambda n, y: y * y.softmax(-1), 16),
    "spread": (lambda n, y: y / (y.std(-1, keepdim=True) + 1), 16),
    "layer_norm_seen_otherwise": (lambda n, y: F.layer_norm(y, (16,)).view(-1, 16).relu(), 16),
}


@pytest.mark.parametrize("shape", [(5, 10), (2, 5, 10)])
@pytest.mark.parametrize("name", MIDDLES)
def test_other_ranks_compute_what_the_zeroed_original_does(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Lines(*MIDDLES[name]).eval(), torch.randn(shape)
    slim = fxprune.compress(model, 0.5, x, norms="exact", verify=True).eval()
    assert slim.get_parameter("first.weight").shape[0] < 16
    reference = zeroed(model, fxprune.record(slim).kept)
    with torch.no_grad():
        for other in ((10,), (3, 10), (2, 5, 10), (2, 3, 4, 10)):
            y = torch.randn(other)
            assert gap(reference(y), slim(y)) < TOLERANCE, other


def test_axes_counted_from_the_front_stay_counted_from_the_front() -> None:
    """Unlike those from the end, they are the same ones where axes are added behind."""

    class Front(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 16), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).movedim(-1, 1)
            a, b = y[:, :8], y[:, 8:]
            c, d = y.split(8, 1)
            made = self.last((a * b.sigmoid() + c * d).movedim(1, -1))
            assert isinstance(made, Tensor)
            return made

    torch.manual_seed(0)
    model = Front().eval()
    slim = fxprune.compress(model, 0.5, torch.randn(3, 5, 10), verify=True).eval()
    reference = zeroed(model, fxprune.record(slim).kept)
    with torch.no_grad():
        for other in ((3, 10), (2, 5, 10), (2, 3, 4, 10)):
            y = torch.randn(other)
            assert gap(reference(y), slim(y)) < TOLERANCE, other


class Squeezed(nn.Module):
    """Pooled channels of which ``squeeze`` drops the batch too where that is one."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        made = self.last(y * y.mean((2, 3), keepdim=True).squeeze()[..., None, None])
        assert isinstance(made, Tensor)
        return made


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sparsity", [0.5, 0.99])
def test_a_rank_that_depends_on_the_batch(batch: int, sparsity: float) -> None:
    """With one channel left, too: its axis is not of size one in the original."""
    torch.manual_seed(0)
    model = Squeezed().eval()
    slim = fxprune.compress(model, sparsity, torch.randn(batch, 3, 8, 8), verify=True).eval()
    reference = zeroed(model, fxprune.record(slim).kept)
    with torch.no_grad():
        for shape in ((1, 3, 8, 8), (2, 3, 8, 8), (3, 3, 6, 6)):
            y = torch.randn(shape)
            assert gap(reference(y), slim(y)) < TOLERANCE, shape


def test_a_squeeze_that_drops_the_batch_of_one_alone() -> None:
    class Vector(Squeezed):
        def forward(self, x: Tensor) -> Tensor:
            made = self.first(x).mean((2, 3), keepdim=True).squeeze() @ self.last.weight.sum((2, 3)).T
            assert isinstance(made, Tensor)
            return made

    torch.manual_seed(0)
    model = Vector().eval()
    slim = fxprune.compress(model, 0.5, torch.randn(2, 3, 8, 8)).eval()
    reference = zeroed(model, fxprune.record(slim).kept)
    with torch.no_grad():
        y = torch.randn(1, 3, 8, 8)
        assert reference(y).shape == slim(y).shape == (4,) and gap(reference(y), slim(y)) < TOLERANCE


def test_hsplit_of_vectors_and_of_rows() -> None:
    """It splits the only axis of a vector and the second of a matrix."""
    torch.manual_seed(0)
    model = Lines(lambda n, y: gated(y.hsplit(2)), 8).eval()
    for example in (torch.randn(10), torch.randn(3, 10)):
        slim = fxprune.compress(model, 0.5, example, verify=True).eval()
        reference = zeroed(model, fxprune.record(slim).kept)
        with torch.no_grad():
            for y in (torch.randn(10), torch.randn(5, 10)) if example.ndim == 1 else (torch.randn(5, 10),):
                assert gap(reference(y), slim(y)) < TOLERANCE
