"""Rows that values pick: mixtures of experts that loop, masks over tokens; what asks how many there are is kept whole, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import assert_sound
from tests.passes.helpers import gap, zeroed

EXPERTS, CHOSEN = 4, 2
Dispatch = Callable[[Tensor, Tensor, Tensor, nn.ModuleList], Tensor]


def by_where(x: Tensor, chosen: Tensor, weight: Tensor, experts: nn.ModuleList) -> Tensor:
    """Each expert's places and tokens, from a table of who chose it (as Mixtral had it)."""
    out = torch.zeros(x.shape, dtype=x.dtype)
    table = nn.functional.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for i, expert in enumerate(experts):
        place, token = torch.where(table[i])
        found = expert(x[None, token].reshape(-1, x.shape[1])) * weight[token, place, None]
        out.index_add_(0, token, found.to(x.dtype))
    return out


def by_nonzero(x: Tensor, chosen: Tensor, weight: Tensor, experts: nn.ModuleList) -> Tensor:
    out = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        token = (chosen == i).any(-1).nonzero().flatten()
        out[token] += expert(x[token]) * (weight * (chosen == i)).sum(-1, keepdim=True)[token]
    return out


def by_mask(x: Tensor, chosen: Tensor, weight: Tensor, experts: nn.ModuleList) -> Tensor:
    """Every token once for each of its experts (as DeepSeek trains)."""
    flat, again = chosen.view(-1), x.repeat_interleave(CHOSEN, dim=0)
    out = torch.empty_like(again)
    for i, expert in enumerate(experts):
        out[flat == i] = expert(again[flat == i])
    return (out.view(*weight.shape, -1) * weight.unsqueeze(-1)).sum(1)


def by_table(x: Tensor, chosen: Tensor, weight: Tensor, experts: nn.ModuleList) -> Tensor:
    """A mask of two axes, over copies of the tokens, one for each place."""
    again = x.unsqueeze(1).expand(-1, CHOSEN, -1)
    out = torch.zeros_like(again)
    for i, expert in enumerate(experts):
        out[chosen == i] = expert(again[chosen == i])
    return (out * weight.unsqueeze(-1)).sum(1)


def asks_how_many(x: Tensor, chosen: Tensor, weight: Tensor, experts: nn.ModuleList) -> Tensor:
    out = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        token = (chosen == i).any(-1).nonzero().flatten()
        if token.shape[0] > 0:
            out[token] += expert(x[token])
    return out


def loops_over_them(x: Tensor, chosen: Tensor, weight: Tensor, experts: nn.ModuleList) -> Tensor:
    out = torch.zeros_like(x)
    for token in (chosen == 0).any(-1).nonzero():
        out[token] += experts[0](x[token])
    return out


class Mixture(nn.Module):
    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__()
        self.dispatch = dispatch
        self.router = nn.Linear(12, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 12)) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        flat = x.view(-1, width)
        weight, chosen = self.router(flat).softmax(-1).topk(CHOSEN, -1)
        return self.dispatch(flat, chosen, weight, self.experts).view(batch, tokens, width)


class Network(nn.Module):
    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__()
        self.lift, self.mixture, self.head = nn.Linear(6, 12), Mixture(dispatch), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.lift(x)
        return self.head(y + self.mixture(y))


@pytest.mark.parametrize("dispatch", [by_where, by_nonzero, by_mask, by_table])
def test_looped_experts_lose_stream_and_inner_width(dispatch: Dispatch) -> None:
    torch.manual_seed(0)
    model, x = Network(dispatch).eval(), torch.randn(2, 5, 6)
    removed = ("lift.weight", *(f"mixture.experts.{i}.{j}.weight" for i in range(EXPERTS) for j in (0, 2)))
    assert_sound(model, x, removes=removed)
    fxprune.compress(model, 0.5, x, verify=True, experts=True)  # whole experts too
    slim = fxprune.compress(model, 0.5, x)
    assert not fxprune.record(slim).notes
    with torch.no_grad():  # other tokens choose other experts, and here some of them none
        for other in (torch.randn(3, 7, 6), torch.randn(1, 1, 6), 5 * torch.ones(2, 5, 6)):
            assert gap(zeroed(model, fxprune.record(slim).kept)(other), slim(other)) < 1e-5


@pytest.mark.parametrize("dispatch", [by_where, by_nonzero, by_mask, by_table])
@pytest.mark.parametrize("repair", ["bias", "lstsq"])
def test_layers_whose_rows_values_pick_are_not_repaired_and_that_is_said(dispatch: Dispatch, repair: str) -> None:
    torch.manual_seed(0)
    model, batches = Network(dispatch).eval(), [torch.randn(2, 5, 6) for _ in range(6)]
    for wanted in (0.5, "params=0.6"):
        slim = fxprune.compress(model, wanted, batches[0], calibration=batches, repair=repair)
        found = fxprune.record(slim)
        assert bool(found.repaired) >= (wanted == 0.5) and not any("experts" in name for name in found.repaired)
        assert any("mixture.experts." in note and "rows chosen by data" in note for note in found.notes)


INNER: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(16, 16),
    "gru": lambda: nn.GRU(16, 16),
    "attention": lambda: nn.MultiheadAttention(16, 4),
    "batch norm": lambda: nn.BatchNorm1d(16),
}


class Reading(nn.Module):
    """An expert whose layers each look at more than one token, or at what they are fed in the mean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(12, 16), nn.Linear(16, 12)
        self.inner = INNER[kind]()

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.a(x))
        if self.kind == "attention":
            return self.b(self.inner(y, y, y)[0])
        return self.b(self.inner(y) if self.kind == "batch norm" else self.inner(y)[0])


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("repair", ["bias", "lstsq"])
def test_no_layer_of_such_an_expert_is_repaired(kind: str, repair: str) -> None:
    torch.manual_seed(0)
    model, batches = Network(by_nonzero), [torch.randn(2, 5, 6) for _ in range(6)]
    model.mixture.experts = nn.ModuleList(Reading(kind) for _ in range(EXPERTS))
    slim = fxprune.compress(model.eval(), 0.5, batches[0], calibration=batches, repair=repair)
    found = fxprune.record(slim)
    assert found.repaired and not any("experts" in name for name in found.repaired)
    for name, tensor in slim.state_dict().items():
        if "experts" in name and tensor.is_floating_point():  # every number is one that was there
            assert torch.isin(tensor, model.state_dict()[name.removeprefix("module.")]).all(), name


@pytest.mark.parametrize(
    ("dispatch", "why"),
    [
        (asks_how_many, r"test_counted.py:\d+: a condition .* how many elements of a tensor are true"),
        (loops_over_them, r"test_counted.py:\d+: a loop goes over what is true in a tensor"),
    ],
)
def test_code_that_asks_how_many_there_are_is_kept_whole(dispatch: Dispatch, why: str) -> None:
    model, x = Network(dispatch).eval(), torch.randn(2, 5, 6)
    graph = fxprune.analyze(model, x)
    reason = graph.by_name["mixture.router"].reason
    assert re.search(why, reason), reason


class Picked(nn.Module):
    """``how`` many rows there are stays in the graph, as other sizes do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.tensor([[True, False, True], [False, False, True]]))
        self.table: Tensor

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.a(x))
        keep = x.sum(-1) > 0
        if self.how == "mean":
            return self.b(y[keep].sum(0) / y[keep].shape[0])
        if self.how == "selected":
            return self.b(y) + torch.masked_select(x, keep.unsqueeze(-1)).sum()
        if self.how == "fresh":
            rows = y[keep]
            return self.b(torch.cat([rows, torch.zeros(rows.size(0), 8)], 0)).mean(0)
        place, row = torch.nonzero(self.table, as_tuple=True)  # of constants: as many as there are
        return self.b(y[:, : len(place)] * (row + 1)[:, None])


@pytest.mark.parametrize("how", ["mean", "selected", "fresh", "constant"])
def test_numbers_of_rows_stay_in_the_graph(how: str) -> None:
    torch.manual_seed(0)
    model, x = Picked(how).eval(), torch.randn(2, 5, 6)
    assert_sound(model, x, removes=("a.weight",))
    slim = fxprune.compress(model, 0.5, x)
    with torch.no_grad():
        for other in (torch.randn(2, 5, 6), torch.randn(3, 9, 6)):
            assert gap(zeroed(model, fxprune.record(slim).kept)(other), slim(other)) < 1e-5


PICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda y: y[:, y.mean(0) > 0].sum(),
    "elements": lambda y: y[y > 0].sum(),
    "positions": lambda y: y.nonzero().sum(),
    "table of channels": lambda y: y.t()[(y[:, 0] > 0).long()].sum(),
}


@pytest.mark.parametrize("how", sorted(PICKS))
def test_channels_that_values_pick_stay(how: str) -> None:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return self.b(y) + PICKS[how](y)

    graph = fxprune.analyze(Channels().eval(), torch.randn(4, 6))
    assert not any(group.prunable for group in graph.groups)


def test_as_many_as_there_are_is_no_number_of_channels() -> None:
    """What is picked from is as long for every input; what is picked is not."""

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            total = y.sum(0)
            some = torch.masked_select(total, total > 0)
            return self.b(y) * (2 if some.shape[0] > 3 else 1)

    with pytest.raises(fxprune.errors.TraceError, match=r"test_counted.py:\d+: a condition .* how many elements of a tensor are true"):
        fxprune.analyze(Some().eval(), torch.randn(4, 6))


class Placed(nn.Module):
    """Pictures' features in place of the tokens that stand for them, as models of vision and language do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.c, self.b = how, nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        words, place = self.a(x), x[:, :, 0] > 0
        pictures = self.c(x[place])
        if self.how == "expanded":
            words = words.masked_scatter(place.unsqueeze(-1).expand_as(words), pictures)
        elif self.how == "in place":
            words.masked_scatter_(place.unsqueeze(-1), pictures)
        else:
            words = words.masked_scatter(words > 0, self.c(x))  # each channel by itself
        return self.b(words)


@pytest.mark.parametrize("how", ["expanded", "in place"])
def test_rows_put_where_a_mask_says(how: str) -> None:
    torch.manual_seed(0)
    assert_sound(Placed(how).eval(), torch.randn(2, 5, 6), removes=("a.weight", "c.weight", "b.weight"))


def test_elements_put_where_a_mask_says_stay() -> None:
    graph = fxprune.analyze(Placed("element by element").eval(), torch.randn(2, 5, 6))
    assert not graph.by_name["a"].prunable and not graph.by_name["c"].prunable
