"""The suites that users run: they pass what is right, and each promise is broken once to see it fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.driver import Scored, Strategy
from fxprune.driver.problem import IntArray
from fxprune.passes.rules import registry
from fxprune.testing import StrategyContract, assert_ranks, assert_sound

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    head = (nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *middle, *head).eval()


class Lopsided(Strategy):
    def propose(self) -> list[IntArray]:
        if self.step >= 3:
            return []
        return [self.budget.fitted(self.budget.uniform() + self.rng.integers(0, 3, len(self.space.units))) for _ in range(3)]

    def learn(self, outcomes: Sequence[Scored]) -> None:
        """Nothing is remembered."""


class TestLopsided(StrategyContract):
    """As a user writes it."""

    strategy = Lopsided


class Endless(Lopsided):
    def propose(self) -> list[IntArray]:
        return [self.budget.uniform()]


class OwnDice(Lopsided):
    def propose(self) -> list[IntArray]:
        if self.step >= 3:
            return []
        return [self.budget.fitted(self.budget.uniform() + np.random.randint(0, 3, len(self.space.units)))]  # noqa: NPY002


class Forgetful(Lopsided):
    def start(self) -> None:
        self.count = 0

    def propose(self) -> list[IntArray]:
        self.count += 1
        return [] if self.count > 2 else super().propose()


class OffTarget(Lopsided):
    def propose(self) -> list[IntArray]:
        return [] if self.step >= 2 else [self.space.zeros()]


@pytest.mark.parametrize(
    ("strategy", "promise", "message"),
    [
        (Endless, "asks_for_vectors_in_bounds_and_ends", "does not end within a hundred rounds"),
        (OffTarget, "asks_for_vectors_in_bounds_and_ends", "no vector is on target"),
        (OwnDice, "the_seed_decides", "one seed gives two runs"),
        (OffTarget, "the_seed_decides", "two seeds give the same trials"),
        (Forgetful, "goes_on_from_its_state", "it goes on otherwise"),
    ],
)
def test_a_strategy_that_breaks_a_promise_fails(strategy: Any, promise: str, message: str) -> None:
    suite = StrategyContract()
    suite.strategy = strategy
    with pytest.raises(AssertionError, match=message):
        getattr(suite, f"test_{promise}")()


def test_a_sound_network_is_sound() -> None:
    model = net(nn.ReLU())
    graph = assert_sound(model, X, removes=["0.weight", "3.weight"])
    assert {g.name for g in graph.groups if g.prunable} == {"0", "3"}


@torch.library.custom_op("fxprune_tests::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


@turned.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.ops.fxprune_tests.turned(x)


def test_a_rule_that_lies_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    op = torch.ops.fxprune_tests.turned
    monkeypatch.setattr(registry, "FUNCTIONS", dict(registry.FUNCTIONS))
    with pytest.raises(AssertionError, match=r"\['0.weight'\] kept all its channels; .*turned"):
        assert_sound(net(Turned()), X, removes=["0.weight"])
    fxprune.register_op(op)(lambda ctx, node, x: ctx.pointwise(node, x))  # it turns the channels round
    with pytest.raises((AssertionError, fxprune.VerificationError), match="differs from the zeroed original"):
        assert_sound(net(Turned()), X)


def test_what_cannot_be_judged_is_said() -> None:
    with pytest.raises(AssertionError, match="nothing can be pruned"):
        assert_sound(nn.Sequential(nn.Conv2d(3, 8, 3)), X)
    with pytest.raises(AssertionError, match="zeroing is not defined for every group"):
        assert_sound(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 2, 3)), X)
    assert_sound(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 2, 3)), X, exact=False)
    with pytest.raises(AssertionError, match="not finite"):
        assert_sound(net(nn.ReLU()), X * float("inf"))


DATA = [(X, torch.tensor([0, 1]))]


OURS = ["l2", "l1", "variance", "random", "taylor", "reconstruction", lambda group, module: range(group.size)]


@pytest.mark.parametrize("importance", OURS)
def test_every_importance_of_ours_ranks(importance: Any) -> None:
    needs = importance in ("taylor", "reconstruction")
    found = assert_ranks(importance, net(nn.ReLU()), X, DATA if needs else None)
    assert set(found) == {"0", "3"} and len(found["0"]) == 8


def ones(graph: Any, data: Any) -> dict[str, Any]:
    return {g.name: np.ones(g.size) for g in graph.groups if g.prunable}


def dice(graph: Any, data: Any) -> dict[str, Any]:
    return {g.name: torch.rand(g.size) for g in graph.groups if g.prunable}


def backward(graph: Any, data: Any) -> dict[str, Any]:
    graph.model(X).sum().backward()
    return ones(graph, data)


def trains(graph: Any, data: Any) -> dict[str, Any]:
    graph.model.train()
    return ones(graph, data)


def shrinks(graph: Any, data: Any) -> dict[str, Any]:
    with torch.no_grad():
        next(graph.model.parameters()).mul_(0.5)
    return ones(graph, data)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (dice, "two calls with the same seed"),
        (backward, "gradients were changed"),
        (trains, "modes were changed"),
        (shrinks, "values were changed"),
    ],
)
def test_an_importance_that_breaks_a_promise_fails(rank: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_ranks(fxprune.Criterion("users", rank), net(nn.ReLU()), X)
