"""Candidates that share graphs with blanks are those that were rewritten alone, and their graphs read as if nothing was shared."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.importance.criteria import scores
from fxprune.passes.planning.plan import plan
from fxprune.passes.rewriting.slimmer import Slimmer
from tests.passes.helpers import assert_edits_stay_apart, prime
from tests.passes.zoo.networks import ZOO

SHARES = (0.5, 0.0, 0.3, 0.75)


class Pixels(nn.Module):
    """A view that names channels, and a functional norm that does: the numbers of the graph are all that a policy changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 1), nn.Linear(24, 5)
        self.weight = nn.Parameter(torch.randn(24))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.second(self.first(x).relu()).flatten(2).transpose(1, 2)
        x = nn.functional.layer_norm(x, (24,), self.weight)
        return self.head(x.reshape(-1, 36, 24).mean(1))


def _pixels() -> tuple[fxprune.CouplingGraph, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    graph = fxprune.analyze(Pixels().eval(), x)
    fxprune.compress(graph, 0.25)
    return graph, x


def _codes(slim: Any) -> dict[str, str]:
    return {mode: graph.python_code("self").src for mode, graph in slim.graphs.items()}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_candidate_is_the_one_rewritten_alone(name: str) -> None:
    network = ZOO[name]
    torch.manual_seed(0)
    inputs = network.inputs()
    graph = fxprune.analyze(prime(network.make(), inputs), inputs)
    if graph.traced.parts:
        pytest.skip("the parts of a network have graphs of their own for each candidate")
    ranking = scores(graph, "random")
    uneven = {g.name: SHARES[i % len(SHARES)] for i, g in enumerate(g for g in graph.groups if g.prunable)}
    for norms in ("plain", "exact"):
        for policy in (*SHARES, uneven):
            keep = plan(graph, policy, ranking)
            candidate = Slimmer(graph, keep, norms).run()
            shared = graph.templates.pop(norms)
            alone = Slimmer(graph, keep, norms).run()
            graph.templates[norms] = shared
            assert _codes(candidate) == _codes(alone)
            ours, theirs = candidate.state_dict(), alone.state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
            assert {n: type(m) for n, m in candidate.named_modules()}.keys() == {n: type(m) for n, m in alone.named_modules()}.keys()


def test_numbers_alone_do_not_end_the_sharing() -> None:
    graph, x = _pixels()
    slims: list[Any] = [fxprune.compress(graph, share) for share in (0.5, 0.25, 0.5)]
    assert all(slim.borrowed for slim in slims)
    assert type(slims[0]).forward is type(slims[1]).forward
    for slim, share in zip(slims, (0.5, 0.25, 0.5), strict=True):
        alone: Any = fxprune.compress(graph.model, share, x)
        assert torch.equal(slim(x), alone(x))
        fxprune.compress(graph, share, verify=True, example_inputs=x)


def test_what_is_read_of_a_candidate_has_no_blanks() -> None:
    graph, x = _pixels()
    slim: Any = fxprune.compress(graph, 0.5)
    expected = slim(x)
    assert "_numbers" not in str(slim.eval_graph.python_code("self").src)
    assert slim.borrowed
    for twin in (copy.deepcopy(slim), copy.copy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(twin(x), expected)
    again = fxprune.compress(fxprune.analyze(slim, x), 0.25)
    assert again(x).shape == (2, 5)
    assert torch.equal(slim.detached()(x), expected)
    for read in (str, lambda one: str(one.code), lambda one: one.print_readable(print_output=False)):
        one: Any = fxprune.compress(graph, 0.5)
        assert "_numbers" not in read(one) and "[12]" in read(one)
        assert torch.equal(one(x), expected)


def test_an_edited_candidate_leaves_the_others_alone() -> None:
    assert_edits_stay_apart(*_pixels())


def test_a_module_changed_between_candidates_is_seen() -> None:
    graph, x = _pixels()
    fxprune.compress(graph, 0.5)
    model: Any = graph.model
    with torch.no_grad():
        model.first.weight.add_(1)
    model.second.bias = nn.Parameter(torch.ones(24))
    model.head.note = {"kept": [1, 2]}
    slim = fxprune.compress(graph, 0.0)
    assert torch.equal(slim.get_parameter("first.weight"), model.first.weight)
    assert torch.equal(slim.get_parameter("second.bias"), torch.ones(24))
    held: Any = slim.get_submodule("head").note
    assert held == {"kept": [1, 2]} and held is not model.head.note and held["kept"] is not model.head.note["kept"]
