"""Objects that a network returns: made of what they hold, narrower where the next call takes them back, whole elsewhere."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxPruneError
from fxprune.passes.ir.objects import is_plain, made_object, name_of
from tests.passes.helpers import zeroed


class Layer:
    """What one attention layer keeps."""

    def __init__(self) -> None:
        self.keys: Any = None
        self.calls = 0

    def update(self, keys: Tensor) -> Tensor:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=1)
        self.calls += 1
        found: Tensor = self.keys
        return found


class Cache:
    """Layers in a list, a class to make more of, a dict of flags, and another cache."""

    def __init__(self, depth: int, inner: Cache | None = None) -> None:
        self.layers = [Layer() for _ in range(depth)]
        self.kind = Layer
        self.updated = {0: False}
        self.inner = inner

    def update(self, keys: Tensor, index: int) -> Tensor:
        self.updated[index] = True
        return self.layers[index].update(keys)


class Decoder(nn.Module):
    """Two layers of causal attention; ``cache`` comes back beside the result."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(6, 8)
        self.queries = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.keys = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, cache: Cache | None = None) -> dict[str, Any]:
        cache = Cache(2, Cache(1)) if cache is None else cache
        y = self.lift(x)
        for i, (q, k) in enumerate(zip(self.queries, self.keys, strict=True)):
            keys = cache.update(k(y), i)
            scores = q(y) @ keys.transpose(1, 2) / 8**0.5
            y = y + scores.softmax(-1) @ keys
        return {"y": self.head(y), "cache": cache}


X = torch.randn(2, 5, 6)


def test_a_cache_that_the_next_call_takes_back_is_as_narrow_as_its_readers() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    graph = fxprune.analyze(model, X)
    assert [g.size for g in graph.groups if not g.prunable] == [6, 3]
    slim = fxprune.compress(graph, 0.5, X, verify=True)
    for module in (slim, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        found: Any = module(X)["cache"]
        assert type(found) is Cache and type(found.layers[0]) is Layer and found.kind is Layer and type(found.inner) is Cache
        assert found.layers[1].keys.shape == (2, 5, 4) and found.updated == {0: True, 1: True} and found.layers[0].calls == 1
        found.layers.append(Layer())  # its own list, that of the graph stays
        found.updated[7] = True
        assert len(module(X)["cache"].layers) == 2 and 7 not in module(X)["cache"].updated
    assert slim(torch.randn(3, 7, 6))["cache"].layers[0].keys.shape == (3, 7, 4)
    whole = fxprune.compress(model, 0.0, X)(X)
    assert torch.equal(whole["cache"].layers[1].keys, model(X)["cache"].layers[1].keys) and torch.equal(whole["y"], model(X)["y"])


def test_the_kept_class_goes_on_from_its_cache() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    slim: Any = fxprune.compress(model, 0.5, X, keep_class=True)
    assert type(slim) is Decoder
    twin = zeroed(model, fxprune.record(slim).kept)
    mine, wanted = (module(X[:, 4:], cache=module(X[:, :4])["cache"]) for module in (slim, twin))
    assert mine["cache"].layers[1].keys.shape == (2, 5, 4) and torch.allclose(mine["y"], wanted["y"], atol=1e-5)


class Result:
    def __init__(self, features: Tensor, name: str) -> None:
        self.features, self.name = features, name


class Returns(nn.Module):
    """A result in an object of the user's: nobody takes it back, so its channels are those of an output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(6, 8), nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Any:
        made = Result(self.b(torch.relu(self.a(x))), "features")
        return {"alone": made, "tuple": (made, 1), "dict": {"made": [made]}}[self.how]


@pytest.mark.parametrize("how", ["alone", "tuple", "dict"])
def test_an_object_that_is_a_result_keeps_its_channels(how: str) -> None:
    model = Returns(how).eval()
    graph = fxprune.analyze(model, X)
    assert {g.name: g.reason for g in graph.groups if not g.prunable}["b"] == "it reaches the network's output"
    slim: Any = fxprune.compress(graph, 0.5, X)
    found, wanted = slim(X), model(X)
    picked = [{"alone": [one], "tuple": one, "dict": one["made"] if how == "dict" else []}[how][0] for one in (found, wanted)]
    assert type(picked[0]) is Result and picked[0].name == "features" and picked[0].features.shape == picked[1].features.shape
    assert slim.a.out_features == 4
    again: Any = fxprune.compress(slim, 0.5, X)
    assert again.a.out_features == 2 and again.b.out_features == 8


class Local(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Any:
        class Inner:
            pass

        made: Any = Inner()
        made.y = self.a(x)
        made.own = made if x.shape[0] == 3 else None
        return made


def test_what_cannot_be_made_is_said() -> None:
    what = rf"test_objects.py:{Local.forward.__code__.co_firstlineno}: forward returns a Inner, which .*: its class .*Inner is local to a f"
    with pytest.raises(FxPruneError, match=what):
        fxprune.analyze(Local(), X)
    assert name_of(Cache) == f"{__name__}:Cache" and name_of(type("Other", (), {})) is None


def test_what_is_an_object() -> None:
    class Slots:
        __slots__ = ("x", "__dict__")

    assert is_plain(Layer()) and is_plain(Cache(1))
    others: list[Any] = [1, "a", [1], {}, torch.ones(1), nn.Linear(2, 2), len, Layer, torch.float32, Slots()]
    assert not any(map(is_plain, others))
    assert made_object(f"{__name__}:Layer", {"calls": 3}).calls == 3
