"""Files of models that ran before they were pruned load into models that never ran; and inputs that say something of each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.example_inputs import build, describe
from tests.passes.helpers import gap


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.inside(self.first(x)))
        assert isinstance(made, Tensor)
        return made

    def inside(self, y: Any) -> Any:
        return y


class RegistersInForward(Net):
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", None, persistent=False)

    def inside(self, y: Any) -> Any:
        length = y.shape[1]
        if self.bias is None or self.bias.shape[0] < length:
            self.register_buffer("bias", torch.arange(length)[:, None] * 0.1, persistent=False)
        assert self.bias is not None
        return y + self.bias[:length]


class Table(Net):
    def __init__(self) -> None:
        super().__init__()
        self._cosines: Tensor | None = None
        self._length: int | None = None

    def inside(self, y: Any) -> Any:
        length = y.shape[1]
        if length != self._length or self._cosines is None or self._cosines.device != y.device:
            self._length, self._cosines = length, torch.arange(length, device=y.device).float().cos()[:, None]
        return y * self._cosines


class Grown(Net):
    """Two tables that grow, one by a method that ``__init__`` calls too."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", self.make(2), persistent=False)
        self.build(2)

    def make(self, length: int) -> Tensor:
        return torch.arange(length)[:, None] * 0.1

    def build(self, length: int) -> None:
        self.rows, self.longest = self.make(length), length

    def inside(self, y: Any) -> Any:
        length = y.shape[1]
        if self.table.shape[0] < length:
            self.table = self.make(length)
        if length > self.longest:
            self.build(length)
        return y * self.table[:length] + self.rows[:length]


class Late(Net):
    """What is there since the first call alone: a buffer, a cached property, and an attribute under a name that is computed."""

    @functools.cached_property
    def scale(self) -> Tensor:
        return torch.linspace(0, 1, 16)

    def inside(self, y: Any) -> Any:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.arange(16)[:, None] * 0.1, persistent=False)
        name = f"shift_{self.first.out_features}"
        if not hasattr(self, name):
            setattr(self, name, torch.arange(16) * 0.1)
        return y * self.scale + self.get_buffer("table")[: y.shape[1]] + getattr(self, name)


class InAPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = Table(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        made = self.head(y) if y.sum().item() < 1e9 else y
        assert isinstance(made, Tensor)
        return made


class Sparse(Net):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.eye(4)[:2].to_sparse(), persistent=False)


class FilledOnce(Net):
    """As ActNorm and k-means: the first call fills the buffers, and a flag says that it did."""

    means: Tensor
    filled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.randn(16))
        self.register_buffer("filled", torch.tensor(False))

    def inside(self, y: Any) -> Any:
        if not self.filled:
            self.means.data.copy_(y.mean((0, 1)))
            self.filled.data.copy_(torch.tensor(True))
        return y - self.means


class FilledOnceByNumber(FilledOnce):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filled", torch.zeros(1))


def test_flags_of_the_model_that_is_loaded_into_stay(tmp_path: Path) -> None:
    model, fresh = FilledOnce().eval(), FilledOnce().eval()
    model(torch.randn(2, 5, 10))
    fxprune.save(fxprune.compress(model, 0.5, torch.randn(2, 5, 10)), tmp_path / "slim.safetensors")
    means = fresh.means.clone()
    fxprune.load(tmp_path / "slim.safetensors", fresh)
    assert not fresh.filled and torch.equal(fresh.means, means)


@pytest.mark.parametrize("make", [FilledOnce, FilledOnceByNumber])
def test_a_model_without_values_takes_the_flags_of_the_file(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, x = make().eval(), torch.randn(2, 5, 10)
    model(torch.randn(2, 5, 10))
    slim = fxprune.compress(model, 0.5, x)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    with torch.device("meta"):
        blank = make().eval()
    assert gap(slim(x), fxprune.load(tmp_path / "slim.safetensors", blank)(x)) < 1e-6


@pytest.mark.parametrize("make", [RegistersInForward, Table, Grown, Late, InAPart, Sparse, FilledOnce, FilledOnceByNumber])
def test_what_ran_loads_into_what_never_ran(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, x = make().eval(), torch.randn(2, 5, 10)
    names = {name for name, _ in model.named_buffers()}
    for length in (3, 7, 5):
        model(torch.randn(2, length, 10))
    slim = fxprune.compress(model, 0.5, x)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    loaded = fxprune.load(tmp_path / "slim.safetensors", make().eval())
    for length in (5, 9, 2):
        other = torch.randn(3, length, 10)
        assert gap(slim(other), loaded(other)) < 1e-6
    assert {name for name, _ in fxprune.load(tmp_path / "slim.safetensors", make()).named_buffers()} == names
    if make is Sparse:
        table = loaded.get_buffer("table")
        assert table.is_sparse and torch.equal(table.to_dense(), torch.eye(4)[:2])


class Lengths(nn.Module):
    """It reads the longest length, which has to be that of the sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = Table(), nn.Linear(4, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        longest = int(torch.max(lengths).item())
        mask = torch.arange(longest)[None] < lengths[:, None]
        made = self.head(self.part(x * mask[..., None]))
        assert isinstance(made, Tensor)
        return made


def test_lengths_are_recorded(tmp_path: Path) -> None:
    model, inputs = Lengths().eval(), (torch.randn(2, 5, 10), torch.tensor([5, 3]))
    slim = fxprune.compress(model, 0.5, inputs)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    loaded = fxprune.load(tmp_path / "slim.safetensors", Lengths().eval())
    assert gap(slim(*inputs), loaded(*inputs)) < 1e-6


def test_short_lists_of_integers_are_described() -> None:
    example = {"x": torch.zeros(2, 3), "lengths": torch.tensor([5, 3]), "step": torch.tensor(7), "words": torch.tensor([[1, 2]])}
    spec = describe(example)
    assert spec["dict"]["lengths"] == {"tensor": [2], "dtype": "int64", "values": [5, 3]}
    assert "values" not in spec["dict"]["words"] and "values" not in spec["dict"]["x"]
    made = build(spec)
    assert made["lengths"].tolist() == [5, 3] and made["step"].item() == 7 and made["step"].shape == ()
    with pytest.raises(InputError, match="are no values of a tensor of shape"):
        build({"tensor": [2], "dtype": "int64", "values": [1, "a"]})


@pytest.mark.parametrize("ran", [False, True])
def test_classes_that_stay_load_as_well(ran: bool, tmp_path: Path) -> None:
    model, x = Grown().eval(), torch.randn(2, 5, 10)
    if ran:
        model(torch.randn(2, 7, 10))
    slim = fxprune.compress(model, 0.5, x, keep_class=True)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    loaded = fxprune.load(tmp_path / "slim.safetensors", Grown().eval())
    for length in (5, 9, 2):
        other = torch.randn(3, length, 10)
        assert gap(slim(other), loaded(other)) < 1e-6


class Remembering(Net):
    """A method of the user's set a factor; forward mentions its name."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def update(self, factor: float) -> None:
        self.factor = factor

    def inside(self, y: Any) -> Any:
        known: dict[str, Any] = {}
        known.update(y=y)
        return known["y"] * self.factor


def test_what_was_no_cache_is_none_when_the_file_is_loaded(tmp_path: Path) -> None:
    model, fresh, x = Remembering().eval(), Remembering().eval(), torch.randn(2, 5, 10)
    model.update(3.0)
    fresh.update(3.0)
    slim = fxprune.compress(model, 0.5, x)
    assert any("depends on its earlier calls" in note for note in fxprune.record(slim).notes)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    assert gap(slim(x), fxprune.load(tmp_path / "slim.safetensors", fresh)(x)) < 1e-6
