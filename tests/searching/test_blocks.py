"""Whole blocks in a search, beside the widths of what stays."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.allocation.leaving_out import block_effects
from fxprune.driver import SearchConfig
from fxprune.errors import SearchError
from fxprune.passes.coupling.blocks import finest
from fxprune.searching.problem import make_problem
from fxprune.timing.layers import Layer, LayerTable
from fxprune.timing.predicting import LatencyModel
from fxprune.timing.runtimes import Runtime

INPUTS = torch.randn(2, 3, 8, 8)


class Branch(nn.Module):
    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(16, width, 3, padding=1), nn.BatchNorm2d(width), nn.Conv2d(width, 16, 3, padding=1)
        with torch.no_grad():
            self.b.weight.mul_(scale)
            assert self.b.bias is not None
            self.b.bias.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.b(self.norm(self.a(x)).relu())
        return out


class Residual(nn.Module):
    """Four residual blocks; what the second and the fourth add is next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList([Branch(12, 1.0), Branch(24, 1e-3), Branch(8, 1.0), Branch(24, 1e-3)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Layered(nn.Module):
    """Transformer layers: a block for each half, and one for both."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(3, 16)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(2)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x.flatten(2).transpose(1, 2))
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def test_the_finest_blocks_hold_no_other() -> None:
    graph = fxprune.analyze(Layered().eval(), INPUTS, blocks=True)
    names = {block.name for block in graph.blocks}
    assert {"layers.0", "layers.1"} <= names
    found = {block.name for block in finest(graph.blocks)}
    assert found and found < names and not {"layers.0", "layers.1"} & found


@pytest.mark.parametrize("make", [Residual, Layered])
def test_costs_are_those_of_the_networks_without_the_blocks(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    graph = fxprune.analyze(model, INPUTS, blocks=True)
    problem, candidates = make_problem(graph, lambda slim: 1.0, importance="l2", blocks=True)
    assert problem.blocks == len(candidates.blocks) > 1
    before = fxprune.profile(model, INPUTS)
    rng = np.random.default_rng(0)
    for _ in range(4):
        removed = problem.space.zeros()
        removed[: -problem.blocks] = rng.integers(0, problem.units[: -problem.blocks])
        removed[-problem.blocks :] = rng.integers(0, 2, problem.blocks)
        slim, costs = candidates.slim(removed).eval(), problem.cost(removed)
        after = fxprune.profile(slim, INPUTS)
        assert costs["macs"] == pytest.approx(after.macs / before.macs, rel=2e-3)
        assert costs["params"] == pytest.approx(after.params / before.params, rel=2e-3)
        assert slim(INPUTS).shape == (2, 5)
        again = fxprune.compress(model, candidates.policy(removed, {}, "l2"), INPUTS, verify=True).eval()
        assert torch.equal(again(INPUTS), slim(INPUTS))


@pytest.mark.parametrize("strategy", ["table", "rl-pruner"])
def test_blocks_that_add_nothing_go_where_widths_would_hurt(model: nn.Module, strategy: str) -> None:
    wanted = model(INPUTS).detach()
    data = [torch.randn(64, 3, 8, 8)]

    def near(slim: nn.Module) -> float:
        return -float((slim(INPUTS) - wanted).square().mean())

    config = SearchConfig(targets="macs=0.3", strategy=strategy, rounds=6, repair="none", tolerance=0.1, blocks=True, most=0.4)
    found = fxprune.search(model, INPUTS, near, config=config, calibration=data)
    gone = {name for name, p in found.policy.sparsity.items() if p == 1}
    assert gone == {"blocks.1", "blocks.3"} == set(fxprune.record(found.model).blocks)
    assert torch.equal(fxprune.compress(model, found.policy, INPUTS).eval()(INPUTS), found.model.eval()(INPUTS))
    assert found.reward > -1e-3


def test_effects_are_what_leaving_out_does(model: nn.Module) -> None:
    graph = fxprune.analyze(model, INPUTS)
    blocks = finest(graph.all_blocks)
    data = [torch.randn(32, 3, 8, 8), (torch.randn(32, 3, 8, 8), torch.zeros(32))]
    found = block_effects(graph, blocks, data)
    sizes = {block.name: float((effect**2).mean()) for block, effect in zip(blocks, found, strict=True)}
    assert all(effect.shape == (64,) for effect in found)
    assert max(sizes["blocks.1"], sizes["blocks.3"]) < 1e-3 * min(sizes["blocks.0"], sizes["blocks.2"])


@pytest.mark.parametrize("repair", ["bn", "lstsq"])
def test_what_is_left_is_repaired(model: nn.Module, repair: str) -> None:
    config = SearchConfig(targets="macs=0.4", strategy="uniform", blocks=True, repair=repair, tolerance=0.05)
    found = fxprune.search(model, INPUTS, lambda slim: float(slim(INPUTS).sum()), config=config, calibration=[torch.randn(64, 3, 8, 8)])
    assert fxprune.record(found.model).repair == repair and not fxprune.record(found.model).blocks


def test_scores_travel_with_their_blocks(model: nn.Module) -> None:
    graph = fxprune.analyze(model, INPUTS, blocks=True)
    problem, _ = make_problem(graph, weight_left, importance="l2", blocks=True, calibration=[INPUTS], repair="bn")
    removed = problem.space.zeros()
    removed[-3:] = 1, 0, 1
    assert pickle.loads(pickle.dumps(problem.score))(removed) == problem.score(removed)


def weight_left(slim: nn.Module) -> float:
    return sum(p.numel() for p in slim.parameters()) + float(slim(INPUTS).sum())


def test_a_block_takes_its_time_along(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(self: LayerTable, layer: Layer) -> float:
        return float(layer.inputs * layer.outputs)

    monkeypatch.setattr(LayerTable, "_measured", seconds)
    graph = fxprune.analyze(model, INPUTS)
    groups, blocks = [group for group in graph.groups if group.prunable], finest(graph.all_blocks)
    layers = 3 * 16 + 2 * 16 * (12 + 24 + 8 + 24) + 16 * 5
    timing = LatencyModel(graph, groups, Runtime(), {"latency": layers / 0.95}, blocks)
    removed = np.zeros((1, len(groups) + len(blocks)), dtype=np.int64)
    removed[0, len(groups) + [block.name for block in blocks].index("blocks.1")] = 1
    lost = 0.95 * 2 * 16 * 24 / layers
    assert lost < 1 - timing.shares(removed)[0] < lost + 0.05 * 0.5


def test_blocks_and_recovery_do_not_go_together() -> None:
    with pytest.raises(SearchError, match="blocks and recover_every do not go together"):
        SearchConfig(blocks=True, recover_every=1)


def test_a_search_with_blocks_goes_on_from_its_checkpoint(model: nn.Module, tmp_path: Path) -> None:
    config = SearchConfig(targets="macs=0.5", blocks=True, rounds=3, repair="none", tolerance=0.05)
    options = {"config": config, "calibration": [INPUTS], "checkpoint_dir": tmp_path}
    found = fxprune.search(model, INPUTS, weight_left, **options)  # type: ignore[arg-type]
    again = fxprune.search(model, INPUTS, weight_left, **options, resume=True)  # type: ignore[arg-type]
    assert found.policy == again.policy
