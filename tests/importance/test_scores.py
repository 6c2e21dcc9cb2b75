"""Criteria on parameters whose channels lie on a third dimension, as a transformer's positional embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.models import VisionTransformer

import fxprune
from fxprune.errors import InputError
from fxprune.importance.criteria import scores


@pytest.mark.parametrize("importance", ["taylor", "l1", "l2", "variance"])
def test_third_dimension_is_scored(importance: str) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3).eval()
    images = torch.randn(4, 3, 16, 16)
    graph = fxprune.analyze(model, images)
    batches = [(images, torch.tensor([0, 1, 2, 0]))]
    (stream,) = (g for g in graph.groups if any(n == "encoder.pos_embedding" and d == 2 for n, d, _ in g.members))
    before = scores(graph, importance, batches)[stream.name]
    with torch.no_grad():
        model.encoder.pos_embedding[..., 3] += 5.0
    after = scores(graph, importance, batches)[stream.name]
    if importance != "taylor":  # moving the embedding moves the gradients of everything
        assert (after != before).nonzero()[0].tolist() == [3]
    assert after.shape == (8,)


def test_weights_without_values_are_ranked_by_chance_alone() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        inputs = torch.randn(3, 4)
    with pytest.raises(InputError, match="'0.bias' is on the meta device and has no values .*; pass importance=\"random\""):
        fxprune.compress(model, 0.5, inputs)
    slim = fxprune.compress(model, 0.5, inputs, importance="random")
    assert slim(inputs).shape == (3, 2) and slim.get_parameter("0.weight").shape == (4, 4)


@pytest.mark.parametrize("importance", ["l2", "l1", "variance"])
def test_a_ranking_is_remembered_while_the_weights_are_unchanged(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.importance import criteria

    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    graph = fxprune.analyze(model, torch.randn(3, 4))
    made: list[int] = []
    reckoned: Any = criteria._scores

    def counted(*given: Any) -> Any:
        made.append(1)
        return reckoned(*given)

    monkeypatch.setattr(criteria, "_scores", counted)
    first = scores(graph, importance)["0"].copy()
    scores(graph, importance)["0"][:] = 0  # what is handed out is the caller's own
    assert (scores(graph, importance)["0"] == first).all() and len(made) == 1
    changes: list[Any] = [
        lambda: model[0].weight.mul_(2),
        lambda: model[0].weight.data[3].mul_(2),  # the version stays
        lambda: model[2].weight.data[:, 5].add_(1),
        lambda: setattr(model[0], "weight", torch.nn.Parameter(model[0].weight.detach() + 1)),
    ]
    for count, change in enumerate(changes, 2):
        with torch.no_grad():
            change()
        fresh = scores(fxprune.analyze(model, torch.randn(3, 4)), importance)["0"]
        assert (scores(graph, importance)["0"] == fresh).all() and len(made) == 2 * count - 1


def test_weights_that_are_not_finite_are_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        model.get_parameter("0.weight")[2, 1] = float("nan")
    with pytest.raises(InputError, match="'0.weight' holds values that are not finite, by which importance 'l2' cannot rank"):
        fxprune.compress(model, 0.5, torch.randn(2, 6))
