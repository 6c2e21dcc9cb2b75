"""What people see: the coupling tree, the result table."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
import torchvision
from rich.console import Console, RenderableType

import fxprune
from fxprune.report.formatting import Row, bytes_text, count_text, duration_text, latency_text
from fxprune.report.layers import slices
from fxprune.report.terminal import LAYERS_SHOWN, coupling_tree, result_table


def printed(renderable: RenderableType, width: int = 100) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(renderable)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_tree_of_resnet50_is_readable_at_100_columns() -> None:
    model = torchvision.models.resnet50(weights=None).eval()
    lines = printed(coupling_tree(fxprune.analyze(model, torch.randn(1, 3, 64, 64))))
    assert lines[0] == "coupling graph: 37 groups prunable with 11,456 units, 2 groups locked"
    assert max(map(len, lines)) <= 100
    assert len(lines) < 250
    text = "\n".join(lines)
    # The stream of the first stage: producers joined by the addition, readers sliced along their second dimension.
    start = next(i for i, line in enumerate(lines) if line.startswith("├── layer1.0.conv3"))
    stream = lines[start : start + 13]
    assert any("layer1.0.downsample.0" in line and "weight[0:256]" in line and "joined by add" in line for line in stream)
    assert any("layer1.1.conv1 " in line and "256/256" in line and "weight[:, 0:256]" in line for line in stream)
    assert "it reaches the network's output: fc (1000)" in text
    assert "conv1:in" in text


def test_tree_shows_what_is_kept() -> None:
    model = torchvision.models.resnet18(weights=None).eval()
    graph = fxprune.analyze(model, torch.randn(1, 3, 64, 64))
    removed = fxprune.record(fxprune.compress(graph, {"layer2.0.conv1": 0.25})).removed_units
    lines = printed(coupling_tree(graph, removed=removed))
    assert "├── layer2.0.conv1  96/128 units" in lines
    assert any("layer2.0.conv2" in line and "96/128" in line for line in lines)
    assert "├── layer1.0.conv1  64/64 units" in lines


def test_tree_shortens_groups_that_many_layers_share() -> None:
    model = torchvision.models.densenet201(weights=None).eval()
    lines = printed(coupling_tree(fxprune.analyze(model, torch.randn(1, 3, 64, 64))))
    assert any("more: " in line and "BatchNorm2d" in line and "Conv2d" in line for line in lines)
    inside = longest = 0
    for line in lines:
        inside = 0 if line.startswith("├── ") else inside + 1
        longest = max(longest, inside)
    assert longest <= LAYERS_SHOWN + 1


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([0, 1, 2, 3], "0:4"),
        ([5], "5:6"),
        ([0, 2, 4, 6], "0:7:2"),
        ([0, 1, 8, 9], "0:2, 8:10"),
        ([*range(0, 20, 5), *range(21, 23), 30, 40], "0:1, …, 40:41 in 7 runs"),
    ],
)
def test_slices(indices: list[int], text: str) -> None:
    assert slices(indices) == text


ROWS = [Row("original", 0.9889, 1_250_000, 37_030, 0.0029, 152_848), Row("slim", 0.9861, 624_470, 17_580, 0.00021, 78_420)]


def test_result_table() -> None:
    lines = printed(result_table(ROWS, "a network"), 80)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    for expected in ("98.89 %", "98.61 % (-0.28)", "624.47 k (50.0 %)", "17.58 k (47.5 %)", "210 µs (7.2 %)", "78.4 kB (51.3 %)"):
        assert expected in text


def test_result_table_of_several_networks_breaks_no_figure() -> None:
    milder, smaller = ("slim-macs=0.7", 0.9861, 875_570, 26_200, 0.0023, 113_100), ("slim-params=0.3", 0.9, 624_470, 17_580, 0.002, 78_420)
    rows = [*ROWS, Row(*milder), Row(*smaller)]
    lines = printed(result_table(rows), 80)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for expected in ("875.57 k │", "(70.0 %)", "(-0.28)", "113.1 kB", "slim-params=0.3"):
        assert expected in text
    assert all(line.count("(") == line.count(")") for line in lines)


def test_result_table_says_what_training_brought() -> None:
    original, slim = ROWS
    uniform = replace(slim, name="uniform", untrained=0.9102)
    lines = printed(result_table([original, uniform, replace(slim, untrained=0.9352)]), 80)
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if "before training" in line]
    assert "91.02 % (-7.87)" in line and "93.52 % (-5.37)" in line and line.count("%") == 2  # the original has none
    assert not any("before training" in line for line in printed(result_table(ROWS), 80))


def test_figures_as_text() -> None:
    assert [count_text(v) for v in (12, 1200, 3.4e6, 1.2e10)] == ["12", "1.20 k", "3.40 M", "12.00 G"]
    assert [bytes_text(v) for v in (900, 2_500_000)] == ["0.9 kB", "2.50 MB"]
    assert [latency_text(v) for v in (5e-5, 0.0123, 2.0)] == ["50 µs", "12.30 ms", "2.00 s"]
    assert [duration_text(v) for v in (0.4, 59.0, 61.0, 3700.0)] == ["0 s", "59 s", "1 min 01 s", "1 h 01 min"]
