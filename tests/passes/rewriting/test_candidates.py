"""Slim modules of one analysed model share graphs and code until somebody asks for the graph."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn
from torchvision.models import convnext_tiny, resnet18

import fxprune
from fxprune.models.small import digits_net
from tests.passes.helpers import assert_edits_stay_apart


def _graph(model: nn.Module, size: int) -> tuple[fxprune.CouplingGraph, torch.Tensor]:
    x = torch.randn(2, 1 if isinstance(model, type(digits_net())) else 3, size, size)
    return fxprune.analyze(model, x), x


def test_candidates_equal_compress_from_scratch() -> None:
    torch.manual_seed(0)
    model = resnet18(num_classes=5).eval()
    graph, x = _graph(model, 32)
    for sparsity in (0.5, 0.25, 0.75, 0.0):
        candidate = fxprune.compress(graph, sparsity)
        alone = fxprune.compress(model, sparsity, x)
        assert torch.equal(candidate(x), alone(x))
        assert candidate.state_dict().keys() == alone.state_dict().keys()
        assert candidate.graph.python_code("self").src == alone.graph.python_code("self").src


def test_an_edited_graph_is_the_candidates_own() -> None:
    torch.manual_seed(0)
    graph, x = _graph(digits_net().eval(), 8)
    fxprune.compress(graph, 0.5)
    assert_edits_stay_apart(graph, x)


def test_candidates_copy_and_pickle() -> None:
    torch.manual_seed(0)
    graph, x = _graph(digits_net().eval(), 8)
    fxprune.compress(graph, 0.5)
    slim = fxprune.compress(graph, 0.5)
    assert slim.borrowed
    expected = slim(x)
    for twin in (copy.deepcopy(slim), copy.copy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(twin(x), expected)
        assert fxprune.record(twin).removed_units.keys() == fxprune.record(slim).removed_units.keys()


def test_literals_are_rewritten_for_each_candidate() -> None:
    torch.manual_seed(0)
    model = convnext_tiny(num_classes=3).eval()  # its layer norms name their size
    graph, x = _graph(model, 32)
    for sparsity in (0.5, 0.25, 0.125):
        assert fxprune.compress(graph, sparsity)(x).shape == (2, 3)


class Idle(nn.Module):
    """A branch whose last layer is added to another after a module that does nothing in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.norm, self.drop, self.head = nn.BatchNorm2d(8), nn.Dropout(0.1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head(x + self.drop(self.norm(self.b(self.a(x).relu()))))  # type: ignore[no-any-return]


def test_a_repaired_candidate_goes_on_sharing_and_equals_one_from_scratch() -> None:
    torch.manual_seed(0)
    model, x = Idle().eval(), torch.randn(16, 3, 8, 8)
    graph = fxprune.analyze(model, x)
    alone = fxprune.compress(model, 0.5, x, importance="l2", repair="lstsq", calibration=[x])
    for _ in range(3):
        slim = fxprune.compress(graph, 0.5, importance="l2", repair="lstsq", calibration=[x])
        assert torch.equal(slim(x), alone(x))
    assert slim.borrowed
