"""What ``torch.compile`` was applied to within a network is traced through, and no copy runs code that is bound to the user's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, zeroed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.inner: Any = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Any:
        return self.last(self.inner(self.first(x)))


class Child(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.compile(self.inner, backend="eager")


class InPlace(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner.compile(backend="eager")
        self.inner[0].compile(backend="eager")


class Function(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = torch.compile(lambda y: y.relu() * 2, backend="eager")

    def forward(self, x: Tensor) -> Any:
        return self.last(self.act(self.first(x)))


class Method(Net):
    @torch.compile(backend="eager")
    def body(self, y: Tensor) -> Any:
        return self.inner(y).relu()

    def forward(self, x: Tensor) -> Any:
        return self.last(self.body(self.first(x)))


class ByValues(Child):
    """Its root cannot be traced, so the compiled child is a part."""

    def forward(self, x: Tensor) -> Any:
        y = self.inner(self.first(x))
        return self.last(y * 2 if y.sum() > 1e9 else y)


@pytest.mark.filterwarnings("ignore")  # of tracing within torch.compile
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kind", [Child, InPlace, Function, Method, ByValues])
def test_it_is_traced_through(kind: type[Net], ran: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 3, 6, 6)
    if ran:
        model(x)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in slim.named_parameters()} == names
    kept = fxprune.record(slim).kept
    assert any(name.startswith("inner." if kind is not Function else "first.") for name in kept)
    assert gap(zeroed(model, kept)(x), slim(x)) < 1e-5
    before = {name: p.clone() for name, p in model.named_parameters()}
    slim(x).sum().backward()
    assert not any(p.grad is not None for p in model.parameters())
    for p in slim.parameters():
        p.data.zero_()
    assert float(slim(x).abs().max().detach()) == 0, "it computes with weights of its own"
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    other = fxprune.compress(model, 0.5, x)
    fxprune.save(other, tmp_path / "slim.safetensors")
    assert gap(fxprune.load(tmp_path / "slim.safetensors", kind()).eval()(x), other(x)) < 1e-6
