"""What analysis holds on to, and what it shares with the model while it runs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import fxprune
from fxprune.passes.ir.nested import tensors
from fxprune.passes.labels.values import values
from fxprune.passes.rules.moving.indexing import _picked
from fxprune.passes.tracing.watching import watched


class Bias(nn.Module):
    """Attention with a table of relative positions, as in Swin."""

    index: torch.Tensor

    def __init__(self, tokens: int, heads: int) -> None:
        super().__init__()
        self.stem, self.qkv, self.out = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.table, self.heads = nn.Parameter(torch.randn(2 * tokens - 1, heads)), heads
        self.register_buffer("index", (torch.arange(tokens)[:, None] - torch.arange(tokens) + tokens - 1).flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.stem(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].view(n, n, -1).permute(2, 0, 1)
        a = (q @ k.transpose(-2, -1) + bias).softmax(-1)
        return self.out((a @ v).transpose(1, 2).reshape(b, n, -1))  # type: ignore[no-any-return]


def test_labels_hang_on_to_nothing_larger_than_themselves() -> None:
    walk = fxprune.analyze(Bias(12, 4).eval(), torch.randn(2, 12, 3))._walk
    vectors = [v for env in walk.env.values() for value in values(list(env.values())) for v in value.axes.values()]
    assert vectors
    for vector in vectors:
        assert vector.base is None or vector.base.nbytes == vector.nbytes
    assert not walk._real


def test_picked_rows_are_those_that_indexing_gives() -> None:
    torch.manual_seed(0)
    labels = torch.arange(35).view(5, 7, 1)
    for index in (torch.randint(-5, 5, (2, 3)), torch.tensor(3), torch.tensor([True, False, True, True, False]), slice(1, 3), 2):
        for shape in ((5, 7, 4), (5, 7, 1)):
            for x in (labels.expand(shape), labels[:, :1].expand(shape), labels[:1].expand(shape), labels.flip(1)):
                assert torch.equal(_picked(x, index), x[index])
    table = torch.arange(3).view(1, 3).expand(1000, 3)
    assert _picked(table, torch.zeros(4000, dtype=torch.long)).untyped_storage().nbytes() == 24


class Values(nn.Module):
    """A root that follows values, so that only its parts are traced; one of them may write into its own weights as it runs."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.b, self.write = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.write(self.b[0].weight)
        x = self.a(x)
        if x.abs().sum() > 0:
            x = x * 2
        return self.b(x)  # type: ignore[no-any-return]


def _quietly(weight: torch.Tensor) -> None:
    try:
        weight.data.clamp_(-0.01, 0.01)
    except RuntimeError as error:
        raise ValueError("wrapped") from error


def _swallowed(weight: torch.Tensor) -> None:
    try:
        torch.mul(weight.detach(), 0.0, out=weight.data)
    except RuntimeError:
        return


def _replaced(weight: nn.Parameter) -> None:
    weight.data = weight.data * 0.0


def test_weights_that_code_writes_into_stay_the_users() -> None:
    for write, parts in ((lambda w: None, ["a", "b"]), (_quietly, ["a"]), (_swallowed, ["a"]), (_replaced, ["a"])):
        torch.manual_seed(0)
        model, x = Values(write).eval(), torch.randn(1, 3, 8, 8)
        before = copy.deepcopy(model.state_dict())
        graph = fxprune.analyze(model, x)
        assert list(graph.traced.parts) == parts
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_weights_are_not_copied_and_activations_not_held() -> None:
    copied: list[int] = []

    class Weight(nn.Parameter):
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
            copied.append(id(self))
            return nn.Parameter(self.detach().clone())

    model: Any = Values(lambda w: None).eval()
    x = torch.randn(1, 3, 8, 8)
    seen: list[int] = []
    model.a[0].register_forward_pre_hook(lambda m, _: seen.append(m.weight.data_ptr()))
    calls = watched(model, x).calls
    assert seen == 2 * [model.a[0].weight.data_ptr()]  # in evaluation and in training
    assert {t.device.type for t in tensors([call.args for call in calls.values()])} == {"meta"} and calls["a"].device == torch.device("cpu")
    model.b[0].weight = Weight(model.b[0].weight.detach())  # of whose ways nothing is known
    watched(model, x)
    assert copied == [id(model.b[0].weight)]
