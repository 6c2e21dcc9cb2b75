"""Experts that are modules of a list go whole: their code, their tensors, and what they add."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import UnsupportedError

EXPERTS, CHOSEN, STREAM, INNER = 6, 2, 8, 12
analyze, compress = partial(fxprune.analyze, experts=True), partial(fxprune.compress, experts=True)
NORMS = ("plain", "exact")


class Expert(nn.Module):
    """In place and with statistics of its own, as experts may be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act, self.last = (
            nn.Linear(STREAM, INNER),
            nn.BatchNorm1d(INNER),
            nn.ReLU(inplace=True),
            nn.Linear(INNER, STREAM),
        )

    def forward(self, x: Tensor) -> Any:
        return self.last(self.act(self.norm(self.first(x))))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.router, self.head = nn.Linear(7, STREAM), nn.Linear(STREAM, EXPERTS), nn.Linear(STREAM, 5)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Any:
        x = self.lift(x)
        return self.head(x + self.mixed(x))

    def mixed(self, x: Tensor) -> Any:
        raise NotImplementedError

    def shares(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1)  # type: ignore[no-any-return]

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.router(x).topk(CHOSEN, dim=-1)
        return weights.softmax(-1), index


class Stacked(Listed):
    def mixed(self, x: Tensor) -> Any:
        return (torch.stack([expert(x) for expert in self.experts], dim=1) * self.shares(x).unsqueeze(-1)).sum(1)


class Contracted(Listed):
    def mixed(self, x: Tensor) -> Any:
        return torch.einsum("tdn,tn->td", torch.stack([expert(x) for expert in self.experts], dim=-1), self.shares(x))


class Summed(Listed):
    def mixed(self, x: Tensor) -> Any:
        shares = self.shares(x)
        return sum(expert(x) * shares[..., n, None] for n, expert in enumerate(self.experts))


class InPlace(Listed):
    def mixed(self, x: Tensor) -> Any:
        shares, y = self.shares(x), torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            y += shares[:, n : n + 1] * expert(x)
        return y


class Scattered(Listed):
    def mixed(self, x: Tensor) -> Any:
        logits = self.router(x)
        weights, index = logits.topk(CHOSEN, -1)
        shares = torch.zeros_like(logits).scatter(-1, index, weights.softmax(-1))
        y = torch.zeros_like(x)
        for n in range(EXPERTS):
            y = y + shares[:, n].unsqueeze(-1) * self.experts[n](x)
        return y


class Hot(Listed):
    def mixed(self, x: Tensor) -> Any:
        weights, index = self.best(x)
        shares = (F.one_hot(index, EXPERTS) * weights.unsqueeze(-1)).sum(1)
        return (torch.stack([expert(x) for expert in self.experts]) * shares.T.unsqueeze(-1)).sum(0)


class Compared(Listed):
    def mixed(self, x: Tensor) -> Any:
        weights, index = self.best(x)
        y = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            y = y + expert(x) * (weights * (index == n)).sum(-1, keepdim=True)
        return y


class Rows(Listed):
    """As in mistral-inference: each expert gets the tokens that chose it."""

    def mixed(self, x: Tensor) -> Any:
        weights, index = self.best(x)
        y = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            token, place = torch.where(index == n)
            y[token] += weights[token, place, None] * expert(x[token])
        return y


class Masks(Listed):
    """As transformers' Mixtral was."""

    def mixed(self, x: Tensor) -> Any:
        weights, index = self.best(x)
        mask, y = F.one_hot(index, num_classes=EXPERTS).permute(2, 1, 0), torch.zeros_like(x)
        for n in range(EXPERTS):
            place, token = torch.where(mask[n])
            y.index_add_(0, token, self.experts[n](x[token]) * weights[token, place, None])
        return y


class Chosen(Listed):
    def mixed(self, x: Tensor) -> Any:
        weights, index = self.best(x)
        y = torch.zeros_like(x)
        for n in range(EXPERTS):
            hit = index == n
            rows = hit.any(-1)
            y[rows] += self.experts[n](x[rows]) * (weights * hit).sum(-1)[rows].unsqueeze(-1)
        return y


class Written(Listed):
    """The best alone; what nobody writes stays what it was, and something is counted beside."""

    def mixed(self, x: Tensor) -> Any:
        share, index = self.shares(x).max(-1)
        y, count = x.clone(), torch.zeros(())
        for n in range(EXPERTS):
            rows = (index == n).nonzero()[:, 0]
            y[rows] = self.experts[n](x[rows]) * share[rows].unsqueeze(-1)
            count = count + (index == n).sum() * (0.1 * n)
        return y + count


class Rectified(Listed):
    """Sums are rectified in place, and what they were made of is read again."""

    def mixed(self, x: Tensor) -> Any:
        shares, y = self.shares(x), x - 1
        for n, expert in enumerate(self.experts):
            z = y + shares[:, n : n + 1] * expert(x)
            z.mul_(0.5)
            y = 0.3 * y + z
        return y


class Doubled(Listed):
    """What a sum is made of is changed in place behind it."""

    def mixed(self, x: Tensor) -> Any:
        weights, index = self.best(x)
        y = x - 1
        for n, expert in enumerate(self.experts):
            token, place = torch.where(index == n)
            z = y.index_add(0, token, expert(x[token]) * weights[token, place].unsqueeze(-1))
            y *= 0.5
            y = y + z
        return y


KINDS = [Stacked, Contracted, Summed, InPlace, Scattered, Hot, Compared, Rows, Masks, Chosen, Written, Rectified, Doubled]
CHOOSING = (Scattered, Hot, Compared, Rows, Masks, Chosen, Doubled)


def made(kind: type[Listed]) -> tuple[Any, Tensor]:
    torch.manual_seed(1)
    return kind().eval(), torch.randn(31, 7)


def experts_of(graph: Any) -> list[Any]:
    return [g for g in graph.groups if any(name == "router.weight" and dim == 0 for name, dim, _ in g.members)]


def masked(model: Any, kept: Tensor) -> nn.Module:
    twin: Any = copy.deepcopy(model)
    twin.router.register_forward_hook(
        lambda module, given, logits: torch.full_like(logits, float("-inf")).index_copy(-1, kept, logits[..., kept])
    )
    return twin  # type: ignore[no-any-return]


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_what_goes_has_a_logit_of_minus_infinity(kind: type[Listed], seed: int) -> None:
    model, x = made(kind)
    graph = analyze(model, x)
    (group,) = experts_of(graph)
    assert (group.name, group.size, group.prunable, group.experts) == ("router", EXPERTS, True, True), group.reason
    assert group.least == (CHOSEN if kind in CHOOSING else 1) and group.proved == frozenset(NORMS)
    slim: Any = fxprune.compress(graph, {"router": 0.5}, x, importance="random" if seed else "l2", verify=True)
    done = fxprune.record(slim)
    stays = done.kept["router.weight"][0]
    left = {name for name, _ in slim.named_parameters() if name.startswith("experts.")}
    assert {int(name.split(".")[1]) for name in left} == set(stays.tolist()) and len(stays) == 3
    assert all(len(dims[0]) == 0 for name, dims in done.kept.items() if name.startswith("experts."))
    assert done.after.params == sum(p.numel() for p in slim.parameters())
    y = torch.randn(47, 7)
    with torch.no_grad():
        assert far(masked(model, stays)(y), slim(y)) < 1e-5 < far(model(y), slim(y))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_widths_go_together_and_train(kind: type[Listed], tmp_path: Path) -> None:
    model, x = made(kind)
    graph = analyze(model, x)
    assert {f"experts.{n}.first" for n in range(EXPERTS)} <= {g.name for g in graph.groups if g.prunable}
    for norms in NORMS:
        slim: Any = fxprune.compress(graph, 0.5, x, verify=True, norms=norms, round_to=4)
        assert slim.router.out_features == 3 and slim.head.in_features == 4
    fxprune.save(slim, tmp_path / "slim.safetensors")
    y = torch.randn(47, 7)
    again: Any = fxprune.load(tmp_path / "slim.safetensors", kind()).eval()
    assert torch.equal(again(y), slim(y)) and torch.equal(fxprune.apply(slim, model).eval()(y), slim(y))
    assert torch.equal(slim.detached()(y), slim(y)) and torch.equal(fxprune.compress(model, fxprune.record(slim).policy, x)(y), slim(y))
    assert set(slim.state_dict()) < set(model.state_dict())
    slim.train()
    slim(y).square().sum().backward()
    assert all(p.grad is not None for p in slim.parameters())


@pytest.mark.parametrize("kind", [Stacked, Summed, Scattered])
def test_costs_ranking_and_repair(kind: type[Listed]) -> None:
    model, x = made(kind)
    with torch.no_grad():
        for n in (1, 4):
            for one in model.experts[n].parameters():
                one.mul_(0.01)
    calibration = [torch.randn(32, 7) for _ in range(3)]
    for importance, repair in (("l2", "none"), ("l1", "none"), ("l2", "bias"), ("l2", "lstsq")):
        slim = compress(model, {"router": 2 / 6}, x, calibration=calibration, importance=importance, repair=repair)
        assert fxprune.record(slim).kept["router.weight"][0].tolist() == [0, 2, 3, 5]
        assert fxprune.record(slim).after.macs == fxprune.profile(slim, x).macs
    half: Any = compress(model, "params=0.5", x)
    assert fxprune.record(half).after.params <= 0.5 * fxprune.record(half).before.params


def test_the_class_cannot_be_kept_and_says_so() -> None:
    model, x = made(Summed)
    with pytest.raises(UnsupportedError, match=r"keep_class cannot take experts out of a list of modules \('experts\.\d\.first' goes"):
        compress(model, {"router": 0.5}, x, keep_class=True)
    kept: Any = compress(model, {"lift": 0.5}, x, keep_class=True)
    assert type(kept) is Summed and len(kept.experts) == EXPERTS


class Read(Listed):
    """The share of the third expert is read once more."""

    def mixed(self, x: Tensor) -> Any:
        shares, y = self.shares(x), torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            y = y + shares[:, n : n + 1] * expert(x)
        return y * shares[:, 2:3].exp()


class Overwritten(Listed):
    """What an expert weighs is changed in place before it is used."""

    def mixed(self, x: Tensor) -> Any:
        shares, y = self.shares(x).clone(), torch.zeros_like(x)
        first = shares[:, 0:1]
        shares.add_(1.0)
        y = y + first * self.experts[0](x)
        for n in range(1, EXPERTS):
            y = y + self.router(x)[:, n : n + 1] * self.experts[n](x)
        return y


class Logits(Listed):
    """Weighed by what is no share: an expert without one would count all the same."""

    def mixed(self, x: Tensor) -> Any:
        scores = self.router(x).exp()
        return sum(expert(x) * scores[:, n : n + 1] for n, expert in enumerate(self.experts))


class Zeroth(Listed):
    """Positions that are zero where an expert goes are places all the same."""

    def mixed(self, x: Tensor) -> Any:
        weights, index = self.best(x)
        y = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            hit = (index == n).any(-1)
            y[hit.long()] += 0.1 * expert(x)[:1]
            rows = hit.nonzero()[:, 0]
            y[rows.sum(0, keepdim=True) * 0] += expert(x)[:1]
        return y


class Counted(Listed):
    """What an expert gives is read beside its sum."""

    def mixed(self, x: Tensor) -> Any:
        shares = self.shares(x)
        found = [expert(x) for expert in self.experts]
        return sum(one * shares[:, n : n + 1] for n, one in enumerate(found)) + found[3]


ALL = frozenset(range(EXPERTS))


@pytest.mark.parametrize(("kind", "held"), [(Read, frozenset({2})), (Overwritten, ALL), (Logits, ALL), (Zeroth, ALL)])
def test_experts_that_are_needed_stay(kind: type[Listed], held: frozenset[int]) -> None:
    model, x = made(kind)
    graph = analyze(model, x)
    groups = experts_of(graph)
    free = sorted(
        i for g in groups if g.prunable for name, dim, index in g.members if (name, dim) == ("router.weight", 0) for i in index.tolist()
    )
    assert not set(free) & held and set(free) | held == ALL
    assert all("one channel fills a whole tensor" in g.reason for g in groups if not g.prunable)
    slim: Any = fxprune.compress(graph, 0.5, x, verify=True)
    if free:
        stays = fxprune.record(fxprune.compress(graph, {g.name: 0.5 for g in groups if g.prunable}, x, verify=True)).kept["router.weight"][
            0
        ]
        assert held <= set(stays.tolist()) and len(stays) < EXPERTS
    else:
        assert slim.router.out_features == EXPERTS


def test_what_is_read_beside_stays_though_its_share_goes() -> None:
    model, x = made(Counted)
    slim: Any = compress(model, {"router": 0.5}, x, verify=True, importance=lambda group, _: -torch.arange(float(group.size)))
    stays = fxprune.record(slim).kept["router.weight"][0]
    with torch.no_grad():
        assert far(masked(model, stays)(x), slim(x)) < 1e-5


def test_branches_that_no_router_weighs_stay() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(7, 8) for _ in range(3))
            self.scale, self.head = nn.Parameter(torch.randn(3)), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Any:
            found = torch.stack([branch(x) for branch in self.branches])
            return self.head(found.mean(0) + sum(self.scale[n] * branch(x) for n, branch in enumerate(self.branches)))

    model, x = Branches().eval(), torch.randn(5, 7)
    graph = analyze(model, x)
    assert not any(g.experts for g in graph.groups) and graph.gated is None
    slim: Any = fxprune.compress(graph, 0.5, x, verify=True)
    assert len(slim.scale) == 3 and slim.head.in_features == 4
