"""Numbers that code reads from its inputs: sizes made of them (``int(lengths.max())``) are computed again at every call."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError


class Net(nn.Module):
    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.mix, self.last, self.how = nn.Linear(10, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 4), how

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        y = self.mix(self.first(x).transpose(1, 2)).transpose(1, 2)
        return self.last(self.how(y, lengths))


def masked(y: Tensor, lengths: Tensor, most: Any) -> Tensor:
    mask = torch.arange(most)[None] < lengths[:, None]
    return (y[:, :most] * mask[..., None]).sum(1)


def by_int(y: Tensor, lengths: Tensor) -> Tensor:
    return masked(y, lengths, int(lengths.max()))


def by_item(y: Tensor, lengths: Tensor) -> Tensor:
    return masked(y, lengths, torch.max(lengths).item())


def by_tensor(y: Tensor, lengths: Tensor) -> Tensor:
    return masked(y, lengths, lengths.max())


def computed(y: Tensor, lengths: Tensor) -> Tensor:
    return masked(y, lengths, int((lengths * 2).max()) // 2)


def pooled(y: Tensor, groups: Tensor) -> Tensor:
    return y.new_zeros(int(groups.max()) + 1, y.shape[-1]).index_add_(0, groups, y.sum(1))


@pytest.mark.parametrize("how", [by_int, by_item, by_tensor, computed, pooled])
def test_sizes_follow_the_values(how: Callable[[Tensor, Tensor], Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = Net(how).eval(), (torch.randn(3, 6, 10), torch.tensor([5, 3, 2]))
    whole = fxprune.compress(model, 0.0, example)
    for x, lengths in ((torch.randn(4, 9, 10), torch.tensor([7, 1, 2, 9])), (torch.randn(2, 3, 10), torch.tensor([1, 2]))):
        torch.testing.assert_close(whole(x, lengths), model(x, lengths))
    slim = fxprune.compress(model, 0.5, example, verify=True)
    assert slim.get_parameter("mix.weight").shape == (8, 8, 3) and not fxprune.record(slim).notes
    fxprune.save(slim, tmp_path / "slim.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "slim.safetensors", Net(how))(*example), slim(*example))
    same = fxprune.compress(model, 0.5, example, keep_class=True)
    torch.testing.assert_close(same(*example), slim(*example))


def branch(y: Tensor, lengths: Tensor) -> Tensor:
    most = int(lengths.max())
    return masked(y * 2 if most > 4 else y, lengths, most)


def loop(y: Tensor, lengths: Tensor) -> Tensor:
    return torch.stack([y[:, step] for step in range(int(lengths.max()))]).sum(0)


def listed(y: Tensor, lengths: Tensor) -> Tensor:
    return masked(y, lengths, max(lengths.tolist()))


@pytest.mark.parametrize("how", [branch, loop, listed])
def test_what_they_decide_is_refused(how: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(TraceError, match=r"test_read_values.py:\d+: .* depends on the values of a tensor"):
        fxprune.analyze(Net(how).eval(), (torch.randn(3, 6, 10), torch.tensor([5, 3, 2])))


class Sampled(nn.Module):
    """As ``torch.distributions`` checks its arguments: numbers of the dtype that a stream has, into which a parameter went."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.position, self.last = nn.Linear(10, 16), nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x) + self.position
        scale = torch.full((), 2.0, dtype=y.dtype, device=y.device)
        return self.last(y * scale if scale > 0 else y)


class Padded(nn.Module):
    """As EnCodec pads: the length of a stream and a buffer say by how much."""

    stride: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.position, self.last = nn.Linear(10, 16), nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 4)
        self.register_buffer("stride", torch.tensor(4), persistent=False)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x) + self.position
        frames = torch.ceil(y.shape[1] / self.stride).to(torch.int64)
        missing = frames * self.stride - y.shape[1]
        return self.last(nn.functional.pad(y, (0, 0, 0, 2)) if missing > 0 else y)


@pytest.mark.parametrize("kind", [Sampled, Padded])
def test_who_asks_for_the_form_of_a_tensor_reads_no_values(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.randn(2, 6, 10)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert slim.get_parameter("position").shape == (1, 1, 8)
    assert not any("'position'" in note or "'first" in note for note in fxprune.record(slim).notes)
    torch.testing.assert_close(slim(x).shape, model(x).shape)


class Logged(nn.Module):
    """Numbers that are read from what is computed, for a log or for more arithmetic."""

    def __init__(self, how: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.how, self.m = nn.Linear(10, 16), nn.Linear(16, 4), how, 0.0

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x, self.first(x).relu())


def kept(net: Any, x: Tensor, y: Tensor) -> Any:
    net.m = y.mean().item()
    sys.stdout.write(f"mean {y.mean().item():.3f} {float(y.mean())} {y.mean(0).tolist() if net.training else ''}")
    return net.last(y)


def returned(net: Any, x: Tensor, y: Tensor) -> Any:
    loss = net.last(y).pow(2).mean()
    return net.last(y), {"loss": loss.item(), "twice": 2 * float(loss) + 1, "positive": (loss > 0).sum().item(), "rows": x[0, :2].tolist()}


def scaled(net: Any, x: Tensor, y: Tensor) -> Any:
    return net.last(y / x.abs().max().item() * max(float(x.abs().mean()), 0.1)) + (x.mean().item() > 0)


def rooted(net: Any, x: Tensor, y: Tensor) -> Any:
    return net.last(y) * math.sqrt(net.last(y).pow(2).sum().item()) + torch.full((4,), x.std().item())


@pytest.mark.parametrize("how", [kept, returned, scaled, rooted])
def test_numbers_are_read_at_every_call(how: Callable[[Any, Tensor, Tensor], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = Logged(how).eval(), torch.randn(3, 10)
    whole = fxprune.compress(model, 0.0, example)
    for x in (torch.randn(5, 10) * 3, torch.randn(2, 10) - 2):
        with torch.no_grad():
            torch.testing.assert_close(whole(x), model(x))
    slim = fxprune.compress(model, 0.5, example, verify=True)
    assert slim.get_parameter("first.weight").shape == (8, 10)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    loaded = fxprune.load(tmp_path / "slim.safetensors", Logged(how))
    with torch.no_grad():
        torch.testing.assert_close(loaded(example), slim(example), rtol=0, atol=0)


def test_zeros_do_not_stay_where_a_number_that_is_read_decides() -> None:
    """What the trace made up for it says nothing: at another input the bound is below zero."""

    def bounded(net: Any, x: Tensor, y: Tensor) -> Any:
        return net.last(y) + y.clamp(max=x.mean().item()).sum(1, keepdim=True)

    def plain(net: Any, x: Tensor, y: Tensor) -> Any:
        return net.last(y) + y.clamp(max=1.0).sum(1, keepdim=True)

    notes = []
    for how in (plain, bounded):
        (group,) = [g for g in fxprune.analyze(Logged(how).eval(), torch.randn(3, 10) + 5).groups if g.prunable]
        notes.append(group.notes)
    assert not notes[0] and notes[1]


def indexed(net: Any, x: Tensor, y: Tensor) -> Any:
    return net.last(y[:, : int(y.sum()) * 0 + 16])


def sized(net: Any, x: Tensor, y: Tensor) -> Any:
    return net.last(y) + torch.zeros(int(y.argmax()), 1).sum()


def resized(net: Any, x: Tensor, y: Tensor) -> Any:
    return net.last(y) + torch.nn.functional.interpolate(x[None], scale_factor=y.mean().item()).mean()


def keyed(net: Any, x: Tensor, y: Tensor) -> Any:
    return net.last(y * {0.5: 1.0}.get(y.mean().item(), 2.0))


def arrayed(net: Any, x: Tensor, y: Tensor) -> Any:
    net.m = y.mean(0).detach().cpu().numpy()
    return net.last(y)


@pytest.mark.parametrize("how", [indexed, sized, resized, keyed, arrayed])
def test_what_they_are_no_arithmetic_for_is_refused(how: Callable[[Any, Tensor, Tensor], Any]) -> None:
    with pytest.raises(TraceError, match=r"test_read_values.py:\d+: .* depends on the values of a tensor"):
        fxprune.analyze(Logged(how).eval(), torch.randn(3, 10))
