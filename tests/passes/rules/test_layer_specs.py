"""What is known of layer types, and layers of the user's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.passes.rules import layer_specs, registry
from tests.passes.helpers import assert_sound, prime


class Pointwise(nn.Module):
    """A linear layer over the last axis with names of its own."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.width_in, self.width_out = width_in, width_out
        self.kernel = nn.Parameter(torch.randn(width_in, width_out) * 0.3)
        self.shift = nn.Parameter(torch.randn(width_out) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        out = x.reshape(-1, self.width_in) @ self.kernel + self.shift
        return out.view(*x.shape[:-1], self.width_out)


class Gain(nn.Module):
    """A scale for each channel of axis 1, which asserts the width that it keeps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.gain = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return x * self.gain.view(1, self.channels, 1, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.gain = Gain(12)
        self.a = Pointwise(12, 20)
        self.b = Pointwise(20, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.gain(self.stem(x))).flatten(2).transpose(1, 2)
        return self.head(F.relu(self.b(F.relu(self.a(x)))).mean(1))


@pytest.fixture(autouse=True)
def tables_restored() -> Iterator[None]:
    tables: tuple[dict[Any, Any], ...] = (layer_specs.SPECS, registry.MODULES)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture
def registered() -> None:
    fxprune.register_layer(
        Pointwise,
        fxprune.LayerSpec(
            outputs={"kernel": 1, "shift": 0},
            inputs={"kernel": 0},
            sizes={"width_in": ("kernel", 0), "width_out": ("kernel", 1)},
            axis=-1,
        ),
    )
    fxprune.register_layer(Gain, outputs={"gain": 0}, produces=False, sizes={"channels": ("gain", 0)}, axis=1)


def test_a_layer_class_of_ones_own_is_named_sliced_resized_and_run(registered: None, tmp_path: Path) -> None:
    model, x = Net(), torch.randn(2, 3, 8, 8)
    prime(model, (x,))
    graph = assert_sound(model, (x,), exact=True, seed=3)
    assert {"stem", "a", "b"} <= {g.name for g in graph.groups if g.prunable}
    slim: Any = fxprune.compress(model, 0.5, x)
    assert isinstance(slim.a, Pointwise) and (slim.a.width_in, slim.a.width_out) == (6, 10)
    assert (slim.b.width_in, slim.b.width_out, slim.gain.channels) == (10, 8, 6)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    again: Any = fxprune.load(tmp_path / "slim.safetensors", copy.deepcopy(model))
    assert torch.equal(again.eval()(x), slim.eval()(x)) and again.a.width_out == 10
    assert fxprune.compress(model, {"a": 0.5}, x, ignore=["b"])(x).shape == (2, 5)


def test_ignore_of_a_registered_layer_keeps_its_outputs(registered: None) -> None:
    slim: Any = fxprune.compress(Net(), 0.5, torch.randn(2, 3, 8, 8), ignore=["a"])
    assert (slim.a.width_in, slim.a.width_out) == (6, 20)


def test_a_rule_and_facts_go_together() -> None:
    @fxprune.register_op(Pointwise)
    def rule(ctx: Any, node: Any, module: nn.Module, x: Any) -> Any:
        kernel, shift = ctx.weight(node, "kernel"), ctx.weight(node, "shift")
        ctx.unite(x.axes[x.ndim - 1], kernel.axes[0])
        ctx.unite(kernel.axes[1], shift.axes[0])
        return ctx.make(node, {x.ndim - 1: kernel.axes[1]})

    fxprune.register_layer(Pointwise, outputs={"kernel": 1}, sizes={"width_in": ("kernel", 0), "width_out": ("kernel", 1)})
    model, x = nn.Sequential(nn.Linear(6, 12), Pointwise(12, 20), nn.ReLU(), nn.Linear(20, 3)), torch.randn(4, 6)
    prime(model, (x,))
    graph = assert_sound(model, (x,), exact=True, seed=1)
    assert [g.name for g in graph.groups if g.prunable] == ["0", "1"]


@pytest.mark.parametrize(
    ("cls", "facts", "words"),
    [
        (dict, {"axis": 1}, "takes a subclass of torch.nn.Module"),
        (Pointwise, {"width": 1}, "LayerSpec has no field 'width'"),
        (Pointwise, {"outputs": {"kernel": 1}}, "say axis= .* or add a rule first"),
        (Pointwise, {"spec": fxprune.LayerSpec(axis=1), "axis": 1}, "a LayerSpec or its fields, not both"),
    ],
)
def test_what_is_wrong_with_a_registration_is_said(cls: Any, facts: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fxprune.register_layer(cls, **facts)


def test_every_layer_with_sizes_is_in_the_table() -> None:
    """Torch's own layers that have a rule and integer sizes: a new one has to be said."""
    made = [
        nn.Linear(2, 3),
        nn.Bilinear(2, 3, 4),
        nn.Embedding(5, 3),
        nn.EmbeddingBag(5, 3),
        nn.Conv1d(2, 3, 1),
        nn.ConvTranspose2d(2, 3, 1),
    ]
    made += [nn.LSTM(2, 3), nn.GRU(2, 3), nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm1d(3), nn.PReLU(3)]
    assert all(layer_specs.is_layer(m) and layer_specs.has_sizes(m) for m in made)
    assert layer_specs.has_sizes(nn.Unflatten(1, (2, 3))) and not layer_specs.is_layer(nn.Unflatten(1, (2, 3)))
    assert layer_specs.spec_of(nn.ReLU()) is None
    assert layer_specs.outputs_of(nn.ConvTranspose2d(4, 6, 1), "weight", 4) == (1,)
    assert layer_specs.outputs_of(nn.ConvTranspose2d(4, 6, 1, groups=2), "weight", 4) == (0, 1)
    assert layer_specs.produced_dim(nn.Embedding(5, 3), "weight", 2) == 1 and layer_specs.produced_dim(nn.Linear(5, 3), "bias", 1) == -1
    assert layer_specs.produced_dim(nn.LayerNorm((3, 4)), "weight", 2) is None
