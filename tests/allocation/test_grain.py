"""In what multiples a target is met where the user does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.allocation.grain import GRAIN, multiple_for_bounds


def chain(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)).eval()


X = torch.randn(2, 3, 8, 8)
WIDE, NARROW = chain(96, 128, 160, 192, 128, 96), chain(16, 32, 64)
DEEP = chain(16, 16, 24, 24, 32, 256)
LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()


@pytest.mark.parametrize(
    ("model", "bounds", "most", "found"),
    [
        (WIDE, {"macs": 0.5}, None, GRAIN),
        (WIDE, {"params": 0.4, "macs": 0.9}, None, GRAIN),  # one of them binds
        (WIDE, {"macs": 0.97}, None, 1),  # multiples of 8 come no nearer than some percent
        (WIDE, {"macs": 0.5}, 0.05, 1),  # cannot be met, whose error should name what single units come to
        (WIDE, {"energy": 0.5}, None, 1),  # a cost of the user's own
        (NARROW, {"macs": 0.5}, None, 1),
        (DEEP, {"macs": 0.5}, None, 1),  # one wide group among narrow ones
        (LINEAR, {"macs": 0.5}, None, 1),
    ],
)
def test_wide_convolutional_networks_keep_multiples_of_eight(
    model: nn.Module, bounds: Mapping[str, float], most: float | None, found: int
) -> None:
    assert multiple_for_bounds(fxprune.analyze(model, X), [bounds], most) == found


def test_every_point_of_a_run_has_to_come_near() -> None:
    graph = fxprune.analyze(WIDE, X)
    assert multiple_for_bounds(graph, [{"macs": 0.7}, {"macs": 0.5}]) == GRAIN
    assert multiple_for_bounds(graph, [{"macs": 0.97}, {"macs": 0.5}]) == 1


def widths(slim: nn.Module) -> list[int]:
    return [module.out_channels for module in slim.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("calibration", [None, [torch.randn(4, 3, 8, 8) for _ in range(4)]])
def test_a_target_says_so_in_its_record_and_another_multiple_can_be_asked_for(calibration: list[torch.Tensor] | None) -> None:
    slim = fxprune.compress(WIDE, "macs=0.5", X, calibration=calibration)
    record = fxprune.record(slim)
    assert all(width % GRAIN == 0 for width in widths(slim)) and record.policy.options["round_to"] == GRAIN
    assert (0.49 if calibration is None else 0.47) <= record.after.macs / record.before.macs <= 0.5
    again = fxprune.compress(WIDE, record.policy, X)
    assert widths(again) == widths(slim)
    single = fxprune.compress(WIDE, "macs=0.5", X, calibration=calibration, round_to=1)
    assert any(width % GRAIN for width in widths(single)) and fxprune.record(single).policy.options["round_to"] == 1
    assert any(width % GRAIN for width in widths(fxprune.compress(WIDE, 0.37, X))), "only a target chooses"


@pytest.mark.parametrize(("asked", "even"), [({}, True), ({"round_to": 1}, False), (None, False)])
def test_a_search_does_so_too_and_the_paper_does_not(asked: dict[str, Any] | None, even: bool) -> None:
    options: dict[str, Any] = {"targets": "macs=0.5", "strategy": "uniform", "repair": "none"}
    paper = fxprune.SearchConfig.preset("paper", recover_every=0, **options)
    config = paper if asked is None else fxprune.SearchConfig(**options, **asked)
    found = fxprune.search(WIDE, X, lambda slim: 0.5, config=config, calibration=[X])
    assert all(width % GRAIN == 0 for width in widths(found.model)) == even
