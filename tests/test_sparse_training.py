"""``fxprune.regularize``: training drives whole channels to zero, and ``Policy.from_zeros`` takes them out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import InputError
from tests.test_asking import X, net


def test_the_penalty_is_the_group_lasso_of_whole_units() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    penalty = fxprune.regularize(fxprune.analyze(model, torch.randn(2, 4)), strength=0.5)
    first, last = model[0], model[2]
    rows = [torch.cat([first.weight[i], first.bias[i : i + 1], last.weight[:, i]]) for i in range(3)]  # type: ignore[index]
    wanted = 0.5 * sum((r.norm() * len(r) ** 0.5 for r in rows), torch.zeros(()))
    assert torch.allclose(penalty(), wanted)
    penalty().backward()
    assert first.weight.grad is not None and last.bias.grad is None


def test_the_penalty_of_zeros_has_a_gradient_without_nan() -> None:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    penalty = fxprune.regularize(fxprune.analyze(model, X))
    total = penalty() + model(X).sum()
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_shrinking_reaches_zero_and_what_is_zero_goes_exactly() -> None:
    torch.manual_seed(0)
    model = net().train()
    graph = fxprune.analyze(model, X)
    penalty = fxprune.regularize(graph, strength=1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    zero = 0
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), torch.tensor([0, 1])).backward()
        optimizer.step()
        zero = penalty.shrink(0.01)
        if zero > 10:
            break
    assert 10 < zero < 48
    model.eval()
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    slim = fxprune.compress(model, policy, X)
    assert sum(len(u) for u in fxprune.record(slim).removed_units.values()) >= zero - 3  # one unit of each group stays
    with torch.no_grad():
        assert torch.allclose(slim(X), model(X), atol=1e-5)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="strength is 0; it must be a number above 0"):
        fxprune.regularize(fxprune.analyze(net(), X), strength=0)
    with pytest.raises(InputError, match="no prunable group"):
        fxprune.regularize(fxprune.analyze(nn.Linear(3, 3), torch.randn(2, 3)))
