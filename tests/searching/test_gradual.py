"""Pruning while a network trains: how much goes when, and that training goes on with what is left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, PolicyError, TargetError
from fxprune.passes.coupling.graph import Group

X = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = (X.mean((1, 2, 3)) > 0).long() + 2 * (X[:, 0, :4].mean((1, 2)) > 0).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 4))


def trained(pruning: fxprune.GradualPruning, steps: int, scheduler: torch.optim.lr_scheduler.LRScheduler | None = None) -> list[bool]:
    cut = []
    for _ in range(steps):
        pruning.optimizer.zero_grad()
        F.cross_entropy(pruning.model(X), Y).backward()
        pruning.optimizer.step()
        if scheduler is not None:
            scheduler.step()
        cut.append(pruning.step())
    return cut


def test_cuts_come_when_they_are_due_and_reach_the_target_by_the_cubic_curve() -> None:
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruning = fxprune.GradualPruning(model, optimizer, X[:1], "macs=0.4", begin=2, end=8, cuts=4)
    first = pruning.model.get_parameter("0.weight")
    assert trained(pruning, 11) == [step in (2, 4, 6, 8) for step in range(11)]
    assert [step for step, _ in pruning.history] == [2, 4, 6, 8]
    left = [share for _, share in pruning.history]
    for share, cut in zip(left, (1, 2, 3, 4), strict=True):
        wanted = 0.4 + 0.6 * (1 - cut / 4) ** 3
        assert wanted - 0.06 < share <= wanted + 1e-6
    costs = fxprune.record(pruning.model)
    assert costs.after.macs / costs.before.macs == pytest.approx(left[-1]) and costs.before.macs == fxprune.profile(model, X[:1]).macs
    assert pruning.model.training and first is model.get_parameter("0.weight")
    held = {parameter for group in pruning.optimizer.param_groups for parameter in group["params"]}
    assert held == set(pruning.model.parameters())
    assert all(state["step"] == 11 for state in pruning.optimizer.state.values()), "the moments went along through every cut"
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "it was trained up to the first cut"


def test_parameters_schedules_and_options_are_followed() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    seen: list[str] = []

    def ranked(group: Group, module: nn.Module) -> Tensor:
        seen.append(group.name)
        return torch.arange(group.size).float()

    pruning = fxprune.GradualPruning(
        model, optimizer, X[:1], "params=0.5", begin=0, end=0, cuts=1, schedulers=[scheduler], importance=ranked, round_to=4
    )
    assert trained(pruning, 3, scheduler) == [True, False, False]
    assert pruning.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**3)
    assert seen and pruning.history[0][1] <= 0.5
    kept = fxprune.record(pruning.model).kept["0.weight"][0]
    assert len(kept) % 4 == 0 and int(kept.max()) == 23


def test_what_does_not_fit_is_said() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for begin, end, cuts in ((5, 4, 8), (-1, 4, 1), (0, 4, 0), (0, 2, 8)):
        with pytest.raises(InputError, match="begin=.*cuts="):
            fxprune.GradualPruning(model, optimizer, X[:1], begin=begin, end=end, cuts=cuts)
    with pytest.raises(InputError, match="macs or params"):
        fxprune.GradualPruning(model, optimizer, X[:1], "sparsity=0.5", begin=0, end=1, cuts=1)
    with pytest.raises(PolicyError, match="METRIC=SHARE"):
        fxprune.GradualPruning(model, optimizer, X[:1], "half", begin=0, end=1, cuts=1)
    pruning = fxprune.GradualPruning(model, optimizer, X[:1], "macs=0.5", begin=0, end=1, cuts=1, ignore="*")
    with pytest.raises(TargetError):
        trained(pruning, 1)
