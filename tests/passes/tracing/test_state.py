"""Buffers that forward binds anew, and what else it keeps on its modules."""

from __future__ import annotations

import copy
import threading
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, zeroed


class Counting(nn.Module):
    """In training, a running mean and a count are bound anew after they were read; two buffers change places."""

    mean: Tensor
    steps: Tensor
    old: Tensor
    new: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        self.register_buffer("mean", torch.rand(12))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("old", torch.tensor(1.0))
        self.register_buffer("new", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.last(torch.relu(h * self.mean)) * self.old
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            self.steps = self.steps + 1
            self.old, self.new = self.new, self.old
        assert isinstance(y, Tensor)
        return y


class Caching(Counting):
    """What is no buffer, and one of another shape."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        self.seen = [x.mean(1)]
        self.steps = x.sum(1)
        return super().forward(x)


def test_buffers_bound_anew_are_written() -> None:
    torch.manual_seed(0)
    model, inputs = Counting().eval(), [torch.randn(4, 5) for _ in range(3)]
    slim = fxprune.compress(model, 0.5, inputs[0], verify=True)
    record = fxprune.record(slim)
    assert not record.notes and "mean" in record.kept
    twin = zeroed(model, record.kept).train()
    slim = copy.deepcopy(slim).train()
    for x in inputs:
        for module in (twin, slim):
            module.zero_grad()
        wanted, found = twin(x), slim(x)
        torch.testing.assert_close(found, wanted)
        wanted.sum().backward()
        found.sum().backward()
    left = dict(twin.named_buffers())
    for name, value in slim.named_buffers():
        want = left[name] if name != "mean" else left[name][record.kept["mean"][0]]
        torch.testing.assert_close(value, want)
    assert int(slim.get_buffer("steps")) == 3 and float(slim.get_buffer("old")) == 2.0
    torch.testing.assert_close(slim.get_parameter("last.bias").grad, twin.get_parameter("last.bias").grad)


def test_what_a_graph_cannot_keep_is_named() -> None:
    slim = fxprune.compress(Caching().eval(), 0.5, torch.randn(4, 5))
    notes = fxprune.record(slim).notes
    assert {note.rpartition(": ")[2] for note in notes} == {
        f"forward sets {name!r}, which the slim module does not do" for name in ("steps", "calls", "seen")
    }
    assert all("test_state.py" in note for note in notes if "calls" not in note)


class HooksOnFirstCall(nn.Module):
    """As transformers capture hidden states: the first call registers hooks, which fill a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 6)])
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(6, 3)])
        self.hooked = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            for layer in self.layers:
                layer.register_forward_hook(lambda module, args, out: _SEEN.append(out))
            self.hooked = True
        _SEEN.clear()
        for layer in self.layers:
            x = layer(x)
        made = torch.zeros(())
        for head, seen in zip(self.heads, list(_SEEN), strict=False):
            made = made + head(seen)
        return made


_SEEN: list[Tensor] = []


@pytest.mark.parametrize("ran", [False, True])
def test_hooks_that_the_first_call_registers(ran: bool) -> None:
    model, x = HooksOnFirstCall().eval(), torch.randn(4, 8)
    if ran:
        model(x)
    twin = copy.deepcopy(model)
    for _ in range(2):
        slim = fxprune.compress(model, 0.0, x)
        assert gap(twin(x), slim(x)) < 1e-6
        assert all(len(layer._forward_hooks) == ran for layer in model.layers)
    assert gap(twin(x), model(x)) == 0
    assert all(len(layer._forward_hooks) == 1 for layer in model.layers)


def ramp(length: int) -> Tensor:
    return torch.arange(length).float()[:, None]


class Keeping(nn.Module):
    """It keeps a table on the first call, in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(5, 12), nn.Identity(), nn.Linear(12, 3)
        self.bag, self.local = types.SimpleNamespace(table=None), threading.local()

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.first(x) + self.table(x.shape[0]))
        assert isinstance(made, Tensor)
        return made

    def table(self, length: int) -> Tensor:
        return ramp(length)

    def state(self) -> Any:
        modules = [(m, dict(m.__dict__), dict(m._buffers), set(m._non_persistent_buffers_set)) for m in self.modules()]
        return modules, vars(self.bag).copy(), vars(self.local).copy(), set(vars(type(self))), _LATE in globals()


_LATE = "LATE"


class RegistersABuffer(Keeping):
    def table(self, length: int) -> Tensor:
        if not hasattr(self, "grid"):
            self.register_buffer("grid", ramp(9), persistent=False)
        return self.get_buffer("grid")[:length]


class RegistersElsewhere(Keeping):
    def table(self, length: int) -> Tensor:
        if not hasattr(self.part, "grid"):
            self.part.register_buffer("grid", ramp(9), persistent=False)
        return self.part.get_buffer("grid")[:length]


class InABag(Keeping):
    def table(self, length: int) -> Tensor:
        if self.bag.table is None:
            self.bag.table = ramp(9)
        return self.bag.table[:length]  # type: ignore[no-any-return]


class InAThread(Keeping):
    def table(self, length: int) -> Tensor:
        if not hasattr(self.local, "table"):
            self.local.table = ramp(9)
        return self.local.table[:length]  # type: ignore[no-any-return]


class OnTheClass(Keeping):
    known: Tensor

    def table(self, length: int) -> Tensor:
        if not hasattr(type(self), "known"):
            type(self).known = ramp(9)
        return self.known[:length]


class InANewGlobal(Keeping):
    def table(self, length: int) -> Tensor:
        global LATE
        if _LATE not in globals():
            LATE = ramp(9)  # type: ignore[name-defined]
        return LATE[:length]  # type: ignore[name-defined, no-any-return]


@pytest.mark.parametrize("kind", [RegistersABuffer, RegistersElsewhere, InABag, InAThread, OnTheClass, InANewGlobal])
def test_the_original_holds_what_it_held(kind: type[Keeping]) -> None:
    model, x = kind().eval(), torch.randn(4, 5)
    before = model.state()
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert model.state() == before
    assert not any("kept what it computed" in note for note in fxprune.record(slim).notes)


class Codebook(nn.Module):
    """Its counts have a size that only a call of ``__init__`` knows, and forward updates them in training."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.codes = nn.Embedding(size, 12)
        self.register_buffer("count", torch.zeros(size))
        self.count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.codes.weight).argmin(1)
        chosen = torch.zeros(len(x), len(self.codes.weight)).scatter_(1, nearest[:, None], 1)
        if self.training:
            self.count = self.count * 0.9 + 0.1 * chosen.sum(0)
        return x + (chosen @ self.codes.weight - x).detach()


@pytest.mark.parametrize("ran", [False, True])
def test_a_buffer_whose_size_is_an_argument(ran: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 12), Codebook(10), nn.Linear(12, 4)), torch.randn(6, 3)
    if ran:
        model.train()(x)
    slim = fxprune.compress(model.eval(), 0.0, x)
    assert not fxprune.record(slim).notes
    for _ in range(2):
        torch.testing.assert_close(slim.train()(x), model.train()(x))
    assert torch.equal(slim.get_buffer("1.count"), model.get_buffer("1.count")) and float(slim.get_buffer("1.count").sum()) > 0.5


class Queue(nn.Module):
    """As MoCo keeps one: the buffer says where the next keys go."""

    queue: Tensor
    place: Tensor

    def __init__(self, trains: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.trains = nn.Linear(10, 16), nn.Linear(16, 12), trains
        self.register_buffer("queue", torch.randn(12, 15))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x).relu())
        found = y @ self.queue.clone().detach()
        if self.training or not self.trains:
            start, batch = int(self.place), y.shape[0]
            self.queue[:, start : start + batch] = y.detach().T
            self.place[0] = (start + batch) % 15
        return found


@pytest.mark.parametrize("trains", [False, True])
def test_a_place_in_a_buffer_is_read_at_every_call(trains: bool) -> None:
    torch.manual_seed(0)
    model, x = Queue(trains).eval(), torch.randn(3, 10)
    whole = fxprune.compress(model, 0.0, x)
    model.train(), whole.train()
    for _ in range(6):
        x = torch.randn(3, 10)
        torch.testing.assert_close(whole(x), model(x))
        assert torch.equal(whole.get_buffer("place"), model.place)
        torch.testing.assert_close(whole.get_buffer("queue"), model.queue)
    slim = fxprune.compress(model.eval(), 0.5, x, verify=True)
    assert slim.get_parameter("a.weight").shape == (8, 10)


class Initialised(nn.Module):
    """Sets itself up by its first batch, as ActNorm of flows."""

    done: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(16))
        self.register_buffer("done", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Any:
        if self.training and self.done.item() == 0:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
                self.done.fill_(1)
        return x + self.shift


def test_what_is_set_up_once_is_not_set_up_at_every_step() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(10, 16), Initialised(), nn.Linear(16, 4)).eval(), torch.randn(3, 10)
    whole = fxprune.compress(model, 0.0, x)
    model.train(), whole.train()
    for _ in range(3):
        x = torch.randn(3, 10)
        torch.testing.assert_close(whole(x), model(x))


class Temperature(nn.Module):
    """Evaluation reads what training counts."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 16), nn.Linear(16, 4)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.step += 1
        return self.b(self.a(x).relu()) / (1 + int(self.step))


def test_a_count_of_steps_is_read_at_every_call() -> None:
    torch.manual_seed(0)
    model, x = Temperature().eval(), torch.randn(3, 10)
    whole = fxprune.compress(model, 0.0, x)
    for training in (True, True, False, True, False):
        model.train(training), whole.train(training)
        torch.testing.assert_close(whole(x), model(x))
