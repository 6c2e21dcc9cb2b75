"""Code that changes a list or a dictionary which it was given: the slim network changes it as well, and pops what is there then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import assert_sound
from tests.passes.helpers import gap, zeroed

Change = Callable[["Net", Any], Any]


def reverse(net: Net, xs: list[Tensor]) -> Tensor:
    xs.reverse()
    return net.two(xs[1]) + xs[0]


def pop(net: Net, xs: list[Tensor]) -> Tensor:
    return net.two(xs.pop(0)) + xs[0]


def append(net: Net, xs: list[Tensor]) -> Tensor:
    xs.append(net.two(xs[0]))
    return xs[-1] + xs[1]


def put(net: Net, xs: list[Tensor]) -> Tensor:
    xs[0] = net.two(xs[0])
    return xs[0] + xs[1]


def insert(net: Net, xs: list[Tensor]) -> Tensor:
    xs.insert(1, net.two(xs[0]))
    return xs[1] + xs[2]


def extend(net: Net, xs: list[Tensor]) -> Tensor:
    xs.extend([net.two(xs[0]), xs[1]])
    return xs[2] + xs[3]


def add(net: Net, xs: list[Tensor]) -> Tensor:
    xs += [net.two(xs[0])]
    return xs[2] + xs[1]


def delete(net: Net, xs: list[Tensor]) -> Tensor:
    y = net.two(xs[0])
    del xs[0]
    return y + xs[0]


def inner(net: Net, xs: list[Tensor]) -> Any:
    xs.append(net.first(xs[0]))
    return net.second(xs[-1].relu()) + xs[1]


LISTS = (reverse, pop, append, put, insert, extend, add, delete)


def pop_key(net: Net, xs: dict[str, Tensor]) -> Tensor:
    low = xs.pop("low")
    return net.two(xs["high"]) + low + xs.pop("none", 0)


def update(net: Net, xs: dict[str, Tensor]) -> Tensor:
    xs.update(made=net.two(xs["high"]))
    xs["low"] = xs["low"] * 2
    return xs["made"] + xs["low"]


def delete_key(net: Net, xs: dict[str, Tensor]) -> Tensor:
    y = net.two(xs["high"]) + xs["low"]
    del xs["high"]
    xs.setdefault("high", y)
    return xs["high"]


DICTS = (pop_key, update, delete_key)


class Net(nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change, self.first, self.second = change, nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 8, 1)

    def two(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]

    def forward(self, xs: Any) -> Any:
        return self.change(self, xs)


class Around(nn.Module):
    """Code that looks at values around it, and reads the list afterwards."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.stem, self.net = nn.Conv2d(3, 8, 1), Net(change)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        if x.mean() > 100:
            x = x * 2
        given: Any = [x, x[..., ::2, ::2]]
        if self.net.change in DICTS:
            given = dict(zip(("high", "low"), given, strict=True))
        y = self.net(given)
        left = given.values() if isinstance(given, dict) else given
        return y, sum(one.mean((2, 3)) * (i + 1) for i, one in enumerate(left) if one.shape[1] == 8)


def inputs(change: Change, size: int = 8) -> Any:
    made = [torch.randn(2, 8, size, size), torch.randn(2, 8, size // 2, size // 2)]
    return dict(zip(("high", "low"), made, strict=True)) if change in DICTS else made


def copied(given: Any) -> Any:
    return dict(given) if isinstance(given, dict) else list(given)


def items(given: Any) -> list[tuple[Any, Tensor]]:
    return list(given.items() if isinstance(given, dict) else enumerate(given))


@pytest.mark.parametrize("change", [*LISTS, *DICTS])
def test_a_list_is_changed_as_the_original_changes_it(change: Change) -> None:
    torch.manual_seed(0)
    model, example = Net(change).eval(), inputs(change)
    before = copied(example)
    slim = fxprune.compress(model, 0.5, (example,), verify=True)
    assert all(one is other for (_, one), (_, other) in zip(items(example), items(before), strict=True)), "the example is the user's"
    assert not fxprune.record(slim).notes
    assert slim.get_parameter("first.weight").shape[0] == 8
    assert fxprune.profile(slim, (example,)).macs < fxprune.profile(model, (example,)).macs
    given = inputs(change, 12)
    theirs, ours = copied(given), copied(given)
    with torch.no_grad():
        wanted, found = zeroed(model, fxprune.record(slim).kept)(theirs), slim(ours)
    assert gap(wanted, found) < 1e-5
    assert [key for key, _ in items(theirs)] == [key for key, _ in items(ours)]
    for (_, one), (_, other) in zip(items(theirs), items(ours), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("change", [*LISTS, *DICTS])
def test_a_part_changes_what_it_is_given(change: Change) -> None:
    torch.manual_seed(0)
    assert_sound(Around(change).eval(), torch.randn(2, 3, 8, 8), removes=("net.first.weight", "net.second.weight"))


def test_what_goes_into_a_list_from_outside_keeps_its_width() -> None:
    graph = fxprune.analyze(Net(inner).eval(), (inputs(inner),))
    assert "it is put into a list that comes from outside at append" in graph.by_name["first"].reason
