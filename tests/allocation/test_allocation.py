"""Error tables: what they say of a network against what happens to it, and the allocations that are read off them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.allocation import trying
from fxprune.allocation.allocating import Allocator, allocate
from fxprune.allocation.prices import METRICS, Prices
from fxprune.allocation.tables import ErrorTable, error_table
from fxprune.allocation.trying import Near, Trials, tried
from fxprune.allocation.uniform import Uniform
from fxprune.allocation.widths import Knapsack
from fxprune.errors import EvaluationError, InputError, PolicyError, TargetError
from fxprune.passes.planning.cost_model import cost_model
from fxprune.passes.planning.plan import keep_counts


class Residual(nn.Module):
    """A stem, two blocks on its stream, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Conv2d(12, 8, 3, padding=1))
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Mixer(nn.Module):
    """Tokens through attention, whose queries and keys no weight reads, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ self.v(x)
        x = x + self.o(mixed)
        out: Tensor = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return out


class Recurrent(nn.Module):
    """An LSTM, whose weights are no layer that can be refitted, read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 10, batch_first=True)
        self.out = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        out: Tensor = self.out(hidden[:, -1])
        return out


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def images(count: int = 64, size: int = 8) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, size, size, generator=drawn) for _ in range(count // 16)]


INPUTS = {Residual: images(), Mixer: [torch.randn(16, 5, 12, generator=torch.Generator().manual_seed(i)) for i in range(4)]}
INPUTS[Recurrent] = [torch.randn(16, 7, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.fixture(scope="module", params=[Residual, Mixer, Recurrent])
def network(request: pytest.FixtureRequest) -> tuple[fxprune.CouplingGraph, list[Tensor]]:
    batches = INPUTS[request.param]
    return fxprune.analyze(seeded(request.param), batches[0]), batches


def test_errors_rise_from_nothing_for_every_group(network: tuple[fxprune.CouplingGraph, list[Tensor]]) -> None:
    graph, batches = network
    table = error_table(graph, batches)
    for group in (g for g in graph.groups if g.prunable):
        errors = table.errors(group.name)
        assert errors.shape == (group.size,) and errors[0] == 0 and (np.diff(errors) >= 0).all()
        assert errors[-1] > 0, group.name
        assert sorted(table.ranking[group.name]) == list(range(group.size))


class Calls(nn.Module):
    """A perceptron whose last layer is called ``times`` times on the same input."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.up, self.down = times, nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.up(x))
        return sum((self.down(y) for _ in range(self.times)), torch.zeros(()))


def test_a_layer_that_is_called_several_times_counts_with_all_its_calls() -> None:
    batches = [torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    once, thrice = seeded(lambda: Calls(1)), seeded(lambda: Calls(3))  # type: ignore[arg-type]
    errors = []
    for model in (once, thrice):
        graph = fxprune.analyze(model, batches[0])
        name = graph.groups[0].name
        errors.append(error_table(graph, batches, ranking={name: np.arange(16)}, repair="none").errors(name))
    np.testing.assert_allclose(errors[1], 9 * errors[0], rtol=1e-4)


def test_a_small_change_is_predicted_to_first_order() -> None:
    """Where a unit's readers have nearly no weight for it, what its removal does to the output is what the table says."""
    model = seeded(Residual)
    with torch.no_grad():
        model.get_parameter("blocks.0.3.weight").mul_(1e-2)
    batches = images(512)
    graph = fxprune.analyze(model, batches[0])
    table = error_table(graph, batches, repair="none")
    slim = fxprune.compress(graph, {"blocks.0.0": 0.5}, importance=lambda group, _: torch.from_numpy(table.ranking[group.name]))
    with torch.no_grad():
        moved = torch.cat([slim(x) - model(x) for x in batches])
    measured = float((moved - moved.mean(1, keepdim=True)).square().sum(1).mean())
    assert table.errors("blocks.0.0")[6] == pytest.approx(measured, rel=0.2)  # 512 random directions


def test_least_squares_leaves_less_than_slicing() -> None:
    graph = fxprune.analyze(seeded(Residual), images()[0])
    ranking = {g.name: np.arange(g.size) for g in graph.groups if g.prunable}
    fitted, sliced = (error_table(graph, images(), ranking=ranking, repair=repair) for repair in ("lstsq", "bias"))
    for name in ("stem.0", "blocks.1.0"):
        assert fitted.errors(name)[:6].sum() < sliced.errors(name)[:6].sum()


def test_a_unit_that_does_nothing_goes_first_and_costs_nothing() -> None:
    model = seeded(Residual)
    with torch.no_grad():
        model.get_parameter("blocks.0.3.weight")[:, [2, 7]] = 0
    graph = fxprune.analyze(model, images()[0])
    table = error_table(graph, images())
    assert set(np.argsort(table.ranking["blocks.0.0"])[:2]) == {2, 7}
    assert table.errors("blocks.0.0")[2] == pytest.approx(0, abs=1e-9) and table.errors("blocks.0.0")[3] > 1e-8


def test_a_given_ranking_is_kept() -> None:
    graph = fxprune.analyze(seeded(Residual), images()[0])
    ranking = {g.name: np.arange(g.size)[::-1].copy() for g in graph.groups if g.prunable}
    table = error_table(graph, images(), ranking=ranking)
    assert all((np.argsort(table.ranking[name]) == np.argsort(ranking[name])).all() for name in ranking)


def test_the_same_seed_gives_the_same_table_and_nothing_of_the_model_changes() -> None:
    model = seeded(Residual).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = fxprune.analyze(model, images()[0])
    first, again, other = (error_table(graph, images(), seed=seed) for seed in (3, 3, 4))
    assert all((first.effects[name] == again.effects[name]).all() for name in first.effects)
    assert not all((first.effects[name] == other.effects[name]).all() for name in first.effects)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_widths_between_rounds_are_interpolated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 100), nn.ReLU(), nn.Linear(100, 4)).eval()
    batches = [torch.randn(32, 6) for _ in range(4)]
    table = error_table(fxprune.analyze(model, batches[0]), batches)
    assert len(table.widths["0"]) < 40 and table.widths["0"][-1] == 99
    along = table.along("0")
    assert along.shape == (100, 128) and np.allclose(along[4], table.effects["0"][1])
    assert np.allclose(along[6], (along[4] + along[8]) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_prices_are_those_of_the_cost_model(network: tuple[fxprune.CouplingGraph, list[Tensor]], seed: int) -> None:
    graph, _ = network
    groups = [g for g in graph.groups if g.prunable]
    drawn = np.random.default_rng(seed)
    removed = np.array([[drawn.integers(0, g.size) for g in groups] for _ in range(4)])
    prices, costs = Prices(graph, groups), cost_model(graph)
    ranking = {g.name: np.arange(g.size) for g in groups}
    for metric, count in (("macs", costs.macs), ("params", costs.params), ("memory", costs.memory)):
        exact = [
            count(keep_counts(graph, dict(zip([g.name for g in groups], map(int, row), strict=True)), ranking)) / count() for row in removed
        ]
        assert prices.shares(metric, removed) == pytest.approx(exact, abs=1e-3), metric


@pytest.mark.parametrize("metric", METRICS)
def test_a_bound_is_met_and_little_is_given_away(metric: str) -> None:
    graph = fxprune.analyze(seeded(Residual), images()[0])
    policy = allocate(graph, {metric: 0.6}, images())
    left = policy.meta["left"][metric]
    assert 0.5 < left <= 0.6 + 1e-6
    record = fxprune.record(fxprune.compress(graph, policy))
    if metric != "sparsity":
        cost = {"macs": "macs", "params": "params", "memory": "peak_activation_bytes"}[metric]
        assert getattr(record.after, cost) / getattr(record.before, cost) == pytest.approx(left, abs=2e-3)


def test_two_bounds_at_once() -> None:
    policy = allocate(fxprune.analyze(seeded(Residual), images()[0]), {"macs": 0.7, "params": 0.5}, images())
    assert policy.meta["left"]["macs"] <= 0.7 + 1e-6 and policy.meta["left"]["params"] <= 0.5 + 1e-6


def test_channels_are_kept_in_multiples_and_no_group_above_its_limit() -> None:
    graph = fxprune.analyze(seeded(Residual), images()[0])
    slim = fxprune.compress(graph, allocate(graph, {"macs": 0.6}, images(), round_to=4))
    assert all(len(kept) % 4 == 0 for dims in fxprune.record(slim).kept.values() for kept in dims.values())
    policy = allocate(graph, {"macs": 0.8}, images(), most={"blocks.*": 0.25, "stem.0": 0.5})
    assert all(share <= 0.25 for name, share in policy.sparsity.items() if name.startswith("blocks"))
    assert policy.sparsity["stem.0"] <= 0.5 and policy.meta["left"]["macs"] <= 0.8


def test_the_policy_gives_the_units_of_the_table() -> None:
    graph = fxprune.analyze(seeded(Residual), images()[0])
    policy = allocate(graph, {"macs": 0.5}, images())
    table = error_table(graph, images())
    removed = fxprune.record(fxprune.compress(graph, policy)).removed_units
    assert removed
    for name, units in removed.items():
        assert set(units.tolist()) == set(np.argsort(table.ranking[name])[: len(units)].tolist())


def test_many_targets_from_one_table() -> None:
    graph = fxprune.analyze(seeded(Residual), images()[0])
    allocator = Allocator(graph, error_table(graph, images()))
    found = [allocator.allocate({"macs": share}) for share in (0.8, 0.5, 0.2)]
    assert [int(one.sum()) for one in found] == sorted(int(one.sum()) for one in found)
    shares = [allocator.prices.shares("macs", one[None])[0] for one in found]
    assert shares == pytest.approx([0.8, 0.5, 0.2], abs=0.05) and all(a <= b for a, b in zip(shares, (0.8, 0.5, 0.2), strict=True))


def test_what_cannot_be_is_said() -> None:
    graph = fxprune.analyze(seeded(Residual), images()[0])
    with pytest.raises(InputError, match=r"cannot bound 'latency', only macs, params, memory, sparsity"):
        allocate(graph, {"latency": 0.5}, images())
    with pytest.raises(InputError, match="macs=1.5 is out of range"):
        allocate(graph, {"macs": 1.5}, images())
    with pytest.raises(InputError, match="needs calibration data"):
        allocate(graph, {"macs": 0.5}, [])
    with pytest.raises(TargetError, match=r"'macs=0.001' cannot be met: with .* of the macs are left; give a larger share"):
        allocate(graph, {"macs": 0.001}, images())
    with pytest.raises(PolicyError, match="most of"):
        allocate(graph, {"macs": 0.5}, images(), most=2.0)
    with pytest.raises(InputError, match="no floating tensor"):
        error_table(fxprune.analyze(Whole(), images()[0]), images())


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv(x).relu()).argmax(1)
        return out


def made_up(errors: list[list[float]], price: list[float]) -> Knapsack:
    """Groups whose errors add up, each along a direction of its own, at a linear price."""
    effects = []
    for i, one in enumerate(errors):
        effect = np.zeros((len(one), len(errors)))
        effect[:, i] = np.sqrt(np.array(one) * len(errors))
        effects.append(effect)
    return Knapsack(effects, [np.arange(len(e)) for e in errors], lambda _, removed: 1 - removed @ np.array(price))


def test_the_knapsack_takes_what_breaks_least_for_what_it_saves() -> None:
    removed = made_up([[0, 1, 2, 3, 4], [0, 9, 18, 27, 36]], [0.1, 0.1]).allocate({"macs": 0.6})
    assert removed.tolist() == [4, 0]
    removed = made_up([[0, 1, 2, 3, 4], [0, 3, 6, 9, 12]], [0.05, 0.2]).allocate({"macs": 0.4})
    assert removed.tolist() == [0, 3]


def test_the_knapsack_sees_past_a_dear_first_unit() -> None:
    removed = made_up([[0, 5, 5, 5, 5], [0, 2, 4, 6, 8]], [0.1, 0.1]).allocate({"macs": 0.6})
    assert removed.tolist() == [4, 0]


def test_the_knapsack_uses_effects_that_cancel_out() -> None:
    ones = np.ones((1, 4))
    effects = [np.arange(4)[:, None] * ones, -np.arange(4)[:, None] * ones, np.arange(4)[:, None] * np.array([[0.1, -0.1, 0.1, -0.1]]) * 4]
    removed = Knapsack(effects, [np.arange(4)] * 3, lambda _, r: 1 - r @ np.array([0.1, 0.1, 0.1])).allocate({"macs": 0.6})
    assert removed.tolist() == [2, 2, 0]


def test_a_search_by_the_table_scores_the_baselines_and_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return error_table(*args, **kwargs)

    monkeypatch.setattr("fxprune.searching.problem.error_table", counted)
    scored: list[int] = []

    def evaluate(module: nn.Module) -> float:
        scored.append(1)
        return 0.5

    config = fxprune.SearchConfig(strategy="table", targets=("macs=0.7,0.5",), tolerance=0.03)
    found = fxprune.search(seeded(Residual), images()[0], evaluate, config=config, calibration=images())
    assert found.evaluations == len(scored) == 5 and len(made) == 1  # the original, and uniform and result of two points
    assert [point.metrics["macs"] for point in found.outcome.pareto] == pytest.approx([0.7, 0.5], abs=0.021)
    table = error_table(fxprune.analyze(seeded(Residual), images()[0]), images())
    for name, units in fxprune.record(found.model).removed_units.items():
        assert set(units.tolist()) == set(np.argsort(table.ranking[name])[: len(units)].tolist())


class Rounding(nn.Module):
    """What its first layer makes is rounded before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(torch.round(self.second(self.first(x)) * 4))
        return out


def test_what_no_gradient_reaches_is_kept_whole() -> None:
    batches = [torch.randn(16, 6) for _ in range(3)]
    graph = fxprune.analyze(seeded(Rounding), batches[0])
    allocator = Allocator(graph, error_table(graph, batches))
    assert allocator.kept_whole == ("first",) and [g.name for g in allocator.groups] == ["first", "second"]
    assert allocator.allocate({"params": 0.6})[0] == 0


class Detached(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def test_a_network_without_gradients_is_searched_without_a_table() -> None:
    graph = fxprune.analyze(seeded(Detached), images()[0])
    with pytest.raises(EvaluationError, match=r"no gradient of the network's output reaches its weights .* search without one"):
        error_table(graph, images())
    options: dict[str, Any] = {"targets": ("macs=0.6",), "tolerance": 0.05, "evaluations": 6}
    with pytest.warns(fxprune.PruningWarning, match="begins without an error table: no gradient"):
        config = fxprune.SearchConfig(**options)
        fxprune.search(seeded(Detached), images()[0], lambda module: 0.5, config=config, calibration=images())
    with pytest.raises(EvaluationError, match="no gradient"):
        config = fxprune.SearchConfig(strategy="table", **options)
        fxprune.search(seeded(Detached), images()[0], lambda module: 0.5, config=config, calibration=images())


def test_few_rows_do_not_make_a_removal_look_free() -> None:
    """A classifier of 96 features fitted on 32 rows: half of its features can give what all give there, and there alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 10)).eval()
    batches = [torch.randn(16, 40) for _ in range(2)]
    graph = fxprune.analyze(model, batches[0])
    few, many = error_table(graph, batches), error_table(graph, [torch.randn(512, 40) for _ in range(8)])
    assert few.errors("0")[48] > 0.25 * many.errors("0")[48]


# -- trials -------------------------------------------------------------------------------------------------------------------


class Squeezed(nn.Module):
    """A depthwise block between two streams, without residual sums: nothing is written twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.last(torch.relu(self.depthwise(torch.relu(self.first(x))))).mean((2, 3)))
        return out


def trials_of(model: nn.Module, repair: str = "lstsq") -> tuple[fxprune.CouplingGraph, Trials, Uniform, ErrorTable]:
    graph = fxprune.analyze(model, images()[0])
    table = error_table(graph, images(), repair=repair)
    return graph, Trials(graph, images(), table.ranking, repair), Uniform(graph, table.ranking, {"macs": 0.6}, 1, None), table


def test_what_is_better_on_inputs_kept_apart_replaces_the_tables_own() -> None:
    graph, trials, uniform, _ = trials_of(seeded(Residual))
    groups = [group for group in graph.groups if group.prunable]
    ruin = {group.name: group.size - 1 for group in groups}
    judged = tried(trials, uniform, groups, ruin, Near(lambda weights, start: ruin, lambda counts, name, wanted: None), 4, 0)
    assert judged[0].name == "uniform" and judged[0].counts == uniform.counts() and judged[0].distance < judged[-1].distance
    mild = {group.name: 0 for group in groups}
    judged = tried(trials, uniform, groups, mild, Near(lambda weights, start: ruin, lambda counts, name, wanted: None), 4, 0)
    assert judged[0].name == "table" and judged[0].distance < 1e-6


def test_trials_judge_by_inputs_that_repaired_nothing() -> None:
    _, trials, _, _ = trials_of(seeded(Residual))
    fitted = {id(inputs) for inputs in trials.whole.batches}
    assert trials.judge and not fitted & {id(piece.inputs) for piece in trials.judge}
    few = {id(inputs) for inputs in trials.quick.batches}
    assert trials.few and not few & {id(piece.inputs) for piece in trials.few}


def test_a_step_that_serves_is_taken_again() -> None:
    graph, trials, uniform, _ = trials_of(seeded(Residual), "none")
    groups = [group for group in graph.groups if group.prunable]
    ruin = {group.name: group.size - 1 for group in groups}
    events: list[tuple[str, int] | float] = []  # steps asked for, and distances of what was tried

    def moved(counts: trying.Counts, name: str, wanted: int) -> trying.Counts | None:
        events.append((name, wanted - counts[name]))
        return {**counts, name: wanted} if wanted < counts[name] else None  # bounds do not matter here

    trials.observe = lambda step, trial, seconds: events.append(trial.distance)
    uniform.bounds = {"macs": 0.0}  # nothing fits: only steps lead away from the table
    judged = tried(trials, uniform, groups, ruin, Near(lambda weights, start: ruin, moved), trying.TRIALS, 0)
    assert judged[0].distance < judged[-1].distance and judged[-1].name == "table"
    assert sum(judged[0].counts.values()) < sum(ruin.values())
    best, repeated = np.inf, 0
    for i, event in enumerate(events[:-3]):
        if isinstance(event, float) and event < best:
            if best < np.inf and isinstance(events[i + 1], tuple):
                step, again = events[i - 1], events[i + 1]
                assert isinstance(step, tuple) and isinstance(again, tuple) and again[0] == step[0] and step[1] <= again[1] <= 0
                repeated += 1
            best = event
    assert repeated > 1


@pytest.mark.parametrize("grain", [1, 4])
def test_a_step_stays_within_the_bounds(grain: int) -> None:
    graph = fxprune.analyze(seeded(Residual), images()[0])
    allocator = Allocator(graph, error_table(graph, images()), round_to=grain)
    bounds = {"macs": 0.6}
    counts, _ = allocator.met(bounds)
    moves = 0
    for group in allocator.groups:
        for wanted in (0, group.size // 2, group.size - 1):
            found = allocator.moved(bounds, counts, group.name, wanted)
            if found is None:
                continue
            moves += 1
            assert found != counts
            removed = np.array([[found[one.name] for one in allocator.groups]])
            assert allocator.prices.shares("macs", removed)[0] <= 0.6 + 1e-6
            if grain == 1 and wanted < counts[group.name]:
                assert found[group.name] == wanted and sum(found.values()) > sum(counts.values()) - counts[group.name]
    assert moves > 1


def test_dear_networks_are_sorted_by_norms_and_the_best_repaired_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying, "CHEAP", 0)
    seen: list[trying.Trial] = []
    graph = fxprune.analyze(seeded(Residual), images()[0])
    policy = allocate(graph, {"macs": 0.6}, images(), trials=6, observe=lambda step, trial, seconds: seen.append(trial))
    kinds = [one.repair for one in seen]
    quick = kinds.count("bn")
    assert kinds == ["bn"] * quick + ["lstsq"] * (len(seen) - quick) and 2 <= quick <= 6 and len(seen) - quick in (2, 3)
    assert policy.meta["distances"] == {one.name: one.distance for one in seen[quick:]} and seen[quick].name == "table"
    assert policy.meta["left"]["macs"] <= 0.6 and policy.meta["taken"] in policy.meta["distances"]


@pytest.mark.parametrize("kind", [Residual, Squeezed, Mixer, Recurrent])
def test_trials_change_nothing_and_a_seed_gives_the_same_again(kind: type[nn.Module]) -> None:
    batches = INPUTS.get(kind) or images()
    model = seeded(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = fxprune.analyze(model, batches[0])
    first, again = (allocate(graph, {"params": 0.7}, batches, trials=5, seed=3) for _ in range(2))
    assert first.sparsity == again.sparsity and first.options == again.options and first.meta == again.meta
    assert first.meta["left"]["params"] <= 0.7 and "table" in first.meta["distances"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_single_sample_leaves_nothing_to_judge_by() -> None:
    graph = fxprune.analyze(seeded(Residual), images()[0][:1])
    assert "taken" not in allocate(graph, {"macs": 0.6}, [images()[0][:1]], trials=5).meta


def test_only_what_several_layers_write_is_a_stream() -> None:
    for kind, wanted in ((Residual, {"stem.0"}), (Squeezed, set())):
        graph = fxprune.analyze(seeded(kind), images()[0])
        assert {group.name for group in graph.groups if group.prunable and trying._streams(group, graph)} == wanted


class Scored(nn.Module):
    """Queries and keys that no weight reads, of twice or as many features as the stream that makes them has, and a weight that does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v = nn.Linear(5, 6), nn.Linear(6, width), nn.Linear(6, width), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        found: Tensor = self.head((self.q(x) @ self.k(x).transpose(-2, -1) / 4).softmax(-1) @ self.v(x))
        return found


@pytest.mark.parametrize("width", [6, 12])
@pytest.mark.parametrize("repair", ["none", "lstsq"])
def test_queries_and_keys_cost_what_their_own_rows_do(width: int, repair: str) -> None:
    """The weight that makes them reads the stream, too: the units that go are its rows, and not its columns."""
    torch.manual_seed(0)
    net = Scored(width).eval()
    with torch.no_grad():  # the last two units of the scores do nothing, though the columns of the weights are all alike
        net.q.weight[-2:], net.q.bias[-2:] = 0, 0
        net.k.weight[-2:], net.k.bias[-2:] = 0, 0
    graph = fxprune.analyze(net, torch.randn(2, 4, 5))
    table = error_table(graph, [torch.randn(64, 4, 5)], repair=repair)
    scores = next(g for g in graph.groups if {n for n, d, _ in g.members if d == 0} >= {"q.weight", "k.weight"})
    assert set(np.argsort(table.ranking[scores.name])[:2].tolist()) == {width - 2, width - 1}
