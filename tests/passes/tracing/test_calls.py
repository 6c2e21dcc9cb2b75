"""Calls in forms of their own: within a block of a device, counting, by the class of a tensor, dispatched by class, einops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxPruneError, TraceError
from tests.passes.helpers import gap, zeroed


class Net(nn.Module):
    def __init__(self, how: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), how

    def forward(self, x: Tensor) -> Any:
        return self.last(self.how(self.first(x)).relu())


def on_its_device(y: Any) -> Any:
    with torch.device(y.device):
        return y * torch.arange(y.shape[-1]) + torch.ones(y.shape[1], 1, 1)


def on_its_device_itself(y: Any) -> Any:
    with y.device:
        made = torch.rand(y.shape[1], 1, 1) * 0
    return y + made + torch.zeros(())


def on_a_device(y: Any) -> Any:
    with torch.device("cpu"):
        return y * torch.linspace(0, 1, y.shape[1])[:, None, None]


@pytest.mark.parametrize(("how", "told"), [(on_its_device, 2), (on_its_device_itself, 1), (on_a_device, 0)])
def test_what_is_made_in_a_block_of_a_device_is_made_there(how: Callable[[Any], Any], told: int) -> None:
    torch.manual_seed(0)
    model, x = Net(how).eval(), torch.randn(2, 3, 8, 8)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    reference = zeroed(model, fxprune.record(slim).kept)
    for other in (x, torch.randn(3, 3, 9, 12)):
        with torch.no_grad():
            assert gap(reference(other), slim(other)) < 1e-5
    made = [n for n in slim.graph.nodes if getattr(n.target, "__name__", "") in ("arange", "ones", "rand", "zeros", "linspace")]
    assert sum("device" in n.kwargs for n in made) == told


def test_a_block_of_a_device_is_not_that_of_the_caller() -> None:
    model, x = Net(on_a_device).eval(), torch.randn(2, 3, 8, 8)
    with torch.device("meta"):
        slim = fxprune.compress(model, 0.5, x)
    assert not any(n.kwargs.get("device") == torch.device("meta") for n in slim.graph.nodes)
    with torch.no_grad():
        assert gap(zeroed(model, fxprune.record(slim).kept)(x), slim(x)) < 1e-5


def test_only_devices_are_blocks() -> None:
    def within(y: Any) -> Any:
        with y:
            return y

    with pytest.raises(FxPruneError, match="'Tensor' object does not support the context manager protocol"):
        fxprune.analyze(Net(within), torch.randn(2, 3, 8, 8))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, rows: Tensor) -> Any:
        times = torch.bincount(rows, minlength=x.shape[0]) + rows.bincount(torch.ones_like(rows) * 0.5, x.shape[0])
        return self.last(self.first(x).relu() / times.clamp(min=1).to(x.dtype)[:, None])


def test_what_is_counted_is_counted_at_every_call() -> None:
    model, x = Counting().eval(), torch.randn(5, 6)
    slim = fxprune.compress(model, 0.5, (x, torch.tensor([0, 1, 1, 3, 3])), verify=True)
    assert slim.get_parameter("first.weight").shape[0] == 4
    reference = zeroed(model, fxprune.record(slim).kept)
    for given in ((x, torch.tensor([0, 4, 4, 4])), (torch.randn(7, 6), torch.tensor([6, 6, 1, 2, 3, 6]))):
        with torch.no_grad():
            assert gap(reference(*given), slim(*given)) < 1e-5


def test_a_method_that_is_called_by_its_class_is_named() -> None:
    with pytest.raises(TraceError, match=r"torch\.Tensor\.add\(x, \.\.\.\) is a call that a trace cannot follow; write x\.add\("):
        fxprune.analyze(Net(lambda y: torch.Tensor.add(y, y)), torch.randn(2, 3, 8, 8))


class Dispatched(Net):
    @functools.singledispatchmethod
    def act(self, y: Any) -> Any:
        raise NotImplementedError("of no other class")

    @act.register
    def _(self, y: Tensor) -> Any:
        return y.relu()

    def forward(self, x: Tensor) -> Any:
        return self.last(self.act(self.first(x)))


def test_a_function_that_is_chosen_by_class_is_named() -> None:
    with pytest.raises(TraceError, match=r"of no other class \(functools.singledispatch chooses by the class"):
        fxprune.analyze(Dispatched(lambda y: y), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("how", "noted"),
    [
        (lambda x: halves(*x.split(x.shape[2] // 2, 2)), True),  # a call takes any number
        (lambda x: named_halves(x, x.shape[2] // 2), False),
        (lambda x: named_halves(x, x.shape[3] // 2), True),  # of another axis
        (lambda x: torch.cat([part * 2 for part in x.split(x.shape[2] // 2, 2)], 2), True),
    ],
)
def test_halves_that_have_names_are_no_loop(how: Callable[[Any], Any], noted: bool) -> None:
    slim = fxprune.compress(Net(how).eval(), 0.5, torch.randn(2, 3, 8, 8))
    assert any("loop over a dimension of 2" in note for note in fxprune.record(slim).notes) == noted


def halves(first: Any, second: Any) -> Any:
    return first * second


def named_halves(x: Any, size: Any) -> Any:
    first, second = x.split(size, 2)
    return first * second


def test_einops_own_checks_are_not_noted() -> None:
    einops = pytest.importorskip("einops")

    def tokens(y: Any) -> Any:
        rows = einops.rearrange(y, "b c h w -> b (h w) c").tanh()
        return einops.rearrange(rows, "b (h w) c -> b c h w", h=y.shape[2])

    torch.manual_seed(0)
    model, x = Net(tokens).eval(), torch.randn(2, 3, 8, 8)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert not fxprune.record(slim).notes
    other = torch.randn(3, 3, 9, 12)
    with torch.no_grad():
        assert gap(zeroed(model, fxprune.record(slim).kept)(other), slim(other)) < 1e-5
