"""Code that knows its modules by what they are: as keys, by ``id()``, in sets; that tries a call; and that asks parts for attributes."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError

torch.manual_seed(0)
X = torch.randn(2, 3, 8)
FACTORS: dict[Any, float] = {}
BY_ID: dict[int, float] = {}
WEAK: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
WEAK_SET: weakref.WeakSet[nn.Module] = weakref.WeakSet()
SPECIAL: set[nn.Module] = set()
LISTED: list[nn.Module] = []
BY_NAME: dict[str, nn.Module] = {}


class Net(nn.Module):
    factors: dict[Any, float] = {}

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 4, 1)
        self.mine = {id(self.first): 3.0}
        self.weak = weakref.WeakKeyDictionary({self.first: 3.0})
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.how(self, self.first(x).relu()))
        assert isinstance(made, Tensor)
        return made


HOW: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "keyed by the module": lambda s, y: y * FACTORS.get(s, 2.0),
    "keyed by a child": lambda s, y: y * FACTORS.get(s.first, 2.0),
    "of the class": lambda s, y: y * s.factors.get(s.last, 2.0),
    "weak": lambda s, y: y * WEAK.get(s, 2.0),
    "weak set": lambda s, y: y * 3.0 if s in WEAK_SET else y * 2.0,
    "set": lambda s, y: y * 3.0 if s.first in SPECIAL else y * 2.0,
    "list": lambda s, y: y * 3.0 if s.last in LISTED else y * 2.0,
    "id": lambda s, y: y * BY_ID.get(id(s), 2.0),
    "id on the instance": lambda s, y: y * s.mine.get(id(s.first), 2.0),
    "weak on the instance": lambda s, y: y * s.weak.get(s.first, 2.0),
    "by name": lambda s, y: BY_NAME["scale"](y),
}


@pytest.mark.parametrize("name", list(HOW))
def test_modules_are_found_in_tables(name: str) -> None:
    model = Net(HOW[name]).eval()
    tables = (FACTORS, BY_ID, WEAK, WEAK_SET, SPECIAL, LISTED, BY_NAME, Net.factors)
    try:
        for module in model.modules():
            FACTORS[module] = WEAK[module] = BY_ID[id(module)] = Net.factors[module] = 3.0
            WEAK_SET.add(module)
            SPECIAL.add(module)
            LISTED.append(module)
        BY_NAME["scale"] = nn.ReLU()
        held = [set(table) for table in tables]
        slim = fxprune.compress(model, 0.0, X)
        assert torch.equal(slim(X), model(X))
        fxprune.compress(model, 0.5, X, verify=True)
        assert [set(table) for table in tables] == held
    finally:
        for table in tables:
            table.clear()


def test_a_table_of_modules_holds_the_layers_of_the_network() -> None:
    """Its weights are pruned there as by their names."""
    model = Net(lambda s, y: BY_NAME["second"](y)).eval()
    model.second = nn.Conv1d(16, 16, 1)
    try:
        BY_NAME["second"] = model.second
        slim = fxprune.compress(model, 0.5, X, verify=True)
        assert slim.get_parameter("second.weight").shape == (8, 8, 1)
        assert BY_NAME["second"] is model.second
    finally:
        BY_NAME.clear()


class Tries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        for layer in (self.first, self.last):
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x


class TriesWithout(Tries):
    def forward(self, x: Tensor) -> Any:
        try:
            y = self.first()
        except TypeError:
            y = self.first(x)
        return self.last(y)


class TriesAFunction(Tries):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        try:
            y = F.softplus(y, betas=2)  # type: ignore[call-arg]
        except TypeError:
            y = F.softplus(y)
        return self.last(y)


class TriesAShape(Tries):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        try:
            y = y + torch.ones(7)
        except RuntimeError:
            y = y + 1
        return self.last(y)


@pytest.mark.parametrize("kind", [Tries, TriesWithout, TriesAFunction, TriesAShape])
def test_a_call_that_fails_is_tried_as_in_a_run(kind: type[nn.Module]) -> None:
    model = kind().eval()
    slim = fxprune.compress(model, 0.0, X)
    assert torch.equal(slim(X), model(X))
    assert not any("failed" in note for note in fxprune.record(slim).notes)
    assert fxprune.compress(model, 0.5, X, verify=True).get_parameter("first.weight").shape[0] == 8


def test_a_call_that_nobody_catches_is_named() -> None:
    class Wrong(Tries):
        def forward(self, x: Tensor) -> Any:
            return self.last(self.first(x, lengths=None))

    with pytest.raises(fxprune.FxPruneError, match="unexpected keyword argument 'lengths'"):
        fxprune.compress(Wrong().eval(), 0.5, X)


class Layer(nn.Module):
    kind = "convolution"

    def __init__(self, inputs: int, outputs: int, empty: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(inputs, 16, 1), nn.Conv1d(16, outputs, 1)
        self.empty = empty
        self.register_forward_hook(lambda module, args, output: output * 2)

    @property
    def full(self) -> bool:
        return not self.empty

    def shifted(self, x: Tensor) -> Tensor:
        return x + (1 if self.full else 2)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x).relu())


class FollowsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Layer(3, 8, False), Layer(8, 4, True)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = x * 2
        for layer in (self.a, self.b):
            x = layer(x)
            if not layer.empty and layer.full and layer.kind == "convolution" and isinstance(layer, Layer):
                x = layer.shifted(x)
        return x


def test_parts_have_what_their_classes_have() -> None:
    model = FollowsValues().eval()
    slim = fxprune.compress(model, 0.0, X)
    assert torch.allclose(slim(X), model(X), rtol=1e-5)
    slim = fxprune.compress(model, 0.5, X)
    assert slim.get_parameter("a.a.weight").shape[0] == 8
    wanted = slim(X)
    assert torch.equal(copy.deepcopy(slim)(X), wanted) and isinstance(copy.deepcopy(slim).a, Layer)
    model.a._forward_hooks.clear()
    for module in slim.modules():
        module._forward_hooks.clear()
    assert torch.equal(pickle.loads(pickle.dumps(slim))(X), wanted)


class Strict(nn.Module):
    """A class that wants a word from its heirs."""

    def __init_subclass__(cls, name: str, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.word = name  # type: ignore[attr-defined]


class StrictLayer(Strict, name="strict"):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.empty = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 4, 1), False

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x).relu())


class HoldsStrict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = StrictLayer()

    def forward(self, x: Tensor) -> Any:
        return self.a(x) if float(x.sum()) < 1e9 and not self.a.empty else x


def test_a_part_of_a_class_without_heirs_has_its_attributes() -> None:
    model = HoldsStrict().eval()
    assert torch.equal(fxprune.compress(model, 0.0, X)(X), model(X))


class Equal(nn.Linear):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(self) -> int:
        return 1


def test_layers_that_say_they_are_equal_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Equal(8, 8), nn.ReLU(), Equal(8, 8))
    with pytest.raises(InputError, match=r"^2 and 4 are two modules that Equal.__eq__ calls equal"):
        fxprune.analyze(model, torch.randn(2, 4))


class Reader(nn.Module):
    """Reads a layer of its owner, which it holds weakly, since a plain attribute would register the owner as its child."""

    def __init__(self, owner: nn.Module, proxy: bool) -> None:
        super().__init__()
        object.__setattr__(self, "owner", weakref.proxy(owner) if proxy else weakref.ref(owner))
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        held: Any = self.owner
        owner: Any = held if type(held) in weakref.ProxyTypes else held()
        found: Tensor = self.last(owner.first(x).relu())
        return found


class Owner(nn.Module):
    def __init__(self, proxy: bool) -> None:
        super().__init__()
        self.first, self.reader = nn.Linear(8, 16), Reader(self, proxy)

    def forward(self, x: Tensor) -> Any:
        return self.reader(x)


@pytest.mark.parametrize("proxy", [False, True])
def test_an_owner_that_is_held_weakly(proxy: bool) -> None:
    model: Any = Owner(proxy).eval()
    slim: Any = fxprune.compress(model, 0.5, X, verify=True)
    same: Any = fxprune.compress(model, 0.5, X, keep_class=True, verify=True)
    assert slim.first.weight.shape == (8, 8) and not list(slim.buffers())
    for made in (slim, same):
        torch.testing.assert_close(made(X), slim(X))
        made(X).sum().backward()
        assert made.first.weight.grad is not None and model.first.weight.grad is None
