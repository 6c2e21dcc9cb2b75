"""Pruning in steps: how much goes when, what stays away, and that the steps learn from each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, PolicyError
from fxprune.searching.recovery import put_back

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Shuffled(nn.Module):
    """With an index buffer, which pruning renumbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x))[:, self.order])
        return y


def network() -> nn.Module:
    torch.manual_seed(0)
    return Shuffled().eval()


def test_steps_take_equal_shares_and_what_went_stays_away() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[set[int]] = []

    def recover(slim: nn.Module) -> int:
        seen.append(set(fxprune.record(slim).removed_units["first"].tolist()))
        with torch.no_grad():  # what is left would now be the least important
            slim.get_parameter("first.weight").mul_(1e-3)
        return len(seen)

    done = fxprune.shrink(model, {"first": 0.75}, recover, X, steps=3)
    assert [len(gone) for gone in seen] == [2, 4, 6] and seen[0] < seen[1] < seen[2]
    assert [(h["step"], h["recovery"]) for h in done.history] == [(1, 1), (2, 2), (3, 3)]
    assert [h["params"] for h in done.history] == sorted((h["params"] for h in done.history), reverse=True)
    record = fxprune.record(done.model)
    assert done.history[-1]["params"] == record.after.params / record.before.params and not record.steps
    assert done.seconds > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Three recoveries, each on what the one before left.
    kept = record.kept["first.weight"][0]
    torch.testing.assert_close(done.model.get_parameter("first.weight"), before["first.weight"][kept] * 1e-9)


def test_one_step_is_compress() -> None:
    model = network()
    done = fxprune.shrink(model, 0.5, lambda slim: None, X, steps=1)
    slim = fxprune.compress(model, 0.5, X)
    assert all(torch.equal(tensor, slim.state_dict()[name]) for name, tensor in done.model.state_dict().items())
    again = fxprune.compress(model, fxprune.record(done.model).policy)
    assert torch.equal(again(X), slim(X))


def test_recovered_weights_go_back_and_index_buffers_stay() -> None:
    model = network()
    order = model.get_buffer("order").clone()
    slim = fxprune.compress(model, {"first": 0.5}, X)
    assert fxprune.record(slim).renumbered == ("order",)
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.add_(1)
    put_back(model, slim)
    assert torch.equal(model.get_buffer("order"), order)
    again = fxprune.compress(model, fxprune.Policy(fxprune.record(slim).policy.sparsity), X, importance=_kept_first(slim))
    assert all(torch.equal(tensor, slim.state_dict()[name]) for name, tensor in again.state_dict().items())


def _kept_first(slim: nn.Module) -> Callable[..., Tensor]:
    kept = fxprune.record(slim).kept["first.weight"][0]

    def importance(group: Any, module: nn.Module) -> Tensor:
        return torch.isin(torch.arange(group.size), kept).float()

    return importance


def test_what_cannot_be() -> None:
    with pytest.raises(InputError, match="steps is 0; it must be at least 1"):
        fxprune.shrink(network(), 0.5, lambda slim: None, X, steps=0)
    with pytest.raises(PolicyError, match="'fist' names no group .* did you mean group 'first'"):
        fxprune.shrink(network(), {"fist": 0.5}, lambda slim: None, X)


def test_ignored_modules_are_found_in_the_copy() -> None:
    model = network()
    done = fxprune.shrink(model, 0.5, lambda slim: None, X, steps=2, ignore=[model.get_submodule("first")])
    assert "first" not in fxprune.record(done.model).removed_units
