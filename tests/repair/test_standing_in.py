"""What stands in for blocks that were left out: where the layer before them can give what they added, and where nothing can."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.allocation.leaving_out import block_effects
from fxprune.driver import SearchConfig
from fxprune.repair.distance import unlikeness
from fxprune.repair.standing_in import LeftOut
from tests.passes.rewriting.test_blocks import NETWORKS, network

torch.manual_seed(0)
DATA = [torch.randn(64, 6) for _ in range(8)]
PICTURES = [torch.randn(4, 6, 7, 7) for _ in range(8)]


class Branched(nn.Module):
    """One branch behind a linear layer; ``way``: what is around it, or who else reads what it starts from."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.way, self.first, self.more, self.last = way, nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 5)
        self.into, self.out = nn.Linear(16, 12), nn.Linear(12, 16)
        nn.init.normal_(self.out.weight)

    def branch(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.into(x))
        return found

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        if self.way == "two streams":
            other = self.more(x)
            return self.last(torch.tanh(h + self.branch(h))) + self.last(torch.tanh(other))
        if self.way == "relu":
            h = torch.relu(h)
            return self.last(torch.relu(h + self.branch(h)))
        if self.way == "tanh":
            h = torch.tanh(h)
        y = torch.tanh(h + self.branch(h))
        return (self.last(y), h) if self.way == "output" else self.last(y * h) if self.way == "read" else self.last(y)


class Pictures(nn.Module):
    """Two branches in a row of 1 x 1 convolutions, with BatchNorm and addition in place, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(6, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        for block in self.blocks:
            out = block(x)
            out += x
            x = out
        found: Tensor = self.head(torch.tanh(x))
        return found


def off(slim: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return unlikeness([slim.eval()(x)], [model(x)])


def without(model: nn.Module, data: list[Tensor], repair: str, **options: Any) -> Any:
    graph = fxprune.analyze(model.eval(), data[0], blocks=True)
    gone = dict.fromkeys([block.name for block in graph.blocks], 1.0)
    return fxprune.compress(graph, gone, data[0], repair=repair, calibration=data, **options)


@pytest.mark.parametrize(("make", "data", "layer"), [(Branched, DATA, "first"), (Pictures, PICTURES, "first")])
def test_a_branch_that_is_linear_is_stood_in_for_exactly(
    make: Callable[[], nn.Module], data: list[Tensor], layer: str, tmp_path: Path
) -> None:
    model = make()
    model.train()(data[0])
    sliced, slim = (without(model, data, repair, verify=True) for repair in ("none", "lstsq"))
    x = torch.randn_like(data[0])
    assert off(sliced, model, x) > 0.2 and off(slim, model, x) < 1e-3
    rec = fxprune.record(slim)
    assert rec.blocks and set(rec.blocks.values()) == {f"removed, {layer} stands in"}
    assert rec.repaired[layer].stands_in == tuple(rec.blocks) and rec.repaired[layer].after < 1e-3 < rec.repaired[layer].before
    assert any(f"{next(iter(rec.blocks))}: {layer} stands in (off by" in note for note in rec.notes)
    assert {name: t.shape for name, t in slim.state_dict().items()} == {name: t.shape for name, t in sliced.state_dict().items()}
    fxprune.save(slim, tmp_path / "slim.safetensors")
    again = fxprune.load(tmp_path / "slim.safetensors", make()).eval()
    assert torch.equal(again(x), slim(x))
    assert fxprune.record(again).repaired == rec.repaired and fxprune.record(again).blocks == rec.blocks


def test_behind_a_relu_what_passes_it_is_stood_in_for() -> None:
    model, x = Branched("relu"), torch.randn(256, 6)
    near, far = without(model, DATA, "lstsq"), without(model, DATA, "none")
    made = fxprune.record(near).repaired["first"]
    assert made.stands_in and made.after < 0.6 * made.before and off(near, model, x) < 0.5 * off(far, model, x)


class Wide(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        halves = (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), copy.deepcopy(drop)) for _ in range(2))
        self.blocks = nn.ModuleList(halves)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        found: Tensor = self.last(torch.tanh(x))
        return found


@pytest.mark.parametrize(("drop", "through"), [("dropout", True), ("depth", True), ("tanh", False), ("clip", False)])
def test_what_drops_branches_in_training_is_seen_through(drop: str, through: bool) -> None:
    ops = pytest.importorskip("torchvision.ops")
    made = {
        "dropout": nn.Dropout(),
        "depth": ops.StochasticDepth(0.1, "row"),
        "tanh": nn.Tanh(),
        "clip": nn.Hardtanh(-1e6, 1e6, inplace=True),
    }
    graph = fxprune.analyze(Wide(made[drop]).eval(), DATA[0], blocks=True)
    assert [block.name for block in graph.blocks] == ["blocks.0", "blocks.1"]
    assert LeftOut(graph, graph.blocks[1:]).aims.keys() == ({"blocks.0.2.weight"} if through else set())


@pytest.mark.parametrize("way", ["two streams", "tanh", "output", "read"])
def test_nothing_stands_in_where_others_read_the_tensor_or_layers_run_between(way: str) -> None:
    graph = fxprune.analyze(Branched(way).eval(), DATA[0], blocks=True)
    (block,) = [one for one in graph.blocks if one.removable]
    assert LeftOut(graph, [block]).aims == {}
    slim = fxprune.compress(graph, {block.name: 1.0}, DATA[0], repair="lstsq", calibration=DATA)
    rec = fxprune.record(slim)
    assert rec.blocks == {block.name: "removed"} and any("nothing stands in" in note for note in rec.notes)
    assert rec.repaired["last"].done == "fitted" if way != "two streams" else "last" not in rec.repaired


class Products(Branched):
    """What its branch adds has nothing to do with any linear map of what it reads."""

    def branch(self, x: Tensor) -> Tensor:
        return self.out(x[:, :12] * x[:, 1:13])  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.first, self.out):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)


def test_nothing_stands_in_where_no_map_helps() -> None:
    slim = without(Products(), DATA, "lstsq")
    assert fxprune.record(slim).repaired["first"].done != "fitted"
    assert torch.equal(slim.get_parameter("first.weight"), Products().first.weight)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("gone", [["layers.1"], ["layers.0", "layers.2"], ["layers.0", "layers.1"]])
@pytest.mark.parametrize("width", [0.0, 0.25])
def test_layers_behind_are_fitted_to_the_network_with_its_blocks(name: str, gone: list[str], width: float) -> None:
    model, x = network(name)
    model.eval()
    data = [torch.randn(16, *x.shape[1:]) for _ in range(6)]
    graph = fxprune.analyze(model, x, blocks=True)
    policy = {group.name: width for group in graph.groups if group.prunable} | dict.fromkeys(gone, 1.0)
    made = {kind: fxprune.compress(graph, policy, x, repair=kind, calibration=data, importance="l2") for kind in ("none", "bn", "lstsq")}
    test = torch.randn(64, *x.shape[1:])
    errors = {kind: off(slim, model, test) for kind, slim in made.items()}
    assert errors["lstsq"] < 0.7 * min(errors["none"], errors["bn"])
    rec = fxprune.record(made["lstsq"])
    assert list(rec.blocks) == gone and sum(one.done == "fitted" for one in rec.repaired.values()) > 1


def test_halves_of_transformer_layers_are_stood_in_for_by_what_adds_before_them() -> None:
    model, x = network("encoder")
    graph = fxprune.analyze(model.eval(), x, blocks=True)
    by_name = {block.name: block for block in graph.blocks}

    def aims(*names: str) -> dict[str, tuple[str, ...]]:
        return {layer: aim.blocks for layer, aim in LeftOut(graph, [by_name[name] for name in names]).aims.items()}

    assert aims("layers.1.mlp") == {"layers.1.out.weight": ("layers.1.mlp",)}
    assert aims("layers.1.qkv") == {"layers.0.mlp.2.weight": ("layers.1.qkv",)}
    assert aims("layers.1") == {"layers.0.mlp.2.weight": ("layers.1", "layers.1")}
    assert aims("layers.1", "layers.2.qkv") == {"layers.0.mlp.2.weight": ("layers.1", "layers.1", "layers.2.qkv")}
    assert aims("layers.0") == {"embed.weight": ("layers.0", "layers.0")}


def test_a_block_that_is_stood_in_for_counts_for_little_in_the_table() -> None:
    model = Pictures()
    model.train()(PICTURES[0])
    graph = fxprune.analyze(model.eval(), PICTURES[0])
    before = copy.deepcopy(model.state_dict())
    plain, refit = (block_effects(graph, graph.all_blocks, PICTURES, refit=refit) for refit in (False, True))
    assert len(refit) == 2 and all((b**2).mean() < 1e-2 * (a**2).mean() for a, b in zip(plain, refit, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_search_repairs_its_result_towards_the_network_with_its_blocks() -> None:
    model, data = Branched().eval(), [*DATA]
    graph = fxprune.analyze(model, data[0], blocks=True)
    config = SearchConfig(targets="params=0.45", strategy="table", blocks=True, repair="lstsq", tolerance=0.1, most=0.1)
    found = fxprune.search(model, data[0], lambda slim: -off(slim, model, data[0]), config=config, calibration=data)
    assert set(fxprune.record(found.model).blocks) == {graph.blocks[0].name}
    assert "first stands in" in next(iter(fxprune.record(found.model).blocks.values()))
