"""A note that something was specialised stands exactly where a number in the graph would be another with other inputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxprune
from tests.passes.helpers import call, gap


class Tokens(nn.Module):
    """``run`` on tokens (N, L, 8) between two layers."""

    def __init__(self, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.conv, self.qkv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 24), nn.Linear(8, 3)
        self.lstm, self.pool, self.flat = nn.LSTM(8, 8, batch_first=True), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten()
        self.table, self.token = nn.Parameter(torch.randn(1, 16, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.out(self.run(self, self.conv(x).flatten(2).transpose(1, 2)))


def grouped(s: Any, x: Any) -> Any:
    n, length, width = x.shape
    kernel = torch.ones(n, 1, 1, 1)
    return F.conv2d(x.reshape(1, n, length, width), kernel, groups=n).reshape(n, length, width)


def doubled(s: Any, x: Any) -> Any:
    n = x.size(1)
    return torch.fft.irfft(torch.fft.rfft(x, n=2 * n, dim=1), n=2 * n, dim=1)[:, :n]


def chunks(s: Any, x: Any) -> Any:
    q, k, v = s.qkv(x).chunk(3, -1)
    return (q @ k.mT / math.sqrt(k.size(-1))).softmax(-1) @ v


def heads(s: Any, x: Any) -> Any:
    n, length, width = x.shape
    q, k, v = s.qkv(x).reshape(n, length, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return ((q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))).softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)


def parts(s: Any, x: Any) -> Any:
    first, second = x.split(4, -1)
    return torch.cat([first, second], -1) / math.sqrt(first.size(-1))


def joined(s: Any, x: Any) -> Any:
    return x / math.sqrt(torch.cat([x, x], -1).size(-1)) / math.sqrt(torch.stack([x, x, x], 1).size(1))


def contracted(s: Any, x: Any) -> Any:
    return x / math.sqrt(torch.einsum("nlc,nlc->c", x, x).size(0)) / math.sqrt((x.mT @ x).size(-2))


def reduced(s: Any, x: Any) -> Any:
    return x / math.sqrt(x.mean(1).size(-1)) / math.sqrt(x.unsqueeze(1).size(-1)) / math.sqrt(x.amax(-1, keepdim=True).size(-1))


def pooled(s: Any, x: Any) -> Any:
    image = x.mT.unflatten(-1, (4, -1))
    return x / math.sqrt(s.flat(s.pool(image)).size(1)) / math.sqrt(F.adaptive_avg_pool2d(image, 1).flatten(1).size(1))


def numpy_numbers(s: Any, x: Any) -> Any:
    q, k, _ = s.qkv(x).chunk(3, -1)
    return np.float64(0.5) * x + x * np.float32(2.0) + (q @ k.mT / np.sqrt(k.size(-1)) / np.power(k.shape[-1], 0.25)) @ x


def numpy_products(s: Any, x: Any) -> Any:
    return x.mT.reshape(x.size(0), np.prod(x.shape[1:])).unflatten(1, (8, -1)).mT


def roots(s: Any, x: Any) -> Any:
    return x / math.sqrt(x.size(1)) * math.ceil(x.size(1) / 3) / np.sqrt(x.size(1)) / float(x.size(1))


def made_modules(s: Any, x: Any) -> Any:
    n = x.size(1)
    return x + nn.AvgPool1d(n)(x.mT).mT + nn.AvgPool2d((n, 1))(x[:, None])[:, 0]


def recurrent(s: Any, x: Any) -> Any:
    y, _ = s.lstm(x)
    return y / math.sqrt(y.size(-1))


TRUE_TO_SIZE = [
    grouped,
    doubled,
    chunks,
    heads,
    parts,
    joined,
    contracted,
    reduced,
    pooled,
    recurrent,
    numpy_numbers,
    numpy_products,
    made_modules,
    roots,
]


@pytest.mark.parametrize("run", TRUE_TO_SIZE)
def test_sizes_that_stay_in_the_graph_or_are_channels_need_no_note(run: Callable[[Any, Any], Any]) -> None:
    torch.manual_seed(0)
    model, x, other = Tokens(run).eval(), torch.randn(2, 3, 4, 4), torch.randn(3, 3, 4, 8)
    graph = fxprune.analyze(model, x)
    assert graph.notes == ()
    with torch.no_grad():
        assert gap(call(model, (other,)), call(fxprune.compress(graph, 0.0), (other,))) < 1e-5


def counted(s: Any, x: Any) -> Any:
    """One line asks twice: the function of torch takes nothing back of what range() has asked for."""
    return sum([torch.fft.ifft(torch.fft.fft(x, n=x.size(1), dim=1), dim=1).real for _ in range(x.size(1))])


def repeated(s: Any, x: Any) -> Any:
    for _ in range(x.size(0)):
        x = torch.roll(x, x.size(1) // 2, 1) + 1
    return x


SPECIALISED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "pieces": (lambda s, x: torch.cat([c * 2 for c in x.chunk(100, 1)], 1), "loop over a dimension of 16"),
    "numpy": (lambda s, x: x / np.cbrt(x.size(1)), "numpy.cbrt() on the value 16"),
    "a function of two": (lambda s, x: x / math.gcd(x.size(1), 6), "an index on the value 16"),
    "counted": (counted, "an index on the value 16"),
    "repeated": (repeated, "an index on the value 1 "),
    "one sample meets a table": (lambda s, x: x / operator.index((x + s.table).size(0)), "an index on the value 1 "),
    "a token for each sample": (lambda s, x: x / operator.index(s.token.expand(x.size(0), -1, -1).size(0)), "an index on the value 1 "),
    "copies": (lambda s, x: x / operator.index(s.token.repeat(x.size(0), 1, 1).size(0)), "an index on the value 1 "),
    "a table cut to length": (lambda s, x: x / operator.index(s.table[:, : x.size(1)].size(1)), "an index on the value 16"),
    "narrowed": (lambda s, x: x / operator.index(s.table.narrow(1, 0, x.size(1)).size(1)), "an index on the value 16"),
    "a vector": (lambda s, x: x / operator.index((x @ torch.ones(8)).size(-1)), "an index on the value 16"),
    "pooled": (lambda s, x: x / operator.index(F.max_pool1d(x.mT, 2).size(-1)), "an index on the value 8"),
}


@pytest.mark.parametrize("name", SPECIALISED)
def test_numbers_that_stand_for_the_input_are_noted(name: str) -> None:
    run, note = SPECIALISED[name]
    (found,) = fxprune.analyze(Tokens(run).eval(), torch.randn(1, 3, 4, 4)).notes
    assert note in found and "test_notes.py" in found


@fx.wrap
def select(x: Tensor) -> Tensor:
    """No ``torch.select``, and kept whole."""
    return x[:, 0] if x.sum() > 0 else -x[:, 0]


class Given(nn.Module):
    """A number is an input."""

    def __init__(self, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.run = nn.Linear(6, 8), nn.Linear(8, 3), run

    def forward(self, x: Tensor, n: int) -> Any:
        return self.b(self.run(self.a(x), n))


def test_numbers_among_the_inputs() -> None:
    x = torch.randn(2, 6)
    assert fxprune.analyze(Given(lambda x, n: x * n).eval(), (x, 2)).notes == ()
    (loop,) = fxprune.analyze(Given(lambda x, n: sum(x + i for i in range(n))).eval(), (x, 2)).notes
    assert "an index on the value 2 was specialised" in loop
    (branch,) = fxprune.analyze(Given(lambda x, n: x if n > 1 else -x).eval(), (x, 2)).notes
    assert "a condition on the value True was specialised" in branch


def test_numbers_in_a_dict_among_the_inputs() -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, options: dict[str, Any]) -> Any:
            y = self.a(x).relu() if x.dtype == torch.float32 else self.a(x)
            return self.b(sum(y + i for i in range(options["steps"])))

    kind, note = sorted(fxprune.analyze(Options().eval(), (torch.randn(2, 6), {"steps": 3})).notes, key=lambda n: "value 3" in n)
    assert "an index on the value 3 was specialised" in note and "dtype" in kind


def test_other_peoples_functions_of_the_same_names() -> None:
    (note,) = [
        n
        for n in fxprune.analyze(Given(lambda x, n: x / operator.index(select(x).size(0))).eval(), (torch.randn(2, 6), 1)).notes
        if "index" in n
    ]
    assert "an index on the value 2 was specialised" in note


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.b(torch.fft.fft(y, n=2 * y.size(0), dim=0).real)


def test_a_graph_module_asks_at_one_place_for_all_its_nodes() -> None:
    traced = fx.symbolic_trace(Doubled().eval())
    assert fxprune.analyze(traced, torch.randn(5, 6)).notes == ()
    size = next(n for n in traced.graph.nodes if n.target == "size")
    product = next(iter(size.users))
    with traced.graph.inserting_after(product):
        number = traced.graph.call_function(operator.index, (product,))
    product.replace_all_uses_with(number, delete_user_cb=lambda user: user is not number)
    traced.recompile()
    (note,) = fxprune.analyze(traced, torch.randn(5, 6)).notes
    assert "an index on the value 10 was specialised" in note
    number.target = int  # which stays a call
    traced.recompile()
    slim = fxprune.compress(traced, 0.5, torch.randn(5, 6))
    assert not fxprune.record(slim).notes and slim(torch.randn(7, 6)).shape == (14, 3)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        for _ in range(400):
            y = y + 1
        return self.b(y / math.sqrt(y.size(1)))


def test_networks_deeper_than_python_recurses() -> None:
    assert fxprune.analyze(Deep().eval(), torch.randn(2, 6)).notes == ()
