"""What looks harmless and is not: buffers written into, loops over the input, files of networks that ask for their device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import TraceError, UnsupportedError
from fxprune.passes.rules.moving.indexing import left_of
from tests.passes.helpers import zeroed


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


class Does(nn.Module):
    """``run`` on the channels of one layer, read by another."""

    def __init__(self, run: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.run = nn.Linear(6, 8), nn.Linear(8, 3), run

    def forward(self, x: Tensor) -> Any:
        return self.b(self.run(torch.relu(self.a(x)).clone()))


def bound_anew(x: Any) -> Any:
    x.data = x.sigmoid()
    return x


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (bound_anew, "data is bound anew"),
        (lambda x: x.resize_(2, 8), "resize_ gives"),
        (lambda x: x.as_strided_((2, 8), (8, 1)), "as_strided_"),
    ],
)
def test_tensors_that_become_others_are_refused(run: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(TraceError, match=words):
        fxprune.analyze(Does(run), torch.randn(2, 6))


def reshaped(x: Any) -> Any:
    x.unsqueeze_(1)
    x.squeeze_(1)
    x.t_()
    y = x.transpose_(0, 1).detach()
    y.requires_grad = True
    return x + y


def spread(x: Any) -> Any:
    x[torch.tensor([True, False])] = torch.arange(8.0)
    return x + torch.arange(8.0).index_put((torch.tensor([1]),), torch.ones(()))


def on_last_axes(x: Any) -> Any:
    """``torch.linalg.diagonal`` has other axes than ``torch.diagonal``."""
    return torch.linalg.diagonal(x[:, :, None] * x[:, None])


@pytest.mark.parametrize("run", [reshaped, spread, on_last_axes, lambda x: x + torch.unfold_copy(x, 1, 1, 1).squeeze(2)])
def test_rare_operations_are_sound_or_lock(run: Callable[[Any], Any]) -> None:
    model, x = Does(run), torch.randn(2, 6)
    assert fxprune.compress(model, 0.5, x, verify=True)(x).shape == (2, 3)
    assert torch.equal(fxprune.compress(model, 0.0, x)(x), model(x))


class AsksForGradients(Does):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y if self.a.weight.grad is None else -y


@pytest.mark.parametrize("index", [np.array([3, 4]), np.arange(3), np.int64(3), np.arange(4).reshape(2, 2)])
def test_numpy_picks_channels(index: Any) -> None:
    model, x = Does(lambda x: x + x[:, index].reshape(2, -1).sum(1, keepdim=True) * np.float32(0.5)).eval(), torch.randn(2, 6)
    with torch.no_grad():
        slim = fxprune.compress(model, 0.5, x, verify=True)
        assert fxprune.record(slim).after.params < fxprune.record(slim).before.params
        assert torch.equal(fxprune.compress(model, 0.0, x)(x), model(x))


class Masks(nn.Module):
    """Written where a mask that does not depend on the input says: tokens, or channels."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.a, self.b, self.axis = nn.Linear(6, 8), nn.Linear(8, 3), axis
        self.register_buffer("mask", torch.tensor([True, False] * 4))
        self.mask: Tensor
        self.rows = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).clone()
        if self.axis == 1:
            y[:, self.mask] = self.rows
            y[:, ~self.mask] = 0
        else:
            y[:, :, self.mask] = 0
        return self.b(y)


def test_writes_where_a_mask_says() -> None:
    x = torch.randn(2, 8, 6)
    tokens, channels = Masks(1).eval(), Masks(2).eval()
    with torch.no_grad():
        slim = fxprune.compress(tokens, 0.5, x, verify=True)
        assert slim.get_parameter("rows").shape == (4, 4)
        for model in (tokens, channels):
            assert torch.equal(fxprune.compress(model, 0.0, x)(x), model(x))
        pruned = fxprune.compress(channels, 0.5, x, verify=True)
        assert pruned.get_parameter("a.weight").shape == (4, 6) and pruned.get_buffer("mask").shape == (4,)
        assert torch.equal(zeroed(channels, fxprune.record(pruned).kept)(x), pruned(x))


class Stacks(nn.Module):
    def __init__(self, run: Callable[[Any, Any], Any], width: int) -> None:
        super().__init__()
        self.a, self.b, self.head, self.run = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(width, 3), run

    def forward(self, x: Tensor) -> Any:
        return self.head(self.run(self.a(x), self.b(x)))


@pytest.mark.parametrize(
    ("run", "width"),
    [
        (lambda a, b: torch.hstack([a, b]), 16),
        (lambda a, b: torch.hstack([a[0], b[1]]), 16),
        (lambda a, b: torch.hstack([a[:, None], b[:, None]]), 8),
        (lambda a, b: torch.column_stack([a, b]), 16),
        (lambda a, b: torch.column_stack([a[0], b[1]]).mT, 8),
        (lambda a, b: torch.vstack([a, b]), 8),
        (lambda a, b: torch.vstack([a[0], b[1]]), 8),
        (lambda a, b: torch.dstack([a, b]).mT, 8),
        (lambda a, b: torch.dstack([a[:, None], b[:, None]]), 16),
    ],
)
def test_stacks_by_name(run: Callable[[Any, Any], Any], width: int) -> None:
    model, x = Stacks(run, width).eval(), torch.randn(2, 6)
    with torch.no_grad():
        slim = fxprune.compress(model, 0.5, x, verify=True)
        assert {name for name, _ in slim.named_parameters() if name in fxprune.record(slim).kept} >= {"a.weight", "b.weight", "head.weight"}
        assert torch.equal(fxprune.compress(model, 0.0, x)(x), model(x))


def test_stacks_of_different_dimensions_lock() -> None:
    groups = fxprune.analyze(Stacks(lambda a, b: torch.vstack([a, b[0]]), 8).eval(), torch.randn(2, 6)).by_name
    assert "tensors of different dimensions are stacked" in groups["a"].reason and not groups["b"].prunable


def test_a_gradient_that_is_not_there() -> None:
    model, x = AsksForGradients(torch.tanh).eval(), torch.randn(2, 6)
    assert torch.equal(fxprune.compress(model, 0.0, x)(x), model(x))


def test_an_index_of_which_no_whole_slices_go() -> None:
    node = fx.Graph().placeholder("x")
    assert left_of(node, np.array([[0, 1], [2, 3]]), np.array([0, 2])).tolist() == [[0], [1]]
    with pytest.raises(UnsupportedError, match="x: an index picks channels of which not whole slices go; pass their layer to ignore="):
        left_of(node, np.array([[0, 1], [2, 3]]), np.array([0, 1, 2]))


class ReadsItsState(Does):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self.state_dict()["a.weight"].sum()


def test_weights_that_no_name_leads_to_are_refused() -> None:
    with pytest.raises(TraceError, match="reached past their names"):
        fxprune.analyze(ReadsItsState(torch.tanh), torch.randn(2, 6))


def test_a_literal_is_not_zeroed_with_the_channels() -> None:
    far = fxprune.analyze(Does(lambda x: x * torch.cdist(x, torch.arange(8.0)[None])), torch.randn(2, 6))
    assert any("a distance over channels" in note for note in far.by_name["a"].notes)
    smallest = fxprune.analyze(Does(lambda x: x * torch.linalg.vector_norm(x, -float("inf"), dim=1, keepdim=True)), torch.randn(2, 6))
    assert any("a reduction over channels" in note for note in smallest.by_name["a"].notes)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("pairs", torch.eye(4).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x).relu())


def test_a_sparse_buffer_is_copied_as_it_is() -> None:
    slim = fxprune.compress(Sparse().eval(), 0.5, torch.randn(2, 8), verify=True)
    kept = dict(slim.named_buffers())["pairs"]
    assert kept.is_sparse and torch.equal(kept.to_dense(), torch.eye(4))


class Named(OrderedDict[str, Any]):
    """An output with attributes, of which some may be None and then are no entries, as those of transformers."""

    hidden: Any = None

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class Reads(Sparse):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x).relu()
        out = Named(states=y)
        return self.b(input=out.states if out.hidden is None else out.hidden)


def test_a_layer_called_by_keyword_and_an_entry_that_is_none() -> None:
    model = Reads().eval()
    slim = fxprune.compress(model, 0.5, torch.randn(2, 8), verify=True)
    assert fxprune.record(slim).kept["a.weight"][0].numel() == 8


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm": lambda a, b: torch.bmm(input=a, mat2=b),
    "bmm, in another order": lambda a, b: torch.bmm(mat2=b, input=a),
    "matmul": lambda a, b: torch.matmul(input=a, other=b),
    "method": lambda a, b: a.bmm(mat2=b),
    "baddbmm": lambda a, b: torch.baddbmm(batch2=b, batch1=a, input=torch.ones(1, 1, 1), beta=0.5),
    "baddbmm, method": lambda a, b: a.new_ones(1, 1, 1).baddbmm(batch1=a, batch2=b, alpha=0.5),
    "addmm": lambda a, b: torch.addmm(torch.ones(1), mat1=a[0], mat2=b[0]),
}


class Multiplies(nn.Module):
    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product, self.a, self.b, self.head = product, nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.product(self.a(x), self.b(x).transpose(1, 2)))


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_operands_of_products_are_known_by_name(name: str) -> None:
    slim = fxprune.compress(Multiplies(PRODUCTS[name]).eval(), 0.5, torch.randn(2, 5, 8), verify=True)
    kept = fxprune.record(slim).kept
    assert kept["a.weight"][0].tolist() == kept["b.weight"][0].tolist() and len(kept["a.weight"][0]) == 8
