"""``compress(..., keep_class=True)``: the user's class and methods with fewer channels, or an error that says why not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxprune
from fxprune.errors import UnsupportedError
from tests.passes.helpers import call, leaves, prime
from tests.passes.networks import ZOO

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """Two methods besides ``forward``, another training mode, a plain tensor that is read and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(12, 5)
        self.scale, self.unread = torch.rand(16, 1, 1), torch.rand(3)
        self.width = 16

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)) * self.scale
        if self.training:
            x = x * 2
        y: Tensor = self.body(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).flatten(2).mean(2))
        return logits

    def classify(self, x: Tensor) -> Tensor:
        return self.forward(x).argmax(1)


def primed(kind: type[nn.Module]) -> Any:
    """With weights and statistics that leave no output at rest."""
    return prime(kind(), (X,))


def made(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(0)
    return fxprune.compress(model, 0.5, X, **options)


def test_the_class_and_its_methods_stay(tmp_path: Path) -> None:
    model = primed(Net)
    slim, graph = made(model, keep_class=True, verify=True), made(model)
    assert type(slim) is Net and slim.stem.out_channels == 8 and slim.width == 16
    assert type(slim.body) is nn.Sequential and slim.unread is not model.unread and torch.equal(slim.unread, model.unread)
    for training in (False, True):
        slim.train(training), graph.train(training)
        assert torch.equal(slim(X), graph(X))
    slim.eval()
    assert torch.equal(slim.classify(X), slim(X).argmax(1)) and slim.features(X).shape == (2, 6, 8, 8)
    assert torch.equal(copy.deepcopy(slim)(X), slim(X))
    record, other = fxprune.record(slim), fxprune.record(graph)
    assert record.keep_class and not other.keep_class and record.after == other.after
    assert {n: p.shape for n, p in slim.named_parameters()} == {n: p.shape for n, p in graph.named_parameters()}
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), model.scale, model.unread)}
    assert not ours & {t.untyped_storage().data_ptr() for t in (*slim.parameters(), *slim.buffers(), slim.scale, slim.unread)}
    fxprune.save(slim, tmp_path / "slim.safetensors")
    back: Any = fxprune.load(tmp_path / "slim.safetensors", Net().eval())
    assert type(back) is Net and torch.equal(back.classify(X), slim.classify(X)) and torch.equal(back(X), slim(X))


def test_a_kept_class_is_pruned_again(tmp_path: Path) -> None:
    once = made(primed(Net), keep_class=True)
    for keep_class in (True, False):
        twice: Any = fxprune.compress(once, 0.5, X, keep_class=keep_class).eval()
        assert (type(twice) is Net) == keep_class and twice.stem.out_channels == 4
        fxprune.save(twice, tmp_path / "slim.safetensors")
        back = fxprune.load(tmp_path / "slim.safetensors", Net().eval())
        assert torch.equal(back(X), twice(X)) and (type(back) is Net) == keep_class


class Literal(Net):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).reshape(-1, 12, 64).mean(2))  # line of Literal
        return logits


class Scaled(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        logits: Tensor = self.head((x * x.shape[1] ** -0.5).mean((2, 3)))  # line of Scaled
        return logits


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if x.shape[1] > 8:
            x = x.relu()  # line of Branching
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Outside(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        logits: Tensor = self.head(x.mean((2, 3)) * float(int(x.shape[1])))  # line of Outside
        return logits


class Asserting(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        assert x.shape[1] == 12, "channels"  # line of Asserting
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("kind", [Literal, Scaled, Branching, Outside, Asserting])
def test_a_number_that_changes_is_named_with_its_line(kind: type[nn.Module]) -> None:
    lines = Path(__file__).read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if text.endswith(f"# line of {kind.__name__}"))
    with pytest.raises(UnsupportedError, match=rf"test_keep_class.py:{line}: .*leave keep_class out") as caught:
        made(primed(kind), keep_class=True)
    assert "\n" not in str(caught.value)
    made(primed(kind), verify=True)  # the graph module can


def test_what_has_no_class_to_keep() -> None:
    with pytest.raises(UnsupportedError, match="is a .* already and has no class of its own"):
        fxprune.compress(made(Net()), 0.5, X, keep_class=True)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_networks_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(2, 3, 64, 64)
    slim: Any = fxprune.compress(model, 0.5, x, keep_class=True)
    assert type(slim) is type(model) and torch.equal(slim(x), fxprune.compress(model, 0.5, x)(x))


def sound(name: str) -> bool:
    """Whether the class of a test network can stay; where it can, it computes what the graph module does."""
    torch.manual_seed(0)
    inputs = ZOO[name].inputs()
    model = prime(ZOO[name].make(), inputs)
    graph = fxprune.compress(model, 0.5, inputs)
    try:
        slim = fxprune.compress(model, 0.5, inputs, keep_class=True)
    except UnsupportedError:
        return False
    assert type(slim) is type(model)
    for a, b in zip(leaves(call(graph.eval(), inputs)), leaves(call(slim.eval(), inputs)), strict=True):
        assert torch.equal(a, b), name
    return True


NAMES = sorted(ZOO)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_some_classes_stay_and_some_do_not() -> None:
    assert {sound(name) for name in NAMES[::12]} == {True, False}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", NAMES)
def test_every_test_network(name: str) -> None:
    sound(name)
