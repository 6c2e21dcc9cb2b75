"""The traced graph, nothing pruned, is compared with the model on the example: what no trace follows is refused or named, never silent."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.passes.tracing.guard.plain_code import is_plain
from fxprune.passes.tracing.side_effects.reachable import reachable

torch.manual_seed(0)
X = torch.randn(2, 3, 8)
CALLS: list[int] = []
TAKEN: dict[str, Any] = {}


class Net(nn.Module):
    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 4, 1)
        self.register_buffer("steps", torch.zeros(1))
        self.how, self.number, self.seen = how, 0, [0]
        self.plain = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.how(self, self.first(x).relu()))
        assert isinstance(made, Tensor)
        return made


def by_class_of_tensor(_: Any, y: Tensor) -> Tensor:
    return y * 3 if str(y.__class__) == "<class 'torch.Tensor'>" else y * 2


def by_meta(_: Any, y: Tensor) -> Tensor:
    return y * 3 if y.is_meta else y * 2


def by_attribute_of_the_tracer(_: Any, y: Tensor) -> Tensor:
    return y * 3 if hasattr(y, "node") else y * 2


def by_method_resolution(_: Any, y: Tensor) -> Tensor:
    return y * 3 if "Tensor" in [c.__name__ for c in y.__class__.__mro__] and not hasattr(y, "tracer") else y * 2


def by_the_twins_mark(s: Any, y: Tensor) -> Tensor:
    return y * 3 if "_fxprune_skeleton" in s.__dict__ else y * 2


def by_identity(s: Any, y: Tensor) -> Tensor:
    return y * 3 if id(s) == TAKEN["id"] else y * 2


@pytest.mark.parametrize(
    "how", [by_class_of_tensor, by_meta, by_attribute_of_the_tracer, by_method_resolution, by_the_twins_mark, by_identity]
)
def test_what_is_traced_otherwise_than_it_runs_is_not_pruned_in_silence(how: Callable[[Any, Tensor], Tensor]) -> None:
    """Right, or refused with the line at which it first shows."""
    model = Net(how).eval()
    TAKEN["id"] = id(model)
    try:
        slim = fxprune.compress(model, 0.0, X)
    except TraceError as error:
        assert "on the example the traced graph differs" in str(error) and "test_guard.py" in str(error)
        return
    assert torch.equal(slim(X), model(X))


def test_a_difference_is_refused_with_its_line_and_can_be_waved_through() -> None:
    model = Net(by_the_twins_mark).eval()
    with pytest.raises(TraceError, match=r"test_guard.py:\d+: on the example the traced graph differs by"):
        fxprune.analyze(model, X)
    assert fxprune.analyze(model, X, check=False).groups
    assert not torch.allclose(fxprune.compress(model, 0.0, X, check=False)(X), model(X))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x).relu())


class Around(nn.Module):
    """The code at the root is traced otherwise than it runs; its parts are not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Inner(), Inner()

    def forward(self, x: Tensor) -> Any:
        x = self.one(x)
        return self.two(x * 3 if "_fxprune_skeleton" in self.__dict__ else x)


def test_the_parts_are_pruned_where_the_root_differs() -> None:
    model = Around().eval()
    slim = fxprune.compress(model, 0.0, X)
    assert torch.allclose(slim(X), model(X)) and any("the root could not be traced" in note for note in fxprune.record(slim).notes)
    assert fxprune.compress(model, 0.5, X, verify=True).get_parameter("one.a.weight").shape[0] == 8


class KnowsItself(Around):
    def forward(self, x: Tensor) -> Any:
        scale = 3 if float(x.sum()) > 1e9 else 2
        return self.two(self.one(x)) * (scale if id(self) == TAKEN["id"] else 1)


def test_code_around_parts_that_knows_its_module_is_refused() -> None:
    """The slim module is another object."""
    model = KnowsItself().eval()
    TAKEN["id"] = id(model)
    with pytest.raises(TraceError, match="in the code around its parts"):
        fxprune.analyze(model, X)
    TAKEN["id"] = 0
    fxprune.analyze(model, X)


class Training(Inner):
    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        if self.training:
            x = x * 3 if "_fxprune_skeleton" in self.__dict__ else x
        return self.b(x)


def test_a_difference_in_training_mode_is_a_note() -> None:
    for model in (Training(), Training().eval()):
        notes = fxprune.analyze(model, X).notes
        assert [note for note in notes if "in training mode the slim module may compute something else" in note]


def touches_everything(s: Any, y: Tensor) -> Tensor:
    s.number += 1
    s.seen.append(s.number)
    s.steps += 1
    s.plain.add_(1)
    s.new = y
    CALLS.append(1)
    return y * random.random() + np.random.rand() + torch.rand(1)  # noqa: NPY002


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_afterwards_as_it_was(training: bool) -> None:
    model = Net(touches_everything).train(training)
    model.norm = nn.BatchNorm1d(3)
    hooked: list[int] = []
    model.first.register_forward_hook(lambda *_: hooked.append(1))
    keys, buffers = list(model.__dict__), {k: v.clone() for k, v in model.named_buffers()}
    lists, plain, calls = list(model.seen), model.plain.clone(), list(CALLS)
    states = random.getstate(), np.random.get_state(legacy=False)["state"]["pos"], torch.get_rng_state()  # noqa: NPY002
    modes = [m.training for m in model.modules()]
    fxprune.analyze(model, X)
    assert list(model.__dict__) == keys and model.number == 0 and model.seen == lists and calls == CALLS and not hooked
    assert torch.equal(model.plain, plain) and all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert (random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]) == states[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2]) and [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.grad_fn is None for p in model.parameters())


class WritesWeights(Inner):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.a.weight.clamp_(-0.01, 0.01)
        return self.b(self.a(x))


def test_weights_that_forward_writes_stay() -> None:
    model = WritesWeights().eval()
    before = copy.deepcopy(model.state_dict())
    fxprune.analyze(model, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_that_gives_other_numbers_each_time_is_not_judged() -> None:
    counted = itertools.count(1)

    def counts(_: Any, y: Tensor) -> Any:
        return y * next(counted)

    model = Net(counts).eval()
    assert fxprune.analyze(model, X).groups
    assert next(counted) > 3, "it ran"


def test_a_generator_is_refused_by_name() -> None:
    generator = torch.Generator()
    with pytest.raises(TraceError, match=r"test_guard.py:\d+: numbers are drawn from a torch.Generator"):
        fxprune.analyze(Net(lambda s, y: y * torch.rand(1, generator=generator)).eval(), X)


def test_a_plain_tensor_that_forward_writes_into_is_named() -> None:
    def counts(s: Any, y: Tensor) -> Any:
        s.plain.add_(1)
        return y * s.plain[0]

    model = Net(counts).eval()
    slim = fxprune.compress(model, 0.0, X)
    assert not model.plain.any() and any("forward writes into 'plain'" in note for note in fxprune.record(slim).notes)
    assert torch.equal(slim(X), model(X))


def test_code_that_only_computes_is_not_run() -> None:
    class Plain(Inner):
        def forward(self, x: Tensor) -> Any:
            y = self.b(self.a(x).relu()) if self.a is not None else x
            return torch.cat([y, x], 1) + x.shape[1]

    class Asks(Plain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if "a" in self._modules else x

    class Tries(Plain):
        def forward(self, x: Tensor) -> Any:
            try:
                return self.b(self.a(x))
            except TypeError:
                return x

    class Looks(Plain):
        def forward(self, x: Tensor) -> Any:
            return self.b(self.a(x)) * TAKEN.get(str(x.shape[1]), 1)

    def plain(model: nn.Module) -> bool:
        return is_plain(model.modules(), reachable(model.modules()))

    assert plain(Plain())
    assert not any(map(plain, (Asks(), Tries(), Looks(), Net(lambda s, y: y))))
    hooked = Plain()
    hooked.a.register_forward_hook(lambda *_: None)
    assert not plain(hooked)


def test_on_meta_it_is_said() -> None:
    with torch.device("meta"):
        model = Net(by_meta).eval()
    notes = fxprune.analyze(model, torch.empty(2, 3, 8, device="meta")).notes
    assert any("was not compared with the model" in note for note in notes)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda s, y: y * 3 if str(y.dtype) == "torch.float32" else y * 2, "the name of a dtype was specialised to torch.float32"),
        (lambda s, y: y * 3 if f"{y.dtype}".endswith("float32") else y * 2, "the name of a dtype was specialised to torch.float32"),
        (lambda s, y: y * 3 if isinstance(y.shape, torch.Size) else y * 2, ""),
        (lambda s, y: y * 3 if isinstance(y.size()[1:], (list, torch.Size)) else y * 2, ""),
        (lambda s, y: y * 3 if type(y.shape) is torch.Size else y * 2, ""),
        (lambda s, y: y * 3 if str(y.device) == "cpu" else y * 2, ""),
    ],
)
def test_what_text_and_types_say_of_proxies(how: Callable[[Any, Tensor], Tensor], said: str) -> None:
    """Also where nothing is compared."""
    model = Net(how).eval()
    slim = fxprune.compress(model, 0.0, X, check=False)
    assert torch.equal(slim(X), model(X))
    notes = fxprune.record(slim).notes
    assert any(said in note for note in notes) if said else not notes
