"""From policy to kept units: counts, rounding, names, files, importance, attention, ignore."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, PolicyError
from fxprune.policies import units_removed
from tests.passes.helpers import assert_oracle, call, prime, pruned
from tests.passes.zoo.networks import ZOO


def network(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    inputs = ZOO[name].inputs()
    return prime(ZOO[name].make(), inputs), inputs


# -- counts -------------------------------------------------------------------------------------------------------------------


def test_units_removed_is_exact_for_every_fraction_of_up_to_256_units() -> None:
    for n in range(1, 257):
        for k in range(n + 1):
            assert units_removed(k / n, n) == min(k, n - 1), (k, n)


@pytest.mark.parametrize(("k", "n"), [(61, 112), (29, 100), (57, 100), (1023, 2048)])
def test_units_removed_does_not_lose_a_unit_to_rounding(k: int, n: int) -> None:
    assert units_removed(k / n, n) == k
    assert units_removed(float(Fraction(k, n)), n) == k


def test_61_of_112_units_go_from_a_real_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 112), nn.ReLU(), nn.Linear(112, 2))
    slim = fxprune.compress(model, {"0": 61 / 112}, torch.randn(2, 4))
    assert slim.get_parameter("0.weight").shape == (51, 4)
    assert len(fxprune.record(slim).removed_units["0"]) == 61


def test_a_sparsity_of_one_leaves_one_unit() -> None:
    model, inputs = network("chain")
    slim = fxprune.compress(model, 1.0, inputs)
    assert slim.get_parameter("a.0.weight").shape[:2] == (1, 1)
    with torch.no_grad():
        assert torch.isfinite(slim(*inputs)).all()


@pytest.mark.parametrize("policy", [0.0, 0, {}, {"a.0": 0.0}])
def test_a_policy_of_zero_keeps_all_bit_for_bit(policy: Any) -> None:
    model, inputs = network("residual")
    slim = fxprune.compress(model, policy, inputs)
    assert not fxprune.record(slim).kept and not fxprune.record(slim).removed_units
    with torch.no_grad():
        assert torch.equal(slim(*inputs), model(*inputs))


# -- round_to -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [2, 4, 8])
@pytest.mark.parametrize("name", ["concat", "grouped", "split_uneven", "attention_fused_computed", "unet", "dense_block"])
def test_every_pruned_dimension_keeps_a_multiple(name: str, multiple: int) -> None:
    model, inputs = network(name)
    slim = fxprune.compress(model, 0.6, inputs, round_to=multiple)
    rec = fxprune.record(slim)
    for parameter, dims in rec.kept.items():
        for dim, kept in dims.items():
            assert len(kept) % multiple == 0, (parameter, dim, len(kept))
    with torch.no_grad():
        slim(*inputs)


def test_rounding_gives_units_back_and_takes_none() -> None:
    model, inputs = network("unet")
    plain, rounded = (fxprune.record(fxprune.compress(model, 0.5, inputs, round_to=r)).removed_units for r in (1, 4))
    assert all(len(rounded[name]) <= len(plain[name]) for name in rounded)
    assert all(set(units.tolist()) <= set(plain[name].tolist()) for name, units in rounded.items())
    assert rounded


def test_rounding_up_to_the_original_width_keeps_all() -> None:
    model, inputs = network("chain")
    with pytest.warns(fxprune.PruningWarning, match="round_to=64 rounds every width up"):
        slim = fxprune.compress(model, 0.3, inputs, round_to=64)
    assert not fxprune.record(slim).kept and "round_to=64" in fxprune.record(slim).notes[-1]


@pytest.mark.parametrize("bad", [0, -2])
def test_round_to_must_be_positive(bad: int) -> None:
    model, inputs = network("chain")
    with pytest.raises(InputError, match="round_to"):
        fxprune.compress(model, 0.3, inputs, round_to=bad)


# -- names --------------------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    model, inputs = network("chain")
    with pytest.raises(PolicyError, match=r"'a\.O'.*'a\.0'"):
        fxprune.compress(model, {"a.O": 0.5}, inputs)


def test_a_locked_name_is_refused_with_its_reason() -> None:
    model, inputs = network("chain")
    with pytest.raises(PolicyError, match=r"'head' cannot be pruned: it reaches the network's output"):
        fxprune.compress(model, {"head": 0.5}, inputs)
    assert not fxprune.record(fxprune.compress(model, {"head": 0.0}, inputs)).kept


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan, True, "0.5"])
def test_a_sparsity_out_of_range_is_refused(bad: Any) -> None:
    model, inputs = network("chain")
    with pytest.raises(PolicyError):
        fxprune.compress(model, {"a.0": bad}, inputs)


def test_groups_left_out_keep_all() -> None:
    model, inputs = network("chain")
    rec = fxprune.record(fxprune.compress(model, {"a.0": 0.5}, inputs))
    assert set(rec.removed_units) == {"a.0"}
    assert set(rec.kept) == {"a.0.weight", "a.1.weight", "a.1.bias", "a.1.running_mean", "a.1.running_var", "b.0.weight"}


# -- files --------------------------------------------------------------------------------------------------------------------


def test_a_policy_file_gives_the_same_slim_network(tmp_path: Path) -> None:
    model, inputs = network("unet")
    graph = fxprune.analyze(model, inputs)
    policy = fxprune.Policy.uniform(graph, 0.4)
    policy.save(tmp_path / "policy.json")
    loaded = fxprune.Policy.load(tmp_path / "policy.json")
    assert loaded == policy
    want = fxprune.compress(model, policy, inputs)
    for given in (loaded, tmp_path / "policy.json", str(tmp_path / "policy.json")):
        got = fxprune.compress(model, given)  # the inputs' form is recorded
        assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters(), strict=True))


def test_a_policy_carries_its_options() -> None:
    """What the group names depend on travels with the policy."""
    model, inputs = network("attention_fused_literal")
    graph = fxprune.analyze(model, inputs, ignore=["front"], attention="heads")
    slim = fxprune.compress(model, fxprune.Policy.uniform(graph, 0.5))
    rec = fxprune.record(slim)
    assert rec.policy.options["attention"] == "heads" and list(rec.policy.options["ignore"]) == ["front"]
    assert len(rec.removed_units["qkv"]) == 2 and "front.weight" not in rec.kept
    again = fxprune.compress(model, rec.policy)
    assert all(torch.equal(a, b) for a, b in zip(slim.parameters(), again.parameters(), strict=True))


# -- importance ---------------------------------------------------------------------------------------------------------------


def rows(model: nn.Module, inputs: Any, **options: Any) -> list[int]:
    rec = fxprune.record(fxprune.compress(model, {"a.0": 0.5}, inputs, **options))
    kept: list[int] = rec.kept["a.0.weight"][0].tolist()
    return kept


def test_the_lowest_scores_go_first() -> None:
    model, inputs = network("chain")

    def even_first(group: Any, module: nn.Module) -> Tensor:
        assert module is model
        return torch.tensor([i % 2 for i in range(group.size)], dtype=torch.float32)

    assert rows(model, inputs, importance=even_first) == [1, 3, 5, 7, 9]


def test_equal_scores_go_in_order() -> None:
    model, inputs = network("chain")
    assert rows(model, inputs, importance=lambda group, _: torch.zeros(group.size)) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("given", [torch.zeros(3), torch.full((10,), math.nan)])
def test_scores_that_do_not_fit_are_refused(given: Tensor) -> None:
    model, inputs = network("chain")
    with pytest.raises(PolicyError, match="importance"):
        fxprune.compress(model, {"a.0": 0.5}, inputs, importance=lambda group, _: given if group.name == "a.0" else torch.zeros(group.size))


@pytest.mark.parametrize("importance", ["l1", "l2", "auto"])
def test_small_weights_go_first(importance: str) -> None:
    model, inputs = network("chain")
    small = [0, 4, 5, 8, 9]
    with torch.no_grad():
        for name, dim in (("a.0.weight", 0), ("b.0.weight", 1), ("a.1.weight", 0), ("a.1.bias", 0)):
            model.get_parameter(name).index_fill_(dim, torch.tensor(small), 1e-4)
    assert rows(model, inputs, importance=importance) == [1, 2, 3, 6, 7]


def test_variance_spares_what_varies() -> None:
    model, inputs = network("chain")
    with torch.no_grad():
        for name, dim in (("a.0.weight", 0), ("b.0.weight", 1), ("a.1.weight", 0), ("a.1.bias", 0)):
            model.get_parameter(name).index_fill_(dim, torch.tensor([0, 1, 2, 3, 4]), 5.0)
    assert rows(model, inputs, importance="variance") == [5, 6, 7, 8, 9]


def test_random_importance_repeats_itself() -> None:
    model, inputs = network("chain")
    assert rows(model, inputs, importance="random") == rows(model, inputs, importance="random")


def test_taylor_spares_what_the_loss_depends_on() -> None:
    """Channels whose consumer's weights are next to zero have next to no gradient, however large their own weights are."""
    model, inputs = network("chain")
    dead = [1, 3, 5, 7, 9]
    with torch.no_grad():
        model.get_parameter("b.0.weight").index_fill_(1, torch.tensor(dead), 1e-9)
        model.get_parameter("a.0.weight").index_fill_(0, torch.tensor(dead), 9.0)
    assert rows(model, inputs, importance="l2") == dead
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))) for _ in range(2)]
    before = copy.deepcopy(model.state_dict())
    assert rows(model, inputs, importance="taylor", calibration=batches) == [0, 2, 4, 6, 8]
    assert rows(model, inputs, calibration=batches) == [0, 2, 4, 6, 8]  # auto: taylor where there is data
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_taylor_without_data_and_unknown_names_are_refused() -> None:
    model, inputs = network("chain")
    with pytest.raises(InputError, match="calibration"):
        fxprune.compress(model, 0.5, inputs, importance="taylor")
    with pytest.raises(PolicyError, match="magic"):
        fxprune.compress(model, 0.5, inputs, importance="magic")


# -- attention ----------------------------------------------------------------------------------------------------------------

DIALECTS = [
    "attention_fused_literal",
    "attention_fused_computed",
    "attention_fused_chunk",
    "attention_heads_first",
    "attention_separate",
    "attention_einsum",
    "attention_folded",
    "attention_causal_sdpa",
    "attention_masked",
    "attention_relative_table",
    "attention_grouped_expand",
    "attention_grouped_repeat",
    "mha_self",
    "mha_cross",
]


@pytest.mark.parametrize("axis", ["heads", "head_dim"])
@pytest.mark.parametrize("name", DIALECTS)
def test_attention_goes_by_the_axis_that_is_asked_for(name: str, axis: str) -> None:
    model, inputs = network(name)
    graph = fxprune.analyze(model, inputs, attention=axis)
    inner = [g for g in graph.groups if g.prunable and g.name.partition("[")[0].partition("#")[0] in ("qkv", "q", "k", "v", "kv", "mha")]
    want = {"heads": 2 if "grouped" in name else 4, "head_dim": 5}[axis]
    assert inner and {g.size for g in inner} == {want}, [(g.name, g.size) for g in graph.groups]
    policy = {g.name: 0.5 for g in graph.groups if g.prunable}
    slim = fxprune.compress(model, policy, inputs, attention=axis)
    rec = fxprune.record(slim).kept
    with torch.no_grad():
        got = call(slim, inputs)
        assert got.shape == call(model, inputs).shape and torch.isfinite(got).all()
    assert rec
    assert_oracle(model, graph, policy, inputs, slim.eval(), fxprune.record(slim))


def test_an_unknown_axis_is_refused() -> None:
    model, inputs = network("mha_self")
    with pytest.raises(InputError, match="attention"):
        fxprune.analyze(model, inputs, attention="both")


# -- ignore -------------------------------------------------------------------------------------------------------------------


def test_ignore_takes_names_globs_and_modules() -> None:
    model, inputs = network("concat")
    for ignore in (["a.0"], ["a.*"], [model.get_submodule("a.0")], ["a.0", "b*"]):
        graph = fxprune.analyze(model, inputs, ignore=ignore)
        group = next(g for g in graph.groups if ("a.0.weight", 0) in [m[:2] for m in g.members])
        assert not group.prunable and "ignore" in group.reason
        free = {g.name: 0.5 for g in graph.groups if g.prunable}
        assert free and ("b.0" in free) == ("b*" not in ignore)
        slim = fxprune.compress(model, 0.5, inputs, ignore=ignore)
        assert slim.get_parameter("a.0.weight").shape[0] == 7 and slim.get_parameter("a.0.weight").shape[1] == 6
        assert_oracle(model, graph, free, inputs, slim.eval(), fxprune.record(slim))


def test_ignore_of_what_is_not_there_is_refused() -> None:
    model, inputs = network("concat")
    for ignore in (["zebra*"], [nn.Linear(2, 2)]):
        with pytest.raises(InputError, match="ignore"):
            fxprune.analyze(model, inputs, ignore=ignore)


def test_compressing_a_slim_network_again_refers_to_the_first_original() -> None:
    model, inputs = network("unet")
    once = fxprune.compress(model, 0.3, inputs)
    twice = fxprune.compress(once, 0.3, inputs)
    rec = fxprune.record(twice)
    theirs = dict(twice.named_parameters())
    for name, p in model.named_parameters():
        whole = p
        for dim, kept in rec.kept.get(name, {}).items():
            whole = whole.index_select(dim, kept)  # type: ignore[assignment]
        assert torch.equal(whole, theirs[name]), name
    graph = fxprune.analyze(model, inputs)
    for name, units in rec.removed_units.items():
        assert len(units.unique()) == len(units) and int(units.max()) < graph.by_name[name].size
    pruned(model, graph, {g.name: 0.3 for g in graph.groups if g.prunable}, inputs)
