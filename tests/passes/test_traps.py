"""What looks harmless and is not: buffers written into, loops over the input, files of networks that ask for their device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Moves(nn.Module):
    """An index that moves on with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 8), nn.Linear(2, 3)
        self.register_buffer("picked", torch.tensor([0, 3]))
        self.picked: Tensor

    def forward(self, x: Tensor) -> Any:
        self.picked.add_(1)
        return self.head(self.a(x)[:, self.picked])


def test_analysis_does_not_run_what_the_network_writes() -> None:
    model = Moves().eval()
    graph = fxprune.analyze(model, torch.randn(2, 6))
    assert model.picked.tolist() == [0, 3]
    assert "indexed by values the graph computes" in graph.by_name["a"].reason


class OwnPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self.head(torch.relu(self.a(x.float())))


def test_a_file_is_loaded_where_forward_asks_for_the_device(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    slim = fxprune.compress(OwnPrecision(), 0.5, x)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "slim.safetensors", OwnPrecision())(x), slim(x))


class Steps(nn.Module):
    """Heads are a literal, steps and sequences are the input's."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        parts = self.a(x).reshape(b, n, 3, 4).permute(2, 0, 1, 3)
        first, second, third = parts
        y = torch.relu(first + second * third)
        if self.how == "unbind":
            y = torch.stack([self.b(step) for step in y.unbind(1)], 1)
        elif self.how == "split":
            y = torch.cat([self.b(step) for step in y.split(1, dim=1)], 1)
        elif self.how == "iterate":
            y = torch.stack([self.b(sequence) for sequence in y])
        return self.head(y)


@pytest.mark.parametrize(("how", "count"), [("unbind", 5), ("split", 5), ("iterate", 2)])
def test_loops_over_the_input_are_reported(how: str, count: int) -> None:
    notes = fxprune.analyze(Steps(how), torch.randn(2, 5, 6)).notes
    assert len(notes) == 1
    assert f"loop over a dimension of {count} was specialised" in notes[0] and "test_traps.py" in notes[0]


def test_loops_over_literals_are_no_loss() -> None:
    assert fxprune.analyze(Steps("not"), torch.randn(2, 5, 6)).notes == ()


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor, mask: Tensor | None, gain: Tensor) -> Any:
        y = torch.relu(self.a(x)) * gain
        return self.b(y if mask is None else y * mask)


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Optional()

    def forward(self, x: Tensor) -> Any:
        return self.part(x if x.sum() > 0 else -x, None, torch.ones(()))


def test_parts_take_the_none_that_the_model_passes() -> None:
    x = torch.rand(2, 6)
    slim = fxprune.compress(Undecided().eval(), 0.5, x, verify=True)
    rec = fxprune.record(slim)
    assert type(slim).__name__ == "Undecided"
    assert rec.after.params < 0.6 * rec.before.params
    assert "torch.export.export(model, (example,)).module()" in rec.notes[0]


def test_none_was_traced_and_is_asked_for_again() -> None:
    x, gain = torch.rand(2, 6), torch.ones(())
    slim = fxprune.compress(Optional().eval(), 0.5, (x, None, gain))
    assert slim(x, None, gain).shape == (2, 6)
    with pytest.raises(AssertionError, match="mask was None when the module was traced"):
        slim(x, torch.ones(16), gain)
