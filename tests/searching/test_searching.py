"""The search over a real (small) network: the policy it returns gives the same units again, with and without the calibration data."""

from __future__ import annotations

import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.allocation.allocating import allocate
from fxprune.allocation.trying import TRIALS
from fxprune.errors import EvaluationError, FileError, TargetError
from fxprune.importance.criteria import scores
from fxprune.repair.repairer import Repairer
from fxprune.searching.candidates import Candidates, Evaluate, Score, metrics_of
from fxprune.searching.norms import halves, nearness, unlike
from fxprune.searching.problem import make_problem


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.body = nn.Conv2d(12, 12, 3, padding=1)
        self.tail = nn.Conv2d(12, 20, 3, padding=1)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.body(x)
        x = torch.relu(self.tail(x)).mean((2, 3))
        return self.head(x)  # type: ignore[no-any-return]


INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 3])


def weight_left(module: nn.Module) -> float:
    """A stand-in for accuracy that any process computes alike."""
    return float(sum(p.detach().abs().sum() for p in module.parameters())) / 1000


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def config(**changes: object) -> fxprune.SearchConfig:
    return fxprune.SearchConfig(**{"targets": ("macs=0.5",), "samples": 2, "rounds": 2, "round_to": 1, **changes})  # type: ignore[arg-type]


def test_a_search_meets_its_target_and_its_policy_gives_the_same_units(model: nn.Module, tmp_path: Path) -> None:
    found = fxprune.search(model, INPUTS, weight_left, config=config(tolerance=0.05), calibration=[(INPUTS, LABELS)])
    record = fxprune.record(found.model)
    assert abs(record.after.macs / record.before.macs - 0.5) <= 0.05 * 0.5 + 1e-9
    assert found.evaluations >= 1 and found.history
    found.policy.save(tmp_path / "policy.json")
    for policy in (found.policy, tmp_path / "policy.json"):
        again = fxprune.record(fxprune.compress(model, policy)).removed_units
        assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in record.removed_units.items()}


def test_an_edited_policy_follows_its_sparsity_not_the_recorded_units(model: nn.Module) -> None:
    found = fxprune.search(model, INPUTS, weight_left, config=config(importance="l2", tolerance=0.05))
    name = next(n for n, p in found.policy.sparsity.items() if p > 0)
    edited = fxprune.Policy({name: 0.25}, found.policy.inputs, found.policy.options)
    group = fxprune.analyze(model, INPUTS).by_name[name]
    assert len(fxprune.record(fxprune.compress(model, edited)).removed_units[name]) == group.size // 4


def test_a_target_that_cannot_be_met_is_an_error_that_names_the_nearest(model: nn.Module) -> None:
    with pytest.raises(TargetError):
        fxprune.search(model, INPUTS, weight_left, config=config(targets=("macs=0.0001",)))


def test_costs_are_those_of_the_slim_networks(model: nn.Module) -> None:
    problem, candidates = make_problem(fxprune.analyze(model, INPUTS), weight_left, importance="l2")
    removed = np.array([n // 3 for n in problem.units])
    slim = candidates.slim(removed)
    assert problem.cost(removed)["params"] == sum(p.numel() for p in slim.parameters()) / sum(p.numel() for p in model.parameters())
    assert problem.cost(removed)["macs"] == pytest.approx(fxprune.profile(slim, INPUTS).macs / fxprune.profile(model, INPUTS).macs)
    assert 0 < problem.cost(removed)["latency"] < 1
    assert problem.measured["latency"] > 0
    assert problem.clock is not None and problem.clock.seconds() == problem.measured["latency"]
    assert 0 < problem.clock.share(removed) < 2


def test_round_to_holds_and_what_it_gives_back_is_not_counted_as_gone(model: nn.Module) -> None:
    found = fxprune.search(model, INPUTS, weight_left, config=config(targets="params=0.45", round_to=4, tolerance=0.05))
    widths = {name: len(dims[0]) for name, dims in fxprune.record(found.model).kept.items() if 0 in dims}
    assert widths and all(width % 4 == 0 for width in widths.values())
    problem, candidates = make_problem(fxprune.analyze(model, INPUTS), weight_left, importance="l2", round_to=4)
    removed = np.full(len(problem.units), 5)
    left = problem.space.rounded(removed)
    assert (left < removed).all() and (left % 4 == 0).all()
    assert problem.space.sparsity(removed) == problem.space.sparsity(left)
    assert problem.cost(removed)["params"] == problem.cost(left)["params"]


def test_a_score_is_the_same_after_a_pickle(model: nn.Module) -> None:
    graph = fxprune.analyze(model, INPUTS)
    candidates = Candidates(graph, scores(graph, "l1"), 2)
    score = Score(candidates, weight_left, Repairer(graph, [INPUTS], "lstsq"))
    removed = np.array([4] * len(candidates.names))
    assert pickle.loads(pickle.dumps(score))(removed) == score(removed)


@pytest.mark.parametrize("repair", ["none", "bn", "lstsq"])
def test_no_candidate_outlives_the_next_ones_score(model: nn.Module, repair: str) -> None:
    made: list[weakref.ref[nn.Module]] = []

    def evaluate(module: nn.Module) -> float:
        assert sum(one() is not None for one in made) <= 1
        made.append(weakref.ref(module))
        return weight_left(module)

    options = config(targets="sparsity=0.4", strategy="random", rounds=4, samples=3, tolerance=0.05, repair=repair)
    gc.disable()  # memory must not wait for it
    try:
        fxprune.search(model, INPUTS, evaluate, config=options, calibration=[(INPUTS, LABELS)])
    finally:
        gc.enable()
    assert len(made) > 4


def test_what_is_wrong_with_evaluate_is_said_in_a_line(model: nn.Module) -> None:
    def raising(module: nn.Module) -> float:
        return 1 / 0

    def interrupted(module: nn.Module) -> float:
        raise KeyboardInterrupt

    def wrong_shape(module: nn.Module) -> float:
        return float(module(INPUTS[:, :2]).sum())

    cases: list[tuple[Any, str]] = [
        (raising, r"evaluate raised ZeroDivisionError: division by zero \(test_searching.py:\d+\) on the original network"),
        (wrong_shape, "evaluate raised RuntimeError: .*channels"),
        (lambda module: float("nan"), "'accuracy' of the original network is nan"),
        (lambda module: {"iou": "high"}, "no number"),
        (lambda module: None, "returned None"),
    ]
    for evaluate, message in cases:
        with pytest.raises(EvaluationError, match=message) as caught:
            fxprune.search(model, INPUTS, evaluate, config=config())
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(KeyboardInterrupt):
        fxprune.search(model, INPUTS, interrupted, config=config())


def test_what_evaluate_returns_becomes_metrics() -> None:
    assert metrics_of(0.5) == {"accuracy": 0.5}
    assert metrics_of({"miou": 0.25}) == {"miou": 0.25, "accuracy": 0.25}
    wrong: list[object] = [{}, None]
    for given in wrong:
        with pytest.raises(EvaluationError):
            metrics_of(given)


@pytest.mark.parametrize("suffix", [".html", ".svg", ".txt", ".dot", ".graphml"])
def test_visualize_writes_the_format_of_the_suffix(model: nn.Module, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"graph{suffix}"
    fxprune.visualize(model, INPUTS, file=file)
    assert "stem" in file.read_text(encoding="utf-8")


def test_visualize_prints_every_group(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    graph = fxprune.analyze(model, INPUTS)
    fxprune.visualize(graph)
    printed = capsys.readouterr().out
    assert all(group.name in printed for group in graph.groups)


def test_visualize_of_a_slim_module_shows_what_it_is_now(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    graph = fxprune.analyze(model, INPUTS)
    group = next(one for one in graph.groups if one.prunable)
    slim = fxprune.compress(graph, {group.name: 0.5})
    left, gone = group.size - group.size // 2, group.size // 2
    fxprune.visualize(slim)
    printed = capsys.readouterr().out
    assert f"{group.name}  {left}/{left} units, {gone} removed" in printed
    assert "removed" not in printed.replace(f"{left}/{left} units, {gone} removed", "")


@pytest.mark.parametrize("suffix", [".html", ".txt", ".dot", ".graphml"])
def test_visualize_makes_the_folder_or_says_that_it_cannot(model: nn.Module, tmp_path: Path, suffix: str) -> None:
    fxprune.visualize(model, INPUTS, file=tmp_path / "new" / f"graph{suffix}")
    assert (tmp_path / "new" / f"graph{suffix}").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="cannot write the .* to .*; choose a folder that can be written"):
        fxprune.visualize(model, INPUTS, file=tmp_path / "file" / f"graph{suffix}")


def test_visualize_refuses_a_suffix_it_does_not_know(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(fxprune.FxPruneError, match="suffix"):
        fxprune.visualize(model, INPUTS, file=tmp_path / "graph.xyz")


def test_a_rough_evaluation_judges_all_but_the_finalists(model: nn.Module) -> None:
    asked = {"rough": 0, "full": 0}

    def counting(name: str) -> Evaluate:
        def evaluate(module: nn.Module) -> float:
            asked[name] += 1
            return weight_left(module)

        return evaluate

    options = config(tolerance=0.05, rounds=4, finalists=2)
    found = fxprune.search(model, INPUTS, counting("full"), config=options, rough=counting("rough"))
    assert 3 <= asked["full"] <= 4  # the two baselines and the finalists, one of which the uniform allocation may be
    assert found.evaluations == sum(asked.values())
    asked.update(rough=0, full=0)
    fxprune.search(model, INPUTS, counting("full"), config=config(tolerance=0.05), rough=counting("rough"))
    assert asked["rough"] == 0


@pytest.mark.parametrize("labelled", [True, False])
def test_norms_alone_are_recovered_after_the_repair_and_come_nearer_to_the_original(model: nn.Module, labelled: bool) -> None:
    drawn = torch.Generator().manual_seed(1)
    inputs = [torch.randn(8, 3, 8, 8, generator=drawn) for _ in range(8)]
    batches = [(x, torch.zeros(8, dtype=torch.int64)) for x in inputs] if labelled else inputs
    options = {"strategy": "uniform", "importance": "l2", "tolerance": 0.05}
    plain, found = (
        fxprune.search(model, INPUTS, weight_left, config=config(recover=recover, recover_epochs=8, **options), calibration=batches).model
        for recover in ("none", "norms")
    )
    before, after = plain.state_dict(), found.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and all(after[name].ndim <= 1 and "running" not in name for name in moved)
    with torch.no_grad():
        apart = [sum(float(unlike(slim(x), model(x), None)) for x in inputs) for slim in (plain, found)]
    assert apart[1] < apart[0]
    fit, held = halves(batches)
    assert len(fit) == 7 and len(held) == 1 and all(one is not held[0] for one in fit) and halves(batches[:1]) == (batches[:1], batches[:1])
    near = nearness(model, held)
    assert near(found) > near(plain) and near(model) == pytest.approx(0, abs=1e-6)
    assert any("trained for 8 epochs" in note for note in fxprune.record(found).notes)


def test_outputs_that_are_no_class_scores_are_recovered_by_their_squared_error() -> None:
    assert float(unlike(torch.ones(3, 1), torch.zeros(3, 1), None)) == 1.0
    assert float(unlike({"logits": torch.eye(3)}, {"logits": torch.eye(3)}, None)) == pytest.approx(0)
    with pytest.raises(fxprune.FxPruneError, match="recover is 'some'; it must be one of none, norms"):
        fxprune.SearchConfig(recover="some")


def test_a_search_from_a_table_begins_with_what_compress_comes_to(model: nn.Module) -> None:
    batches = list(torch.randn(6, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    graph = fxprune.analyze(model, INPUTS)
    policy = allocate(graph, {"macs": 0.5}, batches, trials=TRIALS, seed=0)
    problem, candidates = make_problem(graph, weight_left, calibration=batches, repair="lstsq", tabled="must")
    assert problem.tried is not None
    removed = problem.tried({"macs": 0.5})
    assert removed is not None and candidates.policy(removed, {}, "auto").sparsity == policy.sparsity
    assert problem.tried({"latency": 0.5}) is None  # no table bounds that
