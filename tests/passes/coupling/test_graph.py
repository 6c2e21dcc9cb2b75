"""``CouplingGraph.graph``: what is coupled to what, by which operation; the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.passes.coupling.graph import CouplingGraph
from tests.passes.golden import report
from tests.passes.zoo.networks import ZOO


def graph_of(name: str) -> CouplingGraph:
    torch.manual_seed(0)
    return fxprune.analyze(ZOO[name].make().eval(), ZOO[name].inputs())


def test_nodes_are_dimensions_and_edges_carry_an_operation() -> None:
    graph = graph_of("residual").graph
    assert isinstance(graph, nx.Graph)
    assert graph.nodes["stem.0.weight", 0]["size"] == 12
    assert all(isinstance(op, str) and op for _, _, op in graph.edges(data="op"))


def test_a_residual_couples_its_producers_by_the_addition() -> None:
    graph = graph_of("residual").graph
    ops = {frozenset((a, b)): op for a, b, op in graph.edges(data="op")}
    assert ops[frozenset({("stem.0.weight", 0), ("b.weight", 0)})] == "add"
    assert nx.has_path(graph, ("stem.0.weight", 0), ("tail.weight", 1))
    assert not nx.has_path(graph, ("stem.0.weight", 0), ("a.0.weight", 0))


@pytest.mark.parametrize("name", ["residual", "unet", "grouped", "attention_fused_computed", "lstm", "split_uneven"])
def test_members_of_a_group_are_connected(name: str) -> None:
    coupling = graph_of(name)
    for group in coupling.groups:
        keys = [m[:2] for m in group.members]
        assert all(nx.has_path(coupling.graph, a, b) for a, b in pairwise(keys)), group.name


@pytest.mark.parametrize("name", ["chain", "unet", "mixer", "outputs_features"])
def test_components_are_groups_where_no_layer_feeds_several(name: str) -> None:
    coupling = graph_of(name)
    together = {frozenset(m[:2] for m in g.members) for g in coupling.groups}
    for component in nx.connected_components(coupling.graph):
        assert any(component >= group for group in together) or not any(component & group for group in together)


def test_group_names_follow_the_contract() -> None:
    """Named after the first producer, with its index range where it feeds several groups; after the consumer where nothing produces it."""
    names = [g.name for g in graph_of("split_uneven").groups if g.prunable]
    assert {"stem.0[0:3]", "stem.0[3:7]", "stem.0[7:12]"} <= set(names)
    assert graph_of("residual").by_name["stem.0"].size == 12
    assert graph_of("residual").by_name["stem.0:in"].reason.startswith("the layer reads channels of fixed size")


@pytest.mark.parametrize("name", ["unet", "attention_relative_table", "lstm", "outputs_dict", "shufflenet_units"])
def test_the_order_of_groups_is_that_of_the_first_producer(name: str) -> None:
    first, second = graph_of(name), graph_of(name)
    assert [g.name for g in first.groups] == [g.name for g in second.groups]
    assert [g.name for g in first.groups if g.prunable][0] == next(g.name for g in first.groups if g.prunable and g.size > 1)


def test_the_report_does_not_depend_on_the_hash_seed() -> None:
    names = ["unet", "attention_fused_computed", "mha_cross", "lstm", "split_uneven", "outputs_dict"]
    code = f"from tests.passes.golden import report\nprint(*(report(n) for n in {names!r}), sep='')"
    want = "".join(report(n) for n in names)
    for seed in ("4242",):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == want.strip()


def test_a_bias_that_nobody_reads_goes_with_its_weight() -> None:
    class Tricks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Any:
            return self.last(F.linear(self.first(x) * self.norm.weight, self.second.weight).relu())

    slim = fxprune.compress(Tricks().eval(), 0.5, torch.randn(2, 6), verify=True)
    assert slim.get_parameter("second.weight").shape == (5, 4) and slim.get_parameter("second.bias").shape == (5,)
    assert slim.get_parameter("norm.bias").shape == (4,)
