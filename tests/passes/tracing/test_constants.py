"""Values that tracing may rely on: those of tensors that nothing writes into; what it relied on is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import assert_sound, gap, zeroed


class Picked(nn.Module):
    """Channels are picked by an index that ``forward`` fills in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Any:
        index = torch.zeros(4, dtype=torch.long)
        if self.how == "setitem":
            index[1], index[2], index[3] = 3, 5, 7
        elif self.how == "view":
            index[1:].add_(4)
        else:
            torch.arange(4, out=index)
        return self.b(self.a(x)[:, index])


@pytest.mark.parametrize("how", ["setitem", "view", "out"])
def test_an_index_that_is_written_into_is_not_taken_as_it_was_made(how: str) -> None:
    model, x = Picked(how).eval(), torch.randn(2, 3, 4, 4)
    graph = fxprune.analyze(model, x)
    assert all("indexed by values the graph computes" in g.reason for g in graph.groups if g.name == "a"), graph.groups
    assert torch.equal(fxprune.compress(model, 0.5, x)(x), model(x))


class Counting(nn.Module):
    """Counts its calls in a buffer and asks for the count."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        self.calls.add_(1)
        x = self.a(x)
        return self.b(x * 2 if bool(self.calls > 1) else x)


def test_a_buffer_that_is_written_into_stays_as_it_was() -> None:
    """Asking for its value must not run the write on the user's tensor: the root is then traced in parts, here none."""
    model = Counting().eval()
    with pytest.raises(fxprune.FxPruneError, match="a condition depends on the values of a tensor"):
        fxprune.compress(model, 0.5, torch.randn(2, 4))
    assert model.calls.item() == 0


class Switched(nn.Module):
    """Takes a branch by the value of a buffer."""

    ready: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("ready", torch.tensor(True))

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return self.b(x.relu() if self.ready else x)


def test_a_branch_on_a_buffer_is_reported() -> None:
    model, x = Switched().eval(), torch.randn(2, 4)
    slim = fxprune.compress(model, 0.5, x)
    rec = fxprune.record(slim)
    assert any("'ready'" in note for note in rec.notes), rec.notes
    assert gap(zeroed(model, rec.kept)(x), slim(x)) < 1e-5


class Filled(nn.Module):
    """Sizes and elements of a plain tensor are read as numbers; a size that is made a tensor first is one all the same."""

    strides = torch.tensor([2.0, 4.0])

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.b(self.a(x))
        scale = torch.cat([torch.full((x.shape[2], 1), s) for s in self.strides])
        width: Any = torch.tensor(x.shape[3]).float().sqrt()
        return x.flatten(2) * scale.mean() / torch.full((1,), width)


def test_elements_of_a_plain_tensor_are_numbers() -> None:
    model = Filled().eval()
    slim = fxprune.compress(model, 0.5, torch.randn(2, 3, 4, 4))
    other = torch.randn(1, 3, 6, 9)
    assert gap(zeroed(model, fxprune.record(slim).kept)(other), slim(other)) < 1e-5


class Tabled(nn.Module):
    """Relative positions, put together in place while forward runs, as timm's MViT does."""

    def __init__(self, read: str = "after") -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(7, 6))
        self.read = read

    def forward(self, x: Tensor) -> Any:
        distance = torch.arange(4).unsqueeze(1) - torch.arange(4).unsqueeze(0)
        early = distance + 3
        distance[0] = 0
        distance += 3
        index = {"after": distance, "before": early, "between": distance + early * 0}[self.read]
        last = self.table[index.clamp(0, 6)].sum((0, 1))
        if self.read == "between":
            distance.zero_()
        return self.b(self.a(x) * last)


@pytest.mark.parametrize("read", ["after", "before", "between"])
def test_an_index_that_was_put_together_in_place(read: str) -> None:
    torch.manual_seed(0)
    graph = assert_sound(Tabled(read), (torch.randn(2, 4),), exact=True, seed=1)
    assert graph.by_name["a"].prunable


class TabledChannels(Tabled):
    """Its rows are the channels, which only those of a known index may be."""

    def forward(self, x: Tensor) -> Any:
        index = torch.arange(7) - 3
        early = index + 3
        index += 3
        picked = {"after": index, "before": early}[self.read]
        return self.b(self.a(x) * self.table[picked][:6, 0])


@pytest.mark.parametrize(("read", "free"), [("after", True), ("before", False)])
def test_channels_by_an_index_that_was_put_together_in_place(read: str, free: bool) -> None:
    torch.manual_seed(0)
    assert_sound(TabledChannels(read), (torch.randn(2, 4),), exact=True, seed=1, locked=not free)


class Drawn(nn.Module):
    """Which channels are picked is drawn anew in every call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)
        self.register_buffer("share", torch.full((3,), 0.5))
        self.share: Tensor
        self.how = how

    def forward(self, x: Tensor) -> Any:
        drawn = torch.bernoulli(self.share) if self.how == "called" else torch.zeros(3).bernoulli_(0.5)
        return self.b(self.a(x)[:, drawn.long()])


@pytest.mark.parametrize("how", ["called", "in place"])
def test_what_is_drawn_is_no_constant(how: str) -> None:
    model, x = Drawn(how).eval(), torch.randn(2, 4)
    before = torch.get_rng_state()
    graph = fxprune.analyze(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not graph.by_name["a"].prunable


class Cropped(nn.Module):
    """Crops along the length as networks that come from ONNX do: the ends lie in tensors, and pass through NumPy on their way."""

    starts: Tensor
    ends: Tensor
    axes: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 3)
        self.register_buffer("starts", torch.tensor([2]))
        self.register_buffer("ends", torch.tensor([2**63 - 1]))
        self.register_buffer("axes", torch.tensor([2]))

    def forward(self, x: Tensor) -> Tensor:
        y: Any = torch.relu(self.a(x))
        if self.how == "loop":
            for start, end in zip(self.starts, self.ends, strict=True):
                y = y[:, :, start:end]
        elif self.how == "axes":
            for start, axis in zip(self.starts, self.axes.detach().cpu().numpy(), strict=True):
                entries = [slice(None)] * 3
                entries[axis] = slice(start, None)
                y = y[tuple(entries)]
        elif self.how == "numpy":
            start, end = self.starts.numpy(), self.ends.numpy()
            y = y[:, :, int(start[0]) : int(end[0])]
        elif self.how == "one":
            y = y[..., self.starts[0] :]
        found: Tensor = self.b(y)
        return found


@pytest.mark.parametrize("how", ["loop", "axes", "numpy", "one"])
def test_the_ends_of_slices_may_be_elements_of_buffers(how: str) -> None:
    model, x = Cropped(how).eval(), torch.randn(2, 3, 16)
    graph = fxprune.analyze(model, x)
    assert {group.name: group.prunable for group in graph.groups}["a"]
    slim = fxprune.compress(graph, 0.5, x, verify=True)
    made = fxprune.record(slim)
    assert made.before.macs == fxprune.profile(model, x).macs > fxprune.profile(slim, x).macs == made.after.macs
    assert slim.get_parameter("b.weight").shape == (4, 4, 3) and slim(torch.randn(3, 3, 20)).shape == (3, 4, 16)
    assert any("was specialised to the value of 'starts'" in note for note in graph.notes)


def test_slices_end_where_the_input_says() -> None:
    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x: Tensor, end: Tensor) -> Tensor:
            y: Tensor = self.a(x)[: end[0]]
            return y

    model, x = Asked().eval(), torch.randn(6, 3)
    slim = fxprune.compress(model, 0.0, (x, torch.tensor([4])))
    for end in (4, 1, 6):
        torch.testing.assert_close(slim(x, torch.tensor([end])), model(x, torch.tensor([end])))
