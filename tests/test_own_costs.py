"""Searches with costs of the user's own as targets, limits on groups, and a loss for the importance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.cli.arguments import read
from fxprune.cli.options import Options
from fxprune.driver.config import read_most
from fxprune.errors import EvaluationError, PolicyError, SearchError, TargetError
from tests.test_asking import X, net


def energy(module: nn.Module) -> float:
    """Any number of a network: here its weights, those of 1 x 1 kernels counted four times."""
    assert not module.training and not torch.is_grad_enabled()
    return float(sum(p.numel() * (4 if p.ndim == 4 and p.shape[-1] == 1 else 1) for p in module.parameters()))


def squared(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return output.square().mean()


def config(**options: Any) -> fxprune.SearchConfig:
    return fxprune.SearchConfig(**{"strategy": "uniform", "repair": "none", "tolerance": 0.05, **options})


@pytest.mark.parametrize("cost", [energy, "tests.test_own_costs:energy"])
@pytest.mark.parametrize("strategy", ["uniform", "random"])
def test_a_cost_of_the_users_own_is_a_target(cost: Any, strategy: str) -> None:
    options = config(targets={"energy": 0.5}, costs={"energy": cost}, strategy=strategy, rounds=2)
    result = fxprune.search(net(), X, lambda slim: 0.5, config=options)
    with torch.no_grad():
        assert 0.45 <= energy(result.model.eval()) / energy(net()) <= 0.525


def test_beside_another_target() -> None:
    result = fxprune.search(net(), X, lambda slim: 0.5, config=config(targets=["energy=0.6", "macs=0.4"], costs={"energy": energy}))
    record = fxprune.record(result.model)
    with torch.no_grad():
        assert energy(result.model.eval()) / energy(net()) <= 0.63 and record.after.macs / record.before.macs <= 0.42


def test_costs_that_are_none_are_refused() -> None:
    for costs, words in (
        ({"macs": energy}, "cannot be named 'macs'"),
        ({"energy": 3}, "cost 'energy' is 3; it must be a function"),
        ("energy", "cost 'energy' is malformed; write NAME=module:function"),
    ):
        with pytest.raises(SearchError, match=words):
            fxprune.SearchConfig(costs=costs)
    with pytest.raises(SearchError, match="unknown target 'energy'.*or give a cost of your own: costs="):
        fxprune.SearchConfig(targets={"energy": 0.5})
    for cost, words in (
        (lambda m: 0.0, "cost 'energy' is 0.0 for the original"),
        (lambda m: float("nan"), "cost 'energy' is nan"),
        (lambda m: m.missing, "cost 'energy' raised AttributeError"),
    ):
        with pytest.raises(EvaluationError, match=words):
            fxprune.search(net(), X, lambda slim: 0.5, config=config(targets={"energy": 0.5}, costs={"energy": cost}))


@pytest.mark.parametrize(("most", "bound"), [(0.5, {"stem": 6, "blocks.0.up": 8, "blocks.1.up": 10}), ({"*.up": 0.25}, {"blocks.0.up": 4})])
@pytest.mark.parametrize("strategy", ["uniform", "random", "magnitude", "rl-pruner", "table"])
def test_no_group_loses_more_than_its_limit(most: Any, bound: dict[str, int], strategy: str) -> None:
    options = config(targets={"macs": 0.7}, most=most, strategy=strategy, rounds=2, samples=2)
    batches = [torch.randn(8, 3, 8, 8)] if strategy == "table" else None
    result = fxprune.search(net(), X, lambda slim: 0.5, config=options, calibration=batches)
    removed = {name: len(units) for name, units in fxprune.record(result.model).removed_units.items()}
    assert removed and all(removed.get(name, 0) <= count for name, count in bound.items())


def test_a_target_beyond_the_limits_and_limits_that_are_none() -> None:
    with pytest.raises(TargetError, match="even with all that most= lets go removed"):
        fxprune.search(net(), X, lambda slim: 0.5, config=config(targets={"macs": 0.3}, most=0.1))
    with pytest.raises(PolicyError, match="the key 'zebra' of most names no"):
        fxprune.search(net(), X, lambda slim: 0.5, config=config(most={"zebra": 0.1}))
    for most in (1.5, "x=y", {"stem": -1}, True):
        with pytest.raises(SearchError, match="most"):
            fxprune.SearchConfig(most=most)
    assert read_most("0.9") == 0.9 and read_most("layer1.*=0.5, stem=0.25") == {"layer1.*": 0.5, "stem": 0.25}


def test_a_loss_ranks_the_units_of_a_search() -> None:
    batches = [(X, torch.rand(2, 7))]  # targets that cross-entropy cannot be taken of
    options = config(targets={"macs": 0.6}, importance="taylor", loss=squared)
    result = fxprune.search(net(), X, lambda slim: 0.5, config=options, calibration=batches)
    wanted = fxprune.compress(net(), result.policy.sparsity, X, importance="taylor", calibration=batches, loss=squared)
    assert {n: u.tolist() for n, u in fxprune.record(result.model).removed_units.items()} == {
        n: u.tolist() for n, u in fxprune.record(wanted).removed_units.items()
    }


def test_the_command_line_and_its_file_take_them(tmp_path: Path) -> None:
    here = "tests.test_own_costs"
    given = ["--target", "energy=0.5", "--cost", f"energy={here}:energy", "--most", "0.9", "--loss", f"{here}:squared"]
    options = read(given).options
    assert options is not None and options.search.costs == {"energy": "tests.test_own_costs:energy"} and options.search.most == 0.9
    again = Options.of(json.loads(json.dumps(options.state())))
    assert again.search.described() == options.search.described()
    file = tmp_path / "search.yaml"
    file.write_text("target: {energy: 0.5}\ncost: {energy: 'tests.test_own_costs:energy'}\nmost: {layer1: 0.5}\n")
    from_file = read(["--config", str(file)]).options
    assert from_file is not None and from_file.search.costs == options.search.costs and from_file.search.most == {"layer1": 0.5}
    with pytest.raises(SearchError, match="cost 'energy' is a function; from the command line name it as energy=package.module:function"):
        Options(search=config(targets={"energy": 0.5}, costs={"energy": energy})).state()
