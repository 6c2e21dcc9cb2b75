"""Plain Python objects in forward: lists repeated by a size, None among the results of a part, dictionaries that parts are given, types
that are compared, modules that are moved, code that has no module of its own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import assert_sound
from tests.passes.helpers import gap, zeroed

SPACE: dict[str, Any] = {"torch": torch}
exec("def halved(y):\n    return y.reshape(y.shape[0], y.shape[1] // 2, 2, -1).flatten(1, 2)", SPACE)  # as einx makes its code


class Net(nn.Module):
    def __init__(self, how: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(6, 16), nn.Linear(16, 4), how
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.how(self, self.a(x)))


def chunks(y: Any) -> Any:
    return y.split(4, dim=1), y.shape[1] // 4


def repeated_flags(net: Any, y: Any) -> Any:
    parts, n = chunks(y)
    return torch.cat([part if flag is True else part * 2 for part, flag in zip(parts, [True] * n, strict=True)], 1)


def repeated_none(net: Any, y: Any) -> Any:
    parts, n = chunks(y)
    return torch.cat([part if mask is None else part.masked_fill(~mask, 0) for part, mask in zip(parts, n * (None,), strict=True)], 1)


def repeated_functions(net: Any, y: Any) -> Any:
    parts, n = chunks(y)
    return torch.cat([run(part) for part, run in zip(parts, [torch.relu, net.inner][:1] * n, strict=True)], 1)


def repeated_modules(net: Any, y: Any) -> Any:
    parts, n = chunks(y)
    return torch.cat([run(part) for part, run in zip(parts, [net.inner] * n, strict=True)], 1)


def moved(net: Any, y: Any) -> Any:
    net.inner.to(y.device)
    return net.inner.to(y.device, y.dtype)(y)


def without_a_module(net: Any, y: Any) -> Any:
    return SPACE["halved"](y)


def copied(net: Any, y: Any) -> Any:
    with torch.no_grad():
        kept = copy.deepcopy(y.detach())
    return net.inner(copy.copy(y)) + copy.deepcopy([kept, 2])[0]


LOOPS = (repeated_flags, repeated_none, repeated_functions, repeated_modules)


@pytest.mark.parametrize("how", [*LOOPS, moved, without_a_module, copied])
def test_it_is_pruned(how: Callable[[Any, Any], Any]) -> None:
    torch.manual_seed(0)
    model, x = Net(how).eval(), torch.randn(2, 8, 6)
    assert_sound(model, x, removes=("a.weight",))
    slim = fxprune.compress(model, 0.5, x, verify=True)
    reference, notes = zeroed(model, fxprune.record(slim).kept), fxprune.record(slim).notes
    assert bool(notes) == (how in (*LOOPS, moved))
    for other in (torch.randn(3, 8, 6), *([] if how in LOOPS else [torch.randn(1, 12, 6)])):
        with torch.no_grad():
            assert gap(reference(other), slim(other)) < 1e-5


def test_code_without_a_module_may_ask_for_sizes() -> None:
    space: dict[str, Any] = {}
    exec("def ask(y):\n    return y * 2 if y.shape[1] > 100 else y", space)
    slim = fxprune.compress(Net(lambda net, y: space["ask"](y)).eval(), 0.5, torch.randn(2, 8, 6), verify=True)
    assert any("a condition" in note for note in fxprune.record(slim).notes)


def of_a_type(rate: Any) -> Any:
    if type(rate) is not int and type(rate) not in (float, bool):  # no assert, which pytest would rewrite
        raise TypeError
    return rate if type(rate) is not float else int(rate)


def types(net: Any, y: Any) -> Any:
    high = int(y.shape[1] / 2)
    return y.reshape(y.shape[0], of_a_type(high), of_a_type(2), -1).flatten(1, 2) * of_a_type(1.0)


def test_types_that_are_compared_cost_no_size() -> None:
    torch.manual_seed(0)
    model, x = Net(types).eval(), torch.randn(2, 8, 6)
    slim = fxprune.compress(model, 0.5, x)
    assert not fxprune.record(slim).notes
    with torch.no_grad():
        for other in (x, torch.randn(3, 12, 6)):
            assert gap(zeroed(model, fxprune.record(slim).kept)(other), slim(other)) < 1e-5


class Embedding(nn.Module):
    """It looks at values, and gives None for what it was not given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 16)

    def forward(self, x: Tensor, still: Any = None) -> Any:
        y = self.layer(x)
        if float(y.sum()) > 1e9:
            y = y * 2
        return None if still is None else self.layer(still), y


class Around(nn.Module):
    encoder: Any  # other configurations have one

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down, self.out = Embedding(), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        still, y = self.embedding(x)
        if still is not None:
            y = y + self.encoder(still)
        return self.out(self.down(self.up(y).relu()) + y)


def test_none_among_the_results_of_a_part_is_none() -> None:
    torch.manual_seed(0)
    graph = assert_sound(Around().eval(), torch.randn(2, 5, 6), removes=("up.weight",))
    assert not graph.traced.parts, "the root is traced"


def by_keys(given: Any) -> Any:
    return {key: given[key] for key in given.keys()}  # noqa: SIM118 - what users write


def by_zip(given: Any) -> Any:
    return dict(zip(given.keys(), [value * 1 for value in given.values()], strict=True))


class Part(nn.Module):
    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.up, self.down, self.read = nn.Linear(16, 24), nn.Linear(24, 4), read

    def forward(self, given: Any) -> Any:
        found = self.read(given)
        return self.down((self.up(found["a"]) * found["b"]).relu())


class Whole(nn.Module):
    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.part, self.a, self.b = Part(read), nn.Linear(6, 16), nn.Linear(6, 24)

    def forward(self, x: Tensor) -> Any:
        x = x + int((x.sum() > 1e9).item())
        return self.part({"a": self.a(x), "b": self.b(x)})


@pytest.mark.parametrize("read", [by_keys, by_zip, dict])
def test_a_part_that_is_given_a_dictionary(read: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    given = {"a": torch.randn(2, 5, 16), "b": torch.randn(2, 5, 1)}
    assert_sound(Part(read).eval(), (given,), removes=("up.weight",))
    graph = fxprune.analyze(Whole(read).eval(), torch.randn(2, 5, 6))
    assert [*graph.traced.parts] == ["part"]


def by_lambda(old: Any) -> Any:
    return lambda x: old(x) * 2


def by_wraps(old: Any) -> Any:
    @functools.wraps(old)
    def forward(*args: Any, **named: Any) -> Any:
        return old(*args, **named) * 2

    return forward


def by_default(old: Any) -> Any:
    def forward(x: Tensor, old: Any = old) -> Any:
        return old(x) * 2

    return forward


@pytest.mark.parametrize("wrap", [by_lambda, by_wraps, by_default])
@pytest.mark.parametrize("times", [1, 2])
def test_a_wrapped_forward_computes_with_the_layers_own_weights(wrap: Callable[[Any], Any], times: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(3, 8)
    for _ in range(times):
        model[0].forward = wrap(model[0].forward)
    want = model(x)
    assert_sound(model, x, removes=("0.weight", "2.weight"))
    slim = fxprune.compress(model, 0.5, x, verify=True)
    slim(x).sum().backward()
    assert {name for name, _ in slim.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert not [*slim.named_buffers()] and slim.get_parameter("0.weight").grad is not None and torch.equal(model(x), want)
