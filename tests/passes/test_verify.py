"""``verify=True``: leaves model, example and generators alone, raises no false alarm, and looks at other sizes too."""

from __future__ import annotations

import copy
import random
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fxprune
from fxprune.errors import InputError, VerificationError
from fxprune.passes.rules import registry


class Of(nn.Module):
    """A module whose ``forward`` is a function of it and the inputs."""

    def __init__(self, run: Any, **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def conv(before: int = 3, after: int = 16) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    "run", [lambda s, x: s.b(s.a(x.relu_())), lambda s, x: s.b(s.a(x.mul_(0.5).add_(1))), lambda s, x: x.add_(s.b(s.a(x)))]
)
def test_the_example_stays_what_it_was_though_the_model_works_in_place(run: Any) -> None:
    torch.manual_seed(0)
    x = images()
    before = x.clone()
    fxprune.compress(Of(run, a=conv(), b=conv(16, 3)).eval(), 0.5, x, verify=True)
    assert torch.equal(x, before)


def test_modes_buffers_and_generators_stay_what_they_were() -> None:
    class Counting(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv(16, 4)
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + x.mean()
            y: Tensor = self.b(F.dropout(self.a(x), 0.3)) + self.mean
            return y

    torch.manual_seed(0)
    model = Counting().train()
    state = copy.deepcopy(model.state_dict())
    numbers = (torch.random.get_rng_state(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    slim = fxprune.compress(model, 0.5, images().mul(1), verify=True)
    drawn = torch.random.get_rng_state()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and model.training and slim.training
    assert torch.equal(slim.get_buffer("mean"), state["mean"])
    torch.random.set_rng_state(numbers[0])
    images()
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert random.getstate() == numbers[1] and str(np.random.get_state()) == numbers[2]  # noqa: NPY002


def reparametrised(s: Any, x: Tensor) -> Any:
    mean, spread = s.m(s.a(x)), s.v(s.a(x))
    return s.b(mean + torch.randn_like(spread) * (0.5 * spread).exp())


def test_random_numbers_are_the_same_on_both_sides() -> None:
    """Of fewer channels fewer numbers are drawn, so that those that stay would get others."""
    drawing = [
        Of(reparametrised, a=conv(), m=conv(16, 12), v=conv(16, 12), b=conv(12, 4)),
        Of(lambda s, x: s.b(F.dropout(s.a(x).relu(), 0.5, True)), a=conv(), b=conv(16, 4)),
        Of(lambda s, x: s.b(s.a(x) + torch.rand_like(x[:, :1])), a=conv(), b=conv(16, 4)),
        Of(lambda s, x: s.b(s.a(x) * torch.bernoulli(torch.full_like(x[:, :1], 0.5))), a=conv(), b=conv(16, 4)),
    ]
    for model in drawing:
        fxprune.compress(model.eval(), 0.5, images(), verify=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.ln_structured(layer, "weight", 0.3, n=2, dim=0),
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_a_hook_computes_are_copied(change: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.ReLU(), conv(16, 12), nn.ReLU(), conv(12, 4)).eval()
    change(model[0])
    x = images()
    model(x)  # the computed weight now has a history, which deepcopy refuses
    fxprune.compress(model, 0.5, x, verify=True)
    batches = [(x, torch.randint(0, 4, (2, 8, 8)))]
    fxprune.compress(model, 0.5, x, importance="taylor", calibration=batches)
    assert all(p.grad is None for p in model.parameters())


def ties(s: Any, x: Tensor) -> Any:
    """All tokens score the same but for rounding, and the three best are read."""
    y = s.a(x)
    scores = s.c(y.relu()).flatten(2).mean(1) * 1e-12 + 1
    best = scores.topk(3).indices
    picked = s.b(y).flatten(2).gather(2, best.unsqueeze(1).expand(-1, 4, -1))
    return picked.flatten(1)


def test_scores_that_are_next_to_equal_before_a_top_k_are_no_failure() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = Of(ties, a=conv(), c=conv(16, 5), b=conv(16, 4)).eval()
        fxprune.compress(model, 0.5, images(), verify=True)
    model = Of(lambda s, x: s.b(s.a(x)) * (s.a(x).mean(1, keepdim=True) * 0 > 0), a=conv(), b=conv(16, 4)).eval()
    fxprune.compress(model, {"b": 0.0, "a": 0.5}, images(), verify=True)


def backwards(x: Tensor) -> Tensor:
    return x.flip(1)


torch.fx.wrap("backwards")


@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: s.b(backwards(s.a(x))).flatten(1).topk(3).values,
        lambda s, x: s.b(backwards(s.a(x))) + torch.rand_like(x[:, :1]),
        lambda s, x: s.b(backwards(s.a(x)).sort(2).values),
    ],
)
def test_a_wrong_network_is_not_excused_by_its_choices(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FUNCTIONS, backwards, registry.Rule(lambda walk, node, x: walk.pointwise(node, x)))
    torch.manual_seed(0)
    with pytest.raises(VerificationError, match="backwards"):
        fxprune.compress(Of(run, a=conv(), b=conv(16, 4)).eval(), 0.5, images(), verify=True)


def folded(x: Tensor) -> Tensor:
    return x


torch.fx.wrap("folded")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda y, n: y if len(y) == n else y * 2, "at batch size 3 the outputs differ"),
        (lambda y, n: y if y.shape[-1] == 8 else y + 1, "at width 12 the outputs differ"),
        (lambda y, n: y.view(n, -1, 8, 8), "at batch size 3 the original runs and the slim network fails"),
    ],
)
def test_other_sizes_are_looked_at(broken: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite that holds for the example alone."""

    def rewrite(slim: Any, node: Any) -> None:
        node.target = lambda y: broken(y, 2)

    rule = registry.Rule(lambda walk, node, x: walk.pointwise(node, x), rewrite)
    monkeypatch.setitem(registry.FUNCTIONS, folded, rule)
    torch.manual_seed(0)
    model = Of(lambda s, x: s.b(folded(s.a(x))).mean((2, 3)), a=conv(), b=conv(16, 4)).eval()
    with pytest.raises(VerificationError, match=words):
        fxprune.compress(model, 0.5, images(), verify=True)


def test_a_size_that_the_original_does_not_take_is_left_out() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv(16, 4), nn.Flatten(), nn.Linear(256, 3)).eval()
    fxprune.compress(model, 0.5, images(), verify=True)
    lengths = Of(lambda s, x: s.b(s.a(x) + s.p), a=nn.Linear(10, 16), b=nn.Linear(16, 4), p=nn.Parameter(torch.randn(5, 16))).eval()
    fxprune.compress(lengths, 0.5, torch.randn(2, 5, 10), verify=True)


def test_an_expanded_buffer() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
            self.register_buffer("scale", torch.rand(1).expand(8))

        def forward(self, x: Tensor) -> Any:
            return self.last(self.first(x) * self.scale)

    assert fxprune.compress(Scaled().eval(), 0.5, torch.randn(2, 6), verify=True).get_buffer("scale").shape == (4,)


def test_random_numbers_where_the_class_is_kept() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            return self.last(y + torch.randn(y.shape))

    fxprune.compress(Noisy().eval(), 0.5, torch.randn(2, 6), verify=True, keep_class=True)


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = [held]


class Holding(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.first, self.last, self.held = nn.Linear(5, 8), nn.Linear(8, 3), held
        self.beside = {"first": self.first}

    def forward(self, x: Tensor) -> Tensor:
        made = self.beside["first"](x).relu()
        return self.last(made)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [lambda: sys.stdout, threading.Lock, lambda: Holder(threading.Lock()), threading.local])
def test_what_cannot_be_copied_is_shared(make: Any) -> None:
    model, x = Holding(make()).eval(), torch.randn(4, 5)
    fxprune.compress(model, 0.5, x, verify=True)
    assert model.beside["first"] is model.first and model.first.out_features == 8


def test_what_can_be_neither_copied_nor_shared_is_named() -> None:
    model = Holding(None)
    model.first.register_module("inner", Holding({"numbers": (i for i in range(3))}))
    with pytest.raises(InputError, match=r"first\.inner\.held\['numbers'\] holds a generator, which cannot be copied"):
        fxprune.compress(model, 0.5, torch.randn(4, 5), verify=True)
