"""Whole experts go with their rows of the router, as if their logits were minus infinity; as many stay as the router chooses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, PolicyError, VerificationError
from fxprune.passes.planning.cost_model import cost_model
from fxprune.passes.planning.plan import keep_counts
from fxprune.passes.verify import verify

EXPERTS, CHOSEN, STREAM, INNER = 6, 2, 8, 12
analyze, compress = partial(fxprune.analyze, experts=True), partial(fxprune.compress, experts=True)


class Mixture(nn.Module):
    """Stacked experts between two layers; the subclasses route."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.router, self.head = nn.Linear(7, STREAM), nn.Linear(STREAM, EXPERTS), nn.Linear(STREAM, 5)
        self.num_experts, self.top_k = EXPERTS, CHOSEN
        self.up = nn.Parameter(torch.randn(EXPERTS, STREAM, INNER) * 0.4)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, STREAM) * 0.4)
        self.bias = nn.Parameter(torch.randn(EXPERTS, INNER) * 0.3)

    def forward(self, x: Tensor) -> Any:
        x = self.lift(x)
        return self.head(x + self.mixed(x))

    def mixed(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def picked(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts at ``index`` (tokens, k) alone."""
        inner = torch.relu(torch.einsum("td,tkdh->tkh", x, self.up[index]) + self.bias[index])
        return (torch.einsum("tkh,tkhd->tkd", inner, self.down[index]) * weights.unsqueeze(-1)).sum(1)

    def weighed(self, x: Tensor, weights: Tensor) -> Tensor:
        """All experts, by ``weights`` (tokens, experts)."""
        inner = torch.relu(torch.einsum("td,edh->teh", x, self.up) + self.bias)
        return (torch.einsum("teh,ehd->ted", inner, self.down) * weights.unsqueeze(-1)).sum(1)


class Gathered(Mixture):
    def mixed(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        return self.picked(x, index, weights / weights.sum(-1, keepdim=True))


class OneHot(Mixture):
    def mixed(self, x: Tensor) -> Tensor:
        weights, index = torch.topk(self.router(x), self.top_k, dim=-1)
        hot = F.one_hot(index, self.num_experts).to(x.dtype)
        return self.weighed(x, (hot * weights.softmax(-1).unsqueeze(-1)).sum(1))


class Sentinel(Mixture):
    """One class more than experts, as the experts of transformers count them."""

    def mixed(self, x: Tensor) -> Tensor:
        weights, index = torch.topk(self.router(x), self.top_k, dim=-1)
        hot = F.one_hot(index, num_classes=self.num_experts + 1).permute(2, 1, 0).to(x.dtype)
        return self.weighed(x, (hot[: self.num_experts] * weights.softmax(-1).T).sum(1).T)


class Scattered(Mixture):
    def mixed(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        weights, index = logits.topk(self.top_k, -1)
        return self.weighed(x, torch.zeros_like(logits).scatter(-1, index, weights.softmax(-1)))


class Threshold(Mixture):
    def mixed(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        least = logits.topk(self.top_k, -1).values[:, -1:]
        return self.weighed(x, logits.masked_fill(logits < least, float("-inf")).softmax(-1))


class Corrected(Mixture):
    """A bias for the choice alone, as in DeepSeek's: the shares are those of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.correction = nn.Parameter(torch.randn(EXPERTS))

    def mixed(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        index = torch.topk(scores + self.correction, self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, index)
        return self.picked(x, index, weights / weights.sum(-1, keepdim=True))


class Grouped(Corrected):
    """First the better half of the experts, by the sums of their two best; then the best in it."""

    def mixed(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        wanted = scores + self.correction
        best = wanted.view(-1, 2, self.num_experts // 2).topk(2, dim=-1)[0].sum(-1).topk(1, dim=-1)[1]
        half = torch.zeros(x.shape[0], 2, device=x.device).scatter(1, best, 1.0)
        mask = half.unsqueeze(-1).expand(-1, 2, self.num_experts // 2).reshape(-1, self.num_experts)
        index = wanted.masked_fill(~mask.bool(), float("-inf")).topk(self.top_k, dim=-1)[1]
        return self.picked(x, index, scores.gather(1, index))


class Best(Mixture):
    def mixed(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(-1).max(-1)
        inner = torch.relu(torch.bmm(x.unsqueeze(1), self.up[index]).squeeze(1) + self.bias[index])
        found: Tensor = torch.bmm(inner.unsqueeze(1), self.down[index]).squeeze(1) * weight[:, None]
        return found


class Argmax(Mixture):
    def mixed(self, x: Tensor) -> Tensor:
        index = self.router(x).argmax(-1)
        inner = torch.relu(torch.bmm(x.unsqueeze(1), self.up[index]).squeeze(1) + self.bias.index_select(0, index))
        return torch.bmm(inner.unsqueeze(1), self.down[index, ...]).squeeze(1)


class Twice(Mixture):
    """The best, and the best of the others, side by side."""

    def mixed(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        first = logits.argmax(-1, keepdim=True)
        second = logits.scatter(1, first, float("-inf")).argmax(-1, keepdim=True)
        index = torch.cat([first, second], dim=1)
        return self.picked(x, index, logits.softmax(-1).gather(1, index))


class Sorted(Mixture):
    """Rows in the order of their experts, and where each expert's end."""

    def mixed(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        order = index.reshape(-1).sort()
        counts = torch.histc(order.values.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        inner = F.grouped_mm(x[order.indices // self.top_k], self.up, offs=ends) + self.bias[order.values]
        found = F.grouped_mm(torch.relu(inner), self.down, offs=ends) * weights.reshape(-1)[order.indices].unsqueeze(-1)
        back = torch.empty_like(order.indices)
        back[order.indices] = torch.arange(order.indices.shape[0], device=x.device)
        ordered: Tensor = found[back].view(x.shape[0], self.top_k, -1).sum(1)
        return ordered


class Dense(Mixture):
    """No choice: each expert has its share of the softmax."""

    def mixed(self, x: Tensor) -> Tensor:
        return self.weighed(x, self.router(x).softmax(-1))


NO_GROUPED = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
CHOOSING = [Gathered, OneHot, Sentinel, Scattered, Threshold, Corrected, Grouped, Best, Argmax, Twice]
ROUTERS: list[Any] = [*CHOOSING, pytest.param(Sorted, marks=NO_GROUPED), Dense]


def made(kind: type[Mixture]) -> tuple[Any, Tensor]:
    torch.manual_seed(1)
    return kind().eval(), torch.randn(11, 7)


def experts_of(graph: Any) -> Any:
    (group,) = [g for g in graph.groups if any(name == "router.weight" and dim == 0 for name, dim, _ in g.members)]
    return group


def masked(model: Any, kept: Tensor) -> nn.Module:
    """The original whose removed experts have a logit of minus infinity; everything else is untouched."""
    twin: nn.Module = copy.deepcopy(model)
    router: Any = twin.router
    router.register_forward_hook(lambda module, given, logits: _only(logits, kept))
    if isinstance(correction := getattr(twin, "correction", None), Tensor):
        with torch.no_grad():
            correction.copy_(_only(correction, kept))
    return twin


def _only(logits: Tensor, kept: Tensor) -> Tensor:
    return torch.full_like(logits, float("-inf")).index_copy(-1, kept, logits[..., kept])


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("seed", range(3))
def test_what_goes_has_a_logit_of_minus_infinity(kind: type[Mixture], seed: int) -> None:
    model, x = made(kind)
    graph = analyze(model, x)
    group = experts_of(graph)
    assert group.prunable and group.size == (3 if kind is Grouped else EXPERTS), group.reason
    assert {name for name, dim, _ in group.members if dim == 0} >= {"router.weight", "router.bias", "up", "down", "bias"}
    torch.manual_seed(seed)
    slim: Any = fxprune.compress(graph, {group.name: 0.5}, x, importance="random" if seed else "l2", verify=True)
    kept = fxprune.record(slim).kept
    stays = kept["router.weight"][0]
    assert len(stays) == (4 if kind is Grouped else 3) and set(kept) == {name for name, _, _ in group.members}
    assert all(torch.equal(dims[0], stays) and list(dims) == [0] for dims in kept.values())
    y = torch.randn(29, 7)
    with torch.no_grad():
        assert far(masked(model, stays)(y), slim(y)) < 1e-5 < far(model(y), slim(y))


@pytest.mark.parametrize("kind", ROUTERS)
def test_experts_and_widths_go_together(kind: type[Mixture]) -> None:
    model, x = made(kind)
    graph = analyze(model, x)
    for norms in ("plain", "exact"):
        slim: Any = fxprune.compress(graph, 0.5, x, verify=True, norms=norms, round_to=4)
        assert slim.up.shape == ((4 if kind in (Grouped, Dense) else 3), 4, 8)  # rounding is not for what is chosen
    slim.train()
    slim(x).square().sum().backward()
    unread = [getattr(slim, "correction", None), *(slim.router.parameters() if kind is Argmax else ())]
    assert all(p.grad is not None for p in slim.parameters() if not any(p is other for other in unread))


@pytest.mark.parametrize("kind", [*CHOOSING, Dense])
def test_kept_class_counts_what_is_left(kind: type[Mixture]) -> None:
    model, x = made(kind)
    graph = analyze(model, x)
    policy = {experts_of(graph).name: 0.3, "lift": 0.5}
    slim = fxprune.compress(graph, policy, x)
    kept: Any = fxprune.compress(graph, policy, x, keep_class=True, verify=True)
    left = kept.router.out_features
    assert type(kept) is kind and torch.equal(kept(x), slim(x)) and left == (6 if kind is Grouped else 5) == len(kept.up)
    if experts_of(graph).experts and kind is not Grouped:
        assert kept.num_experts == 5 and any("num_experts (6 -> 5)" in note for note in fxprune.record(kept).notes)
    assert model.num_experts == EXPERTS and model.router.out_features == EXPERTS


def test_files_and_other_copies(tmp_path: Path) -> None:
    model, x = made(Gathered)
    slim: Any = compress(model, {"router": 0.5, "lift": 0.25}, x)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "slim.safetensors", Gathered())(x), slim(x))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.up.mul_(2)
    again: Any = fxprune.apply(slim, other)
    assert torch.equal(again.up, 2 * slim.up) and torch.equal(again.router.weight, slim.router.weight)
    assert torch.equal(fxprune.compress(model, fxprune.record(slim).policy, x)(x), slim(x))


def test_as_many_stay_as_are_chosen() -> None:
    model, x = made(Gathered)
    graph = analyze(model, x)
    group = experts_of(graph)
    assert (group.name, group.experts, group.least) == ("router", True, CHOSEN)
    assert group.notes == ("experts, the best 2 of those that are left are chosen at topk",)
    what = r"group 'router' would keep 1 of 6 experts, and 2 are chosen for each token; its sparsity may be 0\.6+7? at most"
    with pytest.raises(PolicyError, match=what):
        fxprune.compress(graph, {"router": 0.9}, x)
    for policy in (0.9, {"*": 0.9}, fxprune.Policy.uniform(graph, 0.9), "params=0.1", "macs=0.2"):
        slim: Any = fxprune.compress(graph, policy, x, verify=True)
        assert len(slim.up) == CHOSEN or policy == "macs=0.2" and len(slim.up) > CHOSEN
        assert torch.equal(fxprune.compress(graph, fxprune.record(slim).policy, x)(x), slim(x))
    assert len(fxprune.compress(graph, {"router": 4 / 6}, x).up) == CHOSEN  # type: ignore[arg-type]
    assert int(keep_counts(graph, {"router": 6}, {"router": range(6)}).sum()) == len(keep_counts(graph, {}, {})) - 4


def test_what_experts_cost() -> None:
    model, x = made(Gathered)
    graph = analyze(model, x)
    before = cost_model(graph).profile()
    found = fxprune.record(fxprune.compress(graph, {"router": 0.5}, x))
    assert before.params - found.after.params == 3 * (2 * STREAM * INNER + INNER + STREAM + 1)
    assert before.macs - found.after.macs == 3 * STREAM * len(x)  # as many are chosen as before


@NO_GROUPED
def test_each_row_meets_one_expert() -> None:
    model, x = made(Sorted)
    assert cost_model(analyze(model, x)).macs() == fxprune.profile(model, x).macs


@pytest.mark.parametrize("kind", [Gathered, Corrected, Best])
def test_a_wrong_slim_network_is_noticed(kind: type[Mixture]) -> None:
    model, x = made(kind)
    graph = analyze(model, x)
    keep = keep_counts(graph, {"router": 3}, {"router": range(6)})
    slim: Any = fxprune.compress(graph, {"router": 0.5}, x, importance=lambda group, _: torch.arange(float(group.size)))
    verify(graph, keep, slim, (x,), {})
    with torch.no_grad():
        slim.up.copy_(slim.up.flip(0))
    with pytest.raises(VerificationError):
        verify(graph, keep, slim, (x,), {})


def test_equal_scores_are_no_failure() -> None:
    model, x = made(Gathered)
    with torch.no_grad():
        model.router.weight[3:] = model.router.weight[2]
        model.router.bias[3:] = model.router.bias[2]
    compress(model, {"router": 1 / 6}, x, verify=True, importance=lambda group, _: torch.arange(float(group.size)))


def _other(use: Callable[[Tensor, Tensor], Tensor]) -> type[Mixture]:
    """A mixture whose experts get ``use(x, index)`` (tokens, k) more on their shares."""

    class Other(Mixture):
        def mixed(self, x: Tensor) -> Tensor:
            weights, index = self.router(x).topk(self.top_k, dim=-1)
            return self.picked(x, index, weights + use(x, index))

    return Other


def _written(x: Tensor, index: Tensor) -> Tensor:
    index[:, 1] = 0
    return torch.zeros(())


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number": lambda x, index: index.to(x.dtype),
    "parity": lambda x, index: (index % 2).to(x.dtype),
    "a shift": lambda x, index: torch.ones(7)[index + 1],
    "a fixed table": lambda x, index: torch.linspace(0, 1, 6)[index],
    "the largest": lambda x, index: index.max().to(x.dtype),
    "a comparison": lambda x, index: (index == 3).to(x.dtype),
    "eight bits": lambda x, index: F.one_hot(index.to(torch.int8).long(), 6).sum(-1).to(x.dtype) * index.to(torch.int8),
    "a write": _written,
    "a choice of two": lambda x, index: torch.where(x[:, :1] > 0, index, 0).to(x.dtype),
    "more classes by name": lambda x, index: F.one_hot(index, 9)[..., 7:].sum(-1).to(x.dtype),
    "other bins": lambda x, index: torch.histc(index.float(), bins=3, min=0, max=5)[0],
    "an embedding": lambda x, index: F.embedding(index, torch.linspace(0, 1, 6).unsqueeze(-1)).squeeze(-1),
    "a gather": lambda x, index: torch.linspace(0, 1, 6).expand(len(x), 6).gather(1, index),
}


@pytest.mark.parametrize("what", USES)
def test_other_uses_of_positions_hold_the_experts_or_are_right(what: str) -> None:
    model, x = made(_other(USES[what]))
    graph = analyze(model, x)
    groups = [g for g in graph.groups if any(name == "router.weight" and dim == 0 for name, dim, _ in g.members)]
    free = {g.name: 0.5 for g in groups if g.prunable}
    assert all("position" in g.reason or "chosen" in g.reason or "one channel fills" in g.reason for g in groups if not g.prunable)
    # The expert that is compared with stays, the others may go; of tables and matrices that are picked from by position rows go.
    assert bool(free) == (what in ("a fixed table", "more classes by name", "a comparison"))
    if free:
        slim: Any = fxprune.compress(graph, free, x, importance="random", verify=True)
        with torch.no_grad():
            assert far(masked(model, fxprune.record(slim).kept["router.weight"][0])(x), slim(x)) < 1e-5


def test_positions_that_are_returned_hold_the_experts() -> None:
    class Returned(Gathered):
        def forward(self, x: Tensor) -> Any:
            x = self.lift(x)
            return self.head(x + self.mixed(x)), self.router(x).topk(2).indices

    model, x = made(Returned)
    group = experts_of(analyze(model, x))
    assert not group.prunable and group.reason == "positions of what is chosen among them reach the network's output"
    assert experts_of(analyze(model, x, outputs=[0])).prunable


def test_all_experts_are_chosen() -> None:
    model, x = made(Gathered)
    model.top_k = EXPERTS
    assert not experts_of(analyze(model, x)).prunable


def test_other_choices_hold_what_they_held() -> None:
    class Codes(nn.Module):
        """Rows of a table, by the nearest."""

        def __init__(self) -> None:
            super().__init__()
            self.lift, self.codes, self.head = nn.Linear(7, 8), nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.codes[(self.lift(x) @ self.codes.T).argmax(-1)])

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Any:
            return self.second(F.one_hot(self.first(x).argmax(1), 6).permute(0, 3, 1, 2).float())

    for model, x in ((Codes(), torch.randn(5, 7)), (Classes(), torch.randn(2, 3, 9, 9))):
        graph = analyze(model.eval(), x)
        locked = [g for g in graph.groups if "the index of a maximum over it is used" in g.reason]
        assert len(locked) == 1 and not any(g.experts for g in graph.groups)


def test_explain_and_visualize_say_what_they_are() -> None:
    model, x = made(Gathered)
    said = "experts, the best 2 of those that are left are chosen: router"
    graph = analyze(model, x)
    assert said in str(fxprune.explain(graph))
    fxprune.visualize(graph)


@pytest.mark.parametrize("kind", [Gathered, Scattered])
def test_whole_experts_stay_where_nobody_asks_for_them(kind: type[Mixture]) -> None:
    model, x = made(kind)
    graph = fxprune.analyze(model, x)
    router = next(group for group in graph.groups if group.name == "router")
    assert not router.prunable and "experts=True" in router.reason and "experts=True" in str(fxprune.explain(graph))
    slim: Any = fxprune.compress(model, 0.5, x, verify=True)
    assert len(slim.up) == EXPERTS and slim.up.shape[2] == INNER // 2
    with pytest.raises(PolicyError, match=r"group 'router' cannot be pruned: whole experts stay"):
        fxprune.compress(model, {"router": 0.5}, x)
    with pytest.raises(InputError, match="analysed with experts=False; pass experts=True to analyze"):
        fxprune.compress(graph, {"router": 0.5}, x, experts=True)
    config = fxprune.SearchConfig(targets="params=0.3", strategy="uniform", repair="none", experts=True)
    found: Any = fxprune.search(model, x, lambda slim: 0.5, config=config, calibration=[x])
    assert len(found.model.up) < EXPERTS
