"""The coupling graph laid out: roles, folding of large graphs, lanes that do not overlap, the still picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxprune
from fxprune.report.lane_layout import BOTH, CARRIES, READS, WRITES, coupling_data, folded, packed
from fxprune.report.lane_svg import coupling_svg
from tests.report.pages import coupling


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.square = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        out: Tensor = self.head(self.up(x + self.square(x)))
        return out


def data_of(model: nn.Module, size: int = 64) -> dict[str, Any]:
    return coupling_data(fxprune.analyze(model.eval(), torch.randn(1, 3, size, size)))


def test_roles() -> None:
    graph = fxprune.analyze(Net().eval(), torch.randn(1, 3, 8, 8))
    data = coupling_data(graph, fxprune.record(fxprune.compress(graph, {"stem": 0.5})).removed_units)
    roles = {group["name"]: {mark["layer"]: mark["role"] for mark in group["marks"]} for group in data["groups"]}
    assert roles["stem"] == {"stem": WRITES, "norm": CARRIES, "square": BOTH, "up": READS}
    assert roles["up"] == {"up": WRITES, "head": READS}
    assert [layer["name"] for layer in data["layers"]] == ["stem", "norm", "square", "up", "head"]
    stem = next(group for group in data["groups"] if group["name"] == "stem")
    assert stem["kept"] == 4 and all((mark["kept"], mark["total"]) == (4, 8) for mark in stem["marks"])


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "densenet121"])
def test_lanes_do_not_overlap_and_lose_nothing(name: str) -> None:
    data = data_of(getattr(torchvision.models, name)(weights=None))
    placed = packed(data)
    assert len(placed["groups"]) == len(data["groups"])
    taken: set[tuple[int, int]] = set()
    for group in placed["groups"]:
        cells = {(group["lane"], row) for row in range(group["top"], group["bottom"] + 1)}
        assert not cells & taken
        taken |= cells
        assert {mark["row"] for mark in group["marks"]} <= set(range(group["top"], group["bottom"] + 1))
    assert placed["lanes"] == 1 + max(group["lane"] for group in placed["groups"])


def test_large_graphs_are_folded() -> None:
    data = data_of(torchvision.models.densenet121(weights=None))
    assert folded(data, len(data["layers"])) is data
    active = folded(data, 160)
    assert len(active["layers"]) == 121 and not any("norm" in one["name"] for one in active["layers"])
    modules = folded(data, 20)
    assert 2 <= len(modules["layers"]) <= 20
    names = {one["name"] for one in modules["layers"]}
    assert "features.denseblock1" in names and {mark["layer"] for group in modules["groups"] for mark in group["marks"]} <= names
    assert "groups inside" in next(one["kind"] for one in modules["layers"] if one["name"] == "features.denseblock1")


def test_picture_is_well_formed_and_escaped() -> None:
    svg = coupling_svg(packed(coupling()), "a < b")
    root = ET.fromstring(svg)
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert "<i>mid</i></script>" in texts and "a < b" in texts
    assert any("stem.0[0:8] 18/24" in text for text in texts) and any("head locked" in text for text in texts)
    assert "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
