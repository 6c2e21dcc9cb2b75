"""A view that puts channels elsewhere at other sizes of the input: they stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, zeroed


def as_image(y: Any) -> Any:
    b, c, h, w = y.shape
    return y.flatten(2).transpose(1, 2).reshape(b, c, h, w)


def as_image_of_16(y: Any) -> Any:
    return y.flatten(2).permute(0, 2, 1).contiguous().view(len(y), 16, y.shape[2], y.shape[3])


def as_rows(y: Any) -> Any:
    b, c, h, w = y.shape
    return y.reshape(b, h * w, c).transpose(1, 2).unflatten(2, (h, w))


def flat_rows(y: Any) -> Any:
    return y.view(y.shape[0], -1, 16).transpose(1, 2).reshape(y.shape)


def there_and_back(y: Any) -> Any:
    b, c, h, w = y.shape
    return y.view(b, -1).relu().view(b, c, h, w)


def by_tokens(y: Any) -> Any:
    b, c, h, w = y.shape
    return y.view(b, c, h * w).transpose(1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2)


def in_blocks(y: Any) -> Any:
    b, c, h, w = y.shape
    most = y.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4).amax(2)
    return most.view(b, h // 2, w // 2, c).permute(0, 3, 1, 2)


def by_heads(y: Any) -> Any:
    b, c, h, w = y.shape
    return y.reshape(b, 4, c // 4, h * w).softmax(-1).view(b, c, h, w)


class Net(nn.Module):
    def __init__(self, how: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1), how

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.how(self.first(x)))
        assert isinstance(made, Tensor)
        return made.mean((2, 3))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (8, 8)])
@pytest.mark.parametrize("how", [as_image, as_image_of_16, as_rows, flat_rows])
def test_it_is_kept(how: Callable[[Any], Any], size: tuple[int, int]) -> None:
    graph = fxprune.analyze(Net(how), torch.randn(2, 3, *size))
    if size == (1, 1) and how in (as_rows, flat_rows):  # as ResNets for small images flatten: it is said
        assert any(g.prunable for g in graph.groups) and any("a map of one pixel" in note for note in graph.notes)
    else:
        assert not any(g.prunable and not g.notes for g in graph.groups)


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (8, 8)])
@pytest.mark.parametrize("how", [there_and_back, by_tokens, in_blocks, by_heads])
def test_others_are_pruned_and_right_at_other_sizes(how: Callable[[Any], Any], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, x = Net(how).eval(), torch.randn(2, 3, *size)
    slim = fxprune.compress(model, 0.5, x)
    assert slim.get_parameter("first.weight").shape[0] == 8
    reference = zeroed(model, fxprune.record(slim).kept)
    for other in (x, torch.randn(3, 3, 12, 12), torch.randn(1, 3, 4, 8)):
        with torch.no_grad():
            assert gap(reference(other), slim(other)) < 1e-5


def test_a_flattened_map_of_a_fixed_size_is_pruned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Flat(), nn.Linear(16 * 16, 4))
    slim = fxprune.compress(model, 0.5, torch.randn(2, 3, 6, 6))
    assert slim.get_parameter("3.weight").shape == (4, 8 * 16)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 16 * 4 * 4)


class Grouped(nn.Module):
    """Grouped queries: keys and values are expanded for their queries, and viewed as heads again."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(10, 32), nn.Linear(32, 3)
        self.q, self.k, self.v, self.o = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        b, n, _ = y.shape
        q = self.q(y).view(b, n, 4, 8).transpose(1, 2)
        k, v = (
            t.view(b, n, 2, 8).permute(0, 2, 1, 3).unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(b, 2 * 2, n, 8)
            for t in (self.k(y), self.v(y))
        )
        made = (q @ k.mT / 8**0.5).softmax(-1) @ v
        return self.out(y + self.o(made.transpose(1, 2).reshape(b, n, -1))).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("attention", ["heads", "head_dim"])
def test_heads_beside_dynamic_sizes_are_pruned(attention: str) -> None:
    torch.manual_seed(0)
    model, x = Grouped().eval(), torch.randn(2, 5, 10)
    graph = fxprune.analyze(model, x, attention=attention)
    assert all(g.prunable for g in graph.groups if g.name.partition("[")[0] in ("q", "k", "v", "into")), [g.reason for g in graph.groups]
    slim = fxprune.compress(graph, 0.5)
    reference = zeroed(model, fxprune.record(slim).kept)
    for other in (x, torch.randn(3, 7, 10), torch.randn(1, 16, 10)):
        with torch.no_grad():
            assert gap(reference(other), slim(other)) < 1e-5


BY_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "the shape of the example": lambda y: y.view(-1, 16, 4, 6),
    "positions flat as in the example": lambda y: y.flatten(2).view(-1, 16, 24).unsqueeze(3),
    "positions on one axis": lambda y: y.view(-1, 16, 24).unsqueeze(3),
    "positions of one beside": lambda y: y.unsqueeze(-1).view(-1, 16, 4, 6),
    "positions in parts": lambda y: y.reshape(-1, 16, 2, 2, 6).flatten(3),
}


@pytest.mark.parametrize("how", BY_NUMBERS.values(), ids=BY_NUMBERS)
def test_numbers_of_the_examples_positions_do_not_lock_channels(how: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model, x = Net(how).eval(), torch.randn(2, 3, 4, 6)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert slim.get_parameter("first.weight").shape[0] == 8
    assert any("would put channels of one sample into others" in note for note in fxprune.record(slim).notes)
    reference = zeroed(model, fxprune.record(slim).kept)
    for other in (x, torch.randn(3, 3, 4, 6), torch.randn(1, 3, 6, 4)):
        with torch.no_grad():
            assert gap(reference(other), slim(other)) < 1e-5
    with pytest.raises(RuntimeError):
        slim(torch.randn(1, 3, 5, 5))
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 5, 5))


def test_numbers_behind_channels_that_move_lock_them() -> None:
    moving = (lambda y: y.view(-1, 8, 48).unsqueeze(3).repeat(1, 2, 1, 1), lambda y: y.flatten(2).mT.reshape(-1, 16, 24).unsqueeze(3))
    for how in moving:
        graph = fxprune.analyze(Net(how), torch.randn(2, 3, 4, 6))
        assert not any(g.prunable and not g.notes for g in graph.groups if g.name.startswith("first"))


@pytest.mark.parametrize(
    "how",
    [
        lambda y: torch.cat(y.chunk(2, 0)).view(-1, 8, 64),
        lambda y: y.unfold(2, 8, 8).reshape(-1, 8, 64),
        lambda y: torch.nn.functional.unfold(y, 2, stride=2).view(-1, 8, 4, 16).flatten(2),
    ],
)
def test_numbers_behind_channels_of_which_little_is_known_are_said(how: Callable[[Any], Any]) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv1d(8, 3, 1)

        def forward(self, x: Tensor) -> Any:
            return self.last(how(self.first(x).relu()))

    graph = fxprune.analyze(Small(), torch.randn(1, 8, 8, 8))
    assert not any(g.prunable for g in graph.groups) or any("a view by numbers was specialised" in note for note in graph.notes)


def gaps_and_notes(
    how: Callable[[Any], Any], size: tuple[int, ...], others: Sequence[tuple[int, ...]], last: nn.Module
) -> tuple[float, Any]:
    """How far a slim network is from the zeroed original where the latter runs; nothing where a note says that other sizes differ."""
    model = Net(how).eval()
    model.first, model.last = nn.Conv2d(3, 16, 3, padding=1), last  # type: ignore[assignment]
    x = torch.randn(size)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    reference, worst = zeroed(model, fxprune.record(slim).kept), 0.0
    said = any("by numbers was specialised" in note for note in fxprune.record(slim).notes)
    for other in [x] if said else [x, *map(torch.randn, others)]:
        with torch.no_grad():
            try:
                wanted = reference(other)
            except RuntimeError:
                continue
            worst = max(worst, gap(wanted, slim(other)))
    return worst, slim.get_parameter("first.weight").shape[0]


class OverLast(nn.Module):
    """A layer and a mean over what it gives, as ``Net`` wants it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x).flatten(2)[..., None]


OTHERS = [(3, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 16), (2, 3, 16, 8), (2, 3, 4, 4), (1, 3, 16, 16), (2, 3, 12, 12)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("how", "channels"),
    [
        (lambda y: y.view(-1, 8, y.shape[2] * 8), 8),
        (lambda y: y.view(-1, 16, y.shape[3] * 8), 16),
        (lambda y: y.transpose(2, 3).reshape(-1, 16, 8 * y.shape[2]), 16),
        (lambda y: y.view(1, 16, -1), 16),
        (lambda y: y.view(y.shape[0] // len(y), y.shape[1], -1), 16),
        (lambda y: y.view(-1, 16 * 8, y.shape[3]), 128),
        (lambda y: y.view(-1, y.shape[1] * 8, y.shape[3]), 128),
        (lambda y: y.view(-1, 16, y.numel() // 16), 16),
        (lambda y: y.flatten(1).view(-1, 16, 64), 16),
        (lambda y: y.flatten().view(-1, 16, y.shape[2] * 8), 16),
        (lambda y: y.reshape(-1, 2, 8, 8 * y.shape[2]).mean(1), 8),
        (lambda y: y.view(16, -1, 64).transpose(0, 1), 16),
        (lambda y: y.flatten(0, 1).unflatten(0, (-1, 16)).flatten(2), 16),
    ],
)
def test_numbers_that_mix_batch_channels_and_positions(how: Callable[[Any], Any], channels: int, batch: int) -> None:
    torch.manual_seed(0)
    worst, _ = gaps_and_notes(how, (batch, 3, 8, 8), OTHERS, OverLast(nn.Conv1d(channels, 4, 1)))
    assert worst < 1e-5


@pytest.mark.parametrize(
    "how",
    [
        lambda y: y.view(y.shape[0], 16, 8, -1),
        lambda y: y.view(y.shape[0], -1, 8, 8),
        lambda y: y.view(y.shape[0], y.shape[1], 8, -1),
        lambda y: y.view(-1, 16, y.numel() // 16 // len(y)),
        lambda y: y.flatten(1).unflatten(1, (-1, 64)),
        lambda y: y.permute(0, 2, 3, 1).reshape(1, -1, 16).mT,
    ],
)
def test_numbers_that_hold_at_every_size_that_the_model_takes_lock_nothing(how: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    last = nn.Conv2d(16, 4, 1) if how(torch.zeros(2, 16, 8, 8)).ndim == 4 else nn.Conv1d(16, 4, 1)
    worst, left = gaps_and_notes(how, (2, 3, 8, 8), OTHERS, OverLast(last))
    assert worst < 1e-5 and left == 8
