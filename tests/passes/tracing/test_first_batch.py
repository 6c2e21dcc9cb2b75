"""State that is more than a cache: what forward takes from its first batch and keeps, and what training collects on a module."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxPruneError
from tests.passes.helpers import gap

X, OTHER = (
    torch.randn(5, 10, generator=torch.Generator().manual_seed(0)),
    torch.randn(7, 10, generator=torch.Generator().manual_seed(1)) * 3,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 16), nn.Linear(16, 4)
        self.start()

    def start(self) -> None: ...

    def forward(self, x: Tensor) -> Any:
        return self.b(self.inside(self.a(x)))

    def inside(self, y: Tensor) -> Any:
        return y


class Step(Net):
    """The step size of a learned quantiser."""

    def start(self) -> None:
        self.step: Any = None

    def inside(self, y: Tensor) -> Any:
        if self.step is None:
            self.step = y.detach().abs().mean()
        return (y / self.step).tanh()


class Flag(Net):
    def start(self) -> None:
        self.step, self.done = torch.ones(()), False

    def inside(self, y: Tensor) -> Any:
        if not self.done:
            self.step, self.done = y.detach().abs().mean(), True
        return (y / self.step).tanh()


class Held(Net):
    def start(self) -> None:
        self.known: dict[str, Tensor] = {}

    def inside(self, y: Tensor) -> Any:
        if "mean" not in self.known:
            self.known["mean"] = y.detach().mean(0)
        return y - self.known["mean"]


class ActNorm(Net):
    """The first batch gives the weights, which are trained afterwards."""

    def start(self) -> None:
        self.shift, self.ready = nn.Parameter(torch.zeros(16)), False

    def inside(self, y: Tensor) -> Any:
        if not self.ready:
            self.shift.data.copy_(y.mean(0))
            self.ready = True
        return y - self.shift


@pytest.mark.parametrize("kind", [Step, Flag, Held, ActNorm])
@pytest.mark.parametrize("first", ["example", "another"])
def test_what_the_first_batch_left_stays(kind: type[Net], first: str) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        model(X if first == "example" else OTHER)
        if isinstance(model, ActNorm):
            model.shift.add_(torch.randn(16))  # training
        slim = fxprune.compress(model, 0.0, X).eval()
        for x in (X, OTHER, X):
            assert gap(model(x), slim(x)) < 1e-6
    if isinstance(model, ActNorm):
        assert torch.equal(slim.get_parameter("shift"), model.shift)
    fxprune.compress(model, 0.5, X, verify=True)


class Listed(Net):
    def start(self) -> None:
        self.seen: Any = []

    def inside(self, y: Tensor) -> Any:
        if self.training:
            self.seen.append(y.detach().mean(0))
        return y - sum(self.seen) / max(1, len(self.seen))


class InADeque(Listed):
    def start(self) -> None:
        self.seen = collections.deque(maxlen=3)


class Own(list[Tensor]):
    """A list of the user's own."""


class InAnOwnList(Listed):
    def start(self) -> None:
        self.seen = Own()


class Counted(Net):
    def start(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()

    def inside(self, y: Tensor) -> Any:
        if self.training:
            self.calls["n"] += 1
        return y / max(1, self.calls["n"])


@pytest.mark.parametrize("kind", [Listed, InADeque, InAnOwnList, Counted])
@pytest.mark.parametrize("calls", [1, 5])
def test_what_training_collected_is_used_and_stays(kind: type[Net], calls: int) -> None:
    torch.manual_seed(0)
    model = kind().train()
    with torch.no_grad():
        for _ in range(calls):
            model(torch.randn(4, 10))
        model.eval()
        before = model(X)
        slim = fxprune.compress(model, 0.0, X).eval()
        for x in (X, OTHER):
            assert gap(model(x), slim(x)) < 1e-6
        assert torch.equal(model(X), before), "the model is as it was"
    fxprune.compress(model, 0.5, X, verify=True)
    collected: Any = model
    assert (len(collected.seen) if isinstance(model, Listed) else collected.calls["n"]) == min(calls, 3 if kind is InADeque else calls)


def answered(y: Tensor) -> Any:
    return y if torch.is_grad_enabled() else y.detach()


def put_back(y: Tensor) -> Any:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    z = y * 2
    torch.set_grad_enabled(before)
    return y + z


def asked(y: Tensor) -> Any:
    return y * 2 if y.requires_grad else y


def seeded(y: Tensor) -> Any:
    torch.manual_seed(7)
    return y + torch.randn(y.shape[0], 16)


@pytest.mark.parametrize(("how", "said"), [(answered, "is_grad_enabled"), (put_back, "is_grad_enabled"), (asked, "requires_grad")])
def test_code_that_asks_whether_gradients_flow_is_named(how: Any, said: str) -> None:
    class Asks(Net):
        def inside(self, y: Tensor) -> Any:
            return how(y)

    torch.manual_seed(0)
    model = Asks().train()
    slim = fxprune.compress(model, 0.0, X).train()
    assert any(said in note for note in fxprune.record(slim).notes)
    if how is not asked:
        for one in (model, slim):
            one(X).square().sum().backward()
        found = slim.get_parameter("a.weight").grad
        assert found is not None and model.a.weight.grad is not None and torch.allclose(found, model.a.weight.grad, atol=1e-4)
    assert torch.is_grad_enabled()


def test_seeds_are_named() -> None:
    class Seeds(Net):
        def inside(self, y: Tensor) -> Any:
            return seeded(y)

    assert any("seeds torch's random numbers" in note for note in fxprune.record(fxprune.compress(Seeds().eval(), 0.0, X)).notes)


@pytest.mark.parametrize("name", ["vjp", "jacobian"])
def test_derivatives_in_forward_are_refused(name: str) -> None:
    class Derives(Net):
        def inside(self, y: Tensor) -> Any:
            found = getattr(torch.autograd.functional, name)(lambda z: z.square().sum(), y)
            return found[1] if name == "vjp" else found

    with pytest.raises(FxPruneError, match=f"a derivative .torch.autograd.functional.{name}"):
        fxprune.compress(Derives().eval(), 0.5, X)
