"""Which loss importances differentiate: the user's, the network's own, or cross-entropy where there is no doubt."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import EvaluationError, InputError
from fxprune.importance.gradients import gradients

X = torch.randn(6, 5)
Y = torch.randint(0, 4, (6,))


class Net(nn.Module):
    def __init__(self, give: Any = lambda scores, x: scores) -> None:
        super().__init__()
        self.a, self.b, self.give = nn.Linear(5, 10), nn.Linear(10, 4), give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.b(self.a(x).relu()), x)


def net(give: Any = lambda scores, x: scores) -> Net:
    torch.manual_seed(0)
    return Net(give).eval()


def wanted(loss: Any) -> Tensor:
    """The gradient of the first weight for a loss of the class scores."""
    model = net()
    loss(model(X)).backward()
    assert model.a.weight.grad is not None
    return model.a.weight.grad


def entropy(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, Y)


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


@pytest.mark.parametrize(
    ("give", "batch", "loss"),
    [
        (lambda s, x: s, (X, Y), entropy),
        (lambda s, x: s, [X, Y.int()], entropy),
        (lambda s, x: s, (X, torch.where(torch.arange(6) < 2, -100, Y)), lambda s: F.cross_entropy(s[2:], Y[2:])),
        (lambda s, x: (s,), (X, Y), entropy),
        (lambda s, x: {"boxes": s[:, :1] * 9, "logits": s}, (X, Y), entropy),
        (lambda s, x: OrderedDict(out=s, aux=s * 9), (X, Y), entropy),
        (lambda s, x: Answer(s, x), (X, Y), entropy),
        (lambda s, x: {"answer": s}, (X, Y), entropy),
        (lambda s, x: s, X, lambda s: F.cross_entropy(s, s.argmax(1))),
        (lambda s, x: s, (X, X[:, :4]), lambda s: F.mse_loss(s, X[:, :4])),
        (lambda s, x: Answer(s, x, s.square().mean()), (X, Y), lambda s: s.square().mean()),  # the network's own
        (lambda s, x: {"loss": s.square().mean(), "logits": s}, {"x": X}, lambda s: s.square().mean()),
    ],
)
def test_what_leaves_no_doubt(give: Any, batch: Any, loss: Any) -> None:
    found = gradients(net(give), [batch])["a.weight"][1]
    assert torch.allclose(found, wanted(loss), atol=1e-7)


DOUBTFUL = [
    (lambda s, x: {"boxes": s[:, :1], "classes": s}, (X, Y), "a dict of 'boxes', 'classes'"),
    (lambda s, x: {"classes": s, "boxes": s[:, :1]}, (X, Y), "a dict of 'classes', 'boxes'"),
    (lambda s, x: (s, x), (X, Y), "a tuple of 2"),
    (lambda s, x: s, (X, {"labels": Y}), "targets that are a dict"),
    (lambda s, x: s, (X, [Y, Y]), "targets that are a list"),
    (lambda s, x: s, (X, X), r"targets of shape \(6, 5\) and torch.float32"),  # a pair of two inputs
    (lambda s, x: s, (X, torch.ones(6, 5, dtype=torch.long)), r"targets of shape \(6, 5\)"),
    (lambda s, x: s, (X, Y + 4), r"targets of shape \(6,\)"),  # classes that the network does not have
    (lambda s, x: s, (X, F.one_hot(Y, 4).float()), r"targets of shape \(6, 4\)"),  # one class or several: two losses
    (lambda s, x: s, (X, F.one_hot(Y, 4).bool()), "torch.bool"),
    (lambda s, x: s.mean(), X, r"a tensor of shape \(\)"),
]


@pytest.mark.parametrize(("give", "batch", "words"), DOUBTFUL)
def test_what_leaves_a_doubt_names_the_ways_and_a_loss_settles_it(give: Any, batch: Any, words: str) -> None:
    with pytest.raises(InputError, match=f'{words}.*pass loss=f, where f\\(output, batch\\).*importance="l2"'):
        gradients(net(give), [batch])
    seen = []

    def loss(output: Any, given: Any) -> Tensor:
        seen.append(given)
        first = output if isinstance(output, Tensor) else next(iter(output.values())) if isinstance(output, dict) else output[0]
        return first.square().mean()

    assert gradients(net(give), [batch], loss)["a.weight"][1].abs().sum() > 0
    assert type(seen[0]) is type(batch)


def test_batches_of_a_datasets_loader() -> None:
    """Dicts with the labels among the inputs: the example says which are inputs."""
    model = net()
    batches = [{"x": X, "label": Y}]
    slim = fxprune.compress(model, 0.5, {"x": X[:2]}, importance="taylor", calibration=batches)
    same = fxprune.compress(model, 0.5, X[:2], importance="taylor", calibration=[(X, Y)])
    assert torch.equal(fxprune.record(slim).removed_units["a"], fxprune.record(same).removed_units["a"])
    with pytest.raises(InputError, match="targets that are a dict.*loss="):
        fxprune.compress(model, 0.5, {"x": X[:2]}, importance="taylor", calibration=[{"x": X, "label": Y, "weight": X[:, 0]}])
    fxprune.compress(
        model,
        *(0.5, {"x": X[:2]}),
        importance="taylor",
        calibration=[{"x": X, "label": Y, "weight": X[:, 0]}],
        loss=lambda output, batch: (F.cross_entropy(output, batch["label"], reduction="none") * batch["weight"]).mean(),
    )
    with pytest.raises(InputError, match="has no 'x', which the example inputs have; it has pixels, label"):
        fxprune.compress(model, 0.5, {"x": X[:2]}, importance="taylor", calibration=[{"pixels": X, "label": Y}])


def test_a_pair_of_two_inputs_is_no_target() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 10), nn.Linear(5, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z: Tensor = self.c((self.a(x) + self.b(y)).relu())
            return z

    model = Two().eval()
    for batch in ((X, X), [X, X], ((X, X), Y)):
        fxprune.compress(model, 0.5, (X, X), importance="taylor", calibration=[batch])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda output, batch: output, r"your loss gave a tensor of shape \(6, 4\) on batch 0; it must be a scalar"),
        (lambda output, batch: 1.0, "your loss gave a float"),
        (lambda output, batch: output.detach().mean(), "computed from the output"),
        (lambda output, batch: output.mean() * float("nan"), "your loss is nan on batch 0"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        fxprune.compress(net(), 0.5, X, importance="taylor", calibration=[(X, Y)], loss=loss)


def test_nothing_of_the_users_is_touched() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    model = nn.Sequential(InPlace(), net(lambda scores, x: scores + torch.rand_like(scores)))
    x, state = X.clone(), copy.deepcopy(model.state_dict())
    generator = torch.random.get_rng_state()
    with torch.no_grad():
        gradients(model, [(x, Y)])
    assert torch.equal(x, X) and torch.equal(generator, torch.random.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
