"""An error inside a rule or a rewrite never reaches the user: a rule locks what it touches, a rewrite says which line it is about."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import UnsupportedError
from fxprune.passes.ir.reasons import ReasonKind
from fxprune.passes.rules import registry


def scaled(x: Tensor) -> Tensor:
    return x * 2


torch.fx.wrap("scaled")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(scaled(self.b(self.a(x).relu())))
        return y


@pytest.fixture
def rules() -> Iterator[None]:
    yield
    registry.FUNCTIONS.pop(scaled, None)


@pytest.mark.parametrize("error", [KeyError("number"), IndexError(), AssertionError("labels"), TypeError("no"), RuntimeError("a\nb")])
def test_a_failing_rule_locks_what_it_touches(rules: None, error: Exception) -> None:
    @fxprune.register_op(scaled)
    def rule(ctx: object, node: fx.Node, x: object) -> None:
        raise error

    model, x = Net().eval(), torch.randn(2, 10)
    graph = fxprune.analyze(model, x)
    locked = graph.by_name["b"]
    assert not locked.prunable and locked.kind is ReasonKind.RULE_FAILED
    assert type(error).__name__ in locked.reason and "scaled" in locked.reason and "test_failing_rules.py:" in locked.reason
    assert "\n" not in locked.reason
    assert graph.by_name["a"].prunable
    with torch.no_grad():
        assert torch.equal(fxprune.compress(model, 0.0, x)(x), model(x))
    assert fxprune.compress(model, {"a": 0.5}, x).get_parameter("a.weight").shape == (8, 10)


def test_a_rule_that_gives_a_wrong_shape_locks(rules: None) -> None:
    @fxprune.register_op(scaled)
    def rule(ctx: object, node: fx.Node, x: object) -> object:
        return [x, x]

    graph = fxprune.analyze(Net().eval(), torch.randn(2, 10))
    assert graph.by_name["b"].kind is ReasonKind.RULE_FAILED and graph.by_name["a"].prunable


def test_a_failing_rewrite_names_the_line(rules: None) -> None:
    def rewrite(slim: object, node: fx.Node) -> None:
        raise KeyError("number")

    @fxprune.register_op(scaled, rewrite=rewrite)
    def rule(ctx: object, node: fx.Node, x: object) -> object:
        return ctx.pointwise(node, x, zero="first")  # type: ignore[attr-defined]

    model, x = Net().eval(), torch.randn(2, 10)
    with pytest.raises(UnsupportedError, match=r"test_failing_rules.py:\d+: .*scaled.*KeyError") as caught:
        fxprune.compress(model, 0.5, x)
    assert "\n" not in str(caught.value)
    fxprune.compress(model, {"a": 0.5}, x)
