"""Layers whose weight is divided by a norm over channels that go: what is left of the weight is as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import fxprune
from tests.passes.helpers import gap, zeroed

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def old(layer: nn.Module, **how: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return weight_norm(layer, **how)


def new(layer: nn.Module, **how: Any) -> nn.Module:
    made: nn.Module = parametrizations.weight_norm(layer, **how)
    return made


def spectral(layer: nn.Module, **how: Any) -> nn.Module:
    made: nn.Module = parametrizations.spectral_norm(layer, **how)
    return made


class Net(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 16, 3, padding=1), middle, nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.middle(self.first(x).relu()).relu())


MADE: dict[str, Callable[[], nn.Module]] = {
    "old": lambda: old(nn.Conv2d(16, 24, 3, padding=1)),
    "new": lambda: new(nn.Conv2d(16, 24, 3, padding=1)),
    "transposed": lambda: new(nn.ConvTranspose2d(16, 24, 2, 2), dim=1),
    "over all": lambda: new(nn.Conv2d(16, 24, 1), dim=None),
    "by input": lambda: new(nn.Conv2d(16, 24, 1), dim=1),
    "spectral": lambda: spectral(nn.Conv2d(16, 24, 3, padding=1)),
    "spectral transposed": lambda: spectral(nn.ConvTranspose2d(16, 24, 2, 2)),
}


def folded(model: Net) -> Net:
    """The same network with plain weights."""
    twin = copy.deepcopy(model) if not hasattr(model.middle, "weight_g") else Net(MADE["old"]())
    twin.load_state_dict(model.state_dict())
    twin.eval()
    if hasattr(twin.middle, "weight_g"):
        nn.utils.remove_weight_norm(twin.middle)
    else:
        remove_parametrizations(twin.middle, "weight")
    return twin


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", list(MADE))
def test_what_is_left_of_the_weight_stays(name: str) -> None:
    torch.manual_seed(0)
    model = Net(MADE[name]()).eval()
    graph = fxprune.analyze(model, X)
    assert next(g for g in graph.groups if g.name == "first").notes
    slim = fxprune.compress(model, {"first": 0.5, "middle*": 0.5}, X).eval()
    kept = fxprune.record(slim).kept
    plain = folded(model)
    rows = kept["last.weight"][1]
    inputs, outputs = (0, 1) if "transposed" in name else (1, 0)
    with torch.no_grad():
        weight = plain.get_parameter("middle.weight")
        for dim, left in ((inputs, kept["first.weight"][0]), (outputs, rows)):
            gone = torch.tensor(sorted({*range(weight.shape[dim])} - {*left.tolist()}))
            weight.index_fill_(dim, gone, 0)
        plain.get_parameter("middle.bias").index_fill_(0, torch.tensor(sorted({*range(24)} - {*rows.tolist()})), 0)
        wanted, found = plain(X), slim(X)
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max())), float((found - wanted).abs().max() / wanted.abs().max())
    assert len(rows) == 12 and slim.get_parameter("first.weight").shape[0] == 8


@pytest.mark.parametrize("name", ["new", "spectral"])
def test_it_goes_through_a_file_and_trains(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(MADE[name]()).eval()
    before = copy.deepcopy(model.state_dict())
    slim = fxprune.compress(model, 0.5, X).eval()
    fxprune.save(slim, tmp_path / "slim.safetensors")
    wanted = slim(X)
    with torch.device("meta"):
        blank = Net(MADE[name]())
    for fresh in (Net(MADE[name]()), blank):
        assert torch.allclose(fxprune.load(tmp_path / "slim.safetensors", fresh).eval()(X), wanted, atol=1e-6)
    slim.train()(X).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_graph_gives_each_policy_its_own_length() -> None:
    torch.manual_seed(0)
    model = Net(MADE["new"]()).eval()
    graph = fxprune.analyze(model, X)
    name = "middle.parametrizations.weight.original0"
    g = {p: fxprune.compress(graph, {"first": p}).get_parameter(name) for p in (0.0, 0.25, 0.5)}
    assert torch.equal(g[0.0], model.get_parameter(name)) and bool((g[0.5] < g[0.25]).all()) and bool((g[0.25] < g[0.0]).all())


class MaxNorm(nn.Module):
    def forward(self, weight: Tensor) -> Any:
        return torch.renorm(weight, 2, 0, 0.3)


def constrained() -> nn.Module:
    layer = nn.Conv2d(16, 24, 3, padding=1)
    parametrize.register_parametrization(layer, "weight", MaxNorm())
    return layer


class Constrained(nn.Conv2d):
    """As EEGNet does it, in ``forward``."""

    how = "data"

    def forward(self, input: Tensor) -> Tensor:
        if self.how == "data":
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        elif self.how == "copy":
            self.weight.data.copy_(torch.renorm(self.weight.data, 2, 0, 0.3))
        else:
            with torch.no_grad():
                self.weight.renorm_(2, 0, 0.3)
        return super().forward(input)


@pytest.mark.parametrize("how", ["parametrized", "data", "copy", "in place"])
def test_a_longest_length_of_weights_keeps_no_channels(how: str) -> None:
    torch.manual_seed(0)
    middle = constrained() if how == "parametrized" else Constrained(16, 24, 3, padding=1)
    model = Net(middle).eval()
    if isinstance(middle, Constrained):
        middle.how = how
    before = copy.deepcopy(model.state_dict())
    graph = fxprune.analyze(model, X)
    name = next(g.name for g in graph.groups if g.size == 24)
    slim = fxprune.compress(graph, {name: 0.5}, X, verify=True)
    reference = zeroed(model, fxprune.record(slim).kept)
    with torch.no_grad():
        for other in (X, torch.randn(3, 3, 6, 10)):
            assert gap(reference(other), slim(other)) < 1e-5
    both = fxprune.compress(graph, 0.5, X, verify=True)
    assert both.get_parameter("first.weight").shape[0] == 8 and both.get_parameter("last.weight").shape[1] == 12
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
