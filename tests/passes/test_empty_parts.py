"""Parts without elements, as a rotary embedding that turns whole heads leaves behind it, keep the channels of their other axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.passes.labels.rectangles import rectangle
from fxprune.testing import assert_sound


class Rotary(nn.Module):
    """Attention of 8 heads of a width of 4, of which a table turns the first ``turned``; the rest, maybe nothing, is passed by."""

    def __init__(self, turned: int, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 32), nn.Linear(6, 32), nn.Linear(6, 32), nn.Linear(32, 5))
        self.register_buffer("table", torch.randn(7, turned))
        self.how = how

    def turn(self, x: Tensor) -> Tensor:
        whole: Any = self.table
        table = whole[: x.shape[2]]
        width = table.shape[-1]
        if self.how == "split":
            first, rest = x.split([width, x.shape[-1] - width], dim=-1)
        elif self.how == "narrow":
            first, rest = x.narrow(-1, 0, width), x.narrow(-1, width, x.shape[-1] - width)
        else:
            first, rest = x[..., :width], x[..., width:]
        return torch.cat([first * table + first.flip(-1), rest], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 8, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        found = nn.functional.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        out: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("how", ["slice", "split", "narrow"])
@pytest.mark.parametrize("turned", [4, 2])
def test_heads_go_whether_or_not_something_is_left_beside_the_turned_part(turned: int, how: str) -> None:
    torch.manual_seed(0)
    graph = assert_sound(Rotary(turned, how).eval(), torch.randn(2, 5, 6), removes=("q.weight", "v.weight"))
    assert [g.size for g in graph.groups if g.prunable] == [8]


def test_the_labels_of_an_empty_part_come_from_its_strides() -> None:
    node = torch.fx.Graph().placeholder("x")
    labels = torch.arange(3).view(1, 3, 1).expand(2, 3, 4)
    found = rectangle(labels[:, 1:, 4:], node, "auto")
    assert found.axis == 1 and found.labels.tolist() == [1, 2]
    for bare in (labels[:, 1:2, 4:], labels[:, :, 4:].clone(), torch.zeros(0, 3, dtype=torch.int64)):
        assert rectangle(bare, node, "auto").axis is None


class SwitchedOff(nn.Module):
    """With a layer or a parameter of width 0, as options leave them that are off."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.a, self.b = what, nn.Linear(8, 16), nn.Linear(16, 4)
        self.into, self.out_of, self.head = nn.Linear(8, 0), nn.Linear(0, 16), nn.Linear(16, 0)
        self.prompts = nn.Parameter(torch.randn(0, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.what == "layer":
            y = y + self.out_of(self.into(x))
        if self.what == "parameter":
            y = torch.cat([self.prompts.expand(x.shape[0], -1, -1), y], 1)
        found: Tensor = self.b(y.relu())
        return torch.cat([found, self.head(y)], -1) if self.what == "head" else found


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("what", ["layer", "parameter", "head"])
def test_what_has_no_width_is_no_obstacle(what: str) -> None:
    torch.manual_seed(0)
    assert_sound(SwitchedOff(what).eval(), torch.randn(2, 5, 8), removes=("a.weight",))


class Found(nn.Module):
    """What it finds is counted by the code, so it is kept whole; on inputs of ones it finds nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = (x[0, 0] > 2).nonzero()
        return places[:1000] if len(places) > 1000 else places


class AtPlaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.find, self.stem, self.mix, self.last = Found(), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 32, 1), nn.Linear(2, 4)
        self.beside = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        y, places = self.stem(x), self.find(x)
        picked = y[0].permute(1, 2, 0)[places[:, 0], places[:, 1]].reshape(1, 1, -1, y.shape[1]).permute(2, 3, 0, 1)
        return self.last(self.mix(picked)[:, :, 0, 0].view(len(places), 2, 16).permute(0, 2, 1)), self.beside(y)


def test_channels_of_what_was_not_found_stay() -> None:
    torch.manual_seed(0)
    model, x = AtPlaces().eval(), torch.randn(2, 3, 16, 16)
    graph = fxprune.analyze(model, x)
    assert {g.name for g in graph.groups if "no elements" in g.reason} == {"stem", "mix"}
    slim = fxprune.compress(graph, 0.5, x, verify=True)
    assert [t.shape for t in slim(x)] == [t.shape for t in model(x)]
