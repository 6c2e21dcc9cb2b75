"""Which tensor an operation writes into, and what else holds its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.passes.ir.writes import is_rewritten, is_rewritten_later, memory, sharing, written


class Writes(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.first, self.relu = form, nn.Linear(6, 8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x.clone()
        if self.form == "method":
            y.add_(1)
        elif self.form == "function":
            torch.relu_(y)
        elif self.form == "keyword":
            torch.nn.functional.relu(y, inplace=True)
        elif self.form == "module":
            self.relu(y)
        elif self.form == "out":
            torch.add(x, 1, out=y)
        elif self.form == "setitem":
            y[:, 0] = 0
        elif self.form == "augmented":
            y += 1
        elif self.form == "view":
            y.transpose(0, 1).mul_(2)
        return y + x


def traced(form: str) -> tuple[fx.Graph, Any]:
    graph = fxprune.analyze(Writes(form), torch.randn(4, 6))
    return graph.traced.graphs["eval"], graph.traced.skeleton.module


@pytest.mark.parametrize("form", ["method", "function", "keyword", "module", "out", "setitem", "augmented"])
def test_every_form_of_a_write_names_what_it_writes_into(form: str) -> None:
    graph, module = traced(form)
    copy = next(node for node in graph.nodes if "clone" in node.name)
    targets = [written(node, module) for node in graph.nodes]
    assert [target for target in targets if target is not None] == [copy]
    assert is_rewritten_later(copy, module)
    first = next(node for node in graph.nodes if node.op == "call_module" and node.target == "first")
    assert not is_rewritten_later(first, module)


def test_nothing_written_is_nothing() -> None:
    graph, module = traced("none")
    assert all(written(node, module) is None for node in graph.nodes)
    assert not any(is_rewritten(node) for node in graph.nodes)


def test_a_write_into_a_view_is_one_into_the_tensor() -> None:
    graph, _ = traced("view")
    copy = next(node for node in graph.nodes if "clone" in node.name)
    view = next(node for node in graph.nodes if node.target == "transpose")
    write = next(node for node in graph.nodes if node.target == "mul_")
    assert memory(copy) == memory(view) is not None
    assert is_rewritten(copy) and is_rewritten(view)
    assert sharing(copy) == [copy, view, write] and written(write) is view


def test_names_with_underscores_on_both_sides_are_no_writes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert written(graph.call_method("__add__", (x, 1))) is None
    assert written(graph.call_method("add_", (x, 1))) is x


def test_what_is_no_tensor_has_no_memory() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = 3
    assert memory(node) is None and not is_rewritten(node)
