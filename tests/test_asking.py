"""What users type: keys of a policy, ``most``, ``ignore``, what a record remembers, and the warning where little or nothing was removed."""

from __future__ import annotations

import copy
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, PolicyError, SearchError, UnsupportedError
from fxprune.evaluation.wrappers import unwrapped


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.down(self.norm(self.up(x)).relu())
        return x + added


class Net(nn.Module):
    """A stem, two residual blocks and a head: groups stem, blocks.0.up and blocks.1.up go; the head is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.Sequential(Block(12, 16), Block(12, 20))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return scores


X = torch.randn(2, 3, 8, 8)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def removed(model: nn.Module, policy: Any, **options: Any) -> dict[str, int]:
    """Units that went, by group."""
    return {name: len(units) for name, units in fxprune.record(fxprune.compress(model, policy, X, **options)).removed_units.items()}


# -- the keys of a policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "gone"),
    [
        ({"blocks.0.up": 0.5}, {"blocks.0.up": 8}),
        ({"blocks.1": 0.5}, {"stem": 6, "blocks.1.up": 10}),  # a module: all that its layers produce, the shared stream with it
        ({"blocks.1.down": 0.5}, {"stem": 6}),  # a member layer of a group that is named after another
        ({"blocks.0.norm": 0.5}, {"blocks.0.up": 8}),  # a norm produces nothing: the group that it belongs to
        ({"*.up": 0.25}, {"blocks.0.up": 4, "blocks.1.up": 5}),
        ({"*.down": 0.25}, {"stem": 3}),  # a glob over modules
        ({"*": 0.5, "stem": 0}, {"blocks.0.up": 8, "blocks.1.up": 10}),
        ({"blocks.0.up": 0, "blocks": 0.5, "*": 0.75}, {"stem": 6, "blocks.1.up": 10}),  # group, then module, then glob, in any order
        ({"blocks.1": 0.25, "blocks": 0.5}, {"stem": 3, "blocks.0.up": 8, "blocks.1.up": 5}),  # the innermost module
        ({"*.up": 0.5, "blocks.[1]*": 0.25}, {"stem": 3, "blocks.0.up": 8, "blocks.1.up": 5}),  # of globs the one written last
    ],
)
def test_keys_are_groups_modules_and_globs(policy: dict[str, float], gone: dict[str, int], tmp_path: Path) -> None:
    assert removed(net(), policy) == gone
    (tmp_path / "policy.json").write_text(json.dumps({"sparsity": policy}))
    assert removed(net(), tmp_path / "policy.json") == gone


def test_a_module_that_feeds_several_groups_names_them_all() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.a, self.b = nn.Linear(4, 20), nn.Linear(8, 3), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.both(x).relu()
            mixed: Tensor = self.a(y[:, :8]) + self.b(y[:, 8:])
            return mixed

    slim = fxprune.compress(Parts().eval(), {"both": 0.5}, torch.randn(2, 4))
    assert {name: len(units) for name, units in fxprune.record(slim).removed_units.items()} == {"both[0:8]": 4, "both[8:20]": 6}


def test_a_key_that_names_nothing_says_what_is_near() -> None:
    with pytest.raises(PolicyError, match=r"'blocks\.0\.upp' names no group .*; did you mean group 'blocks\.0\.up'.* or module"):
        fxprune.compress(net(), {"blocks.0.upp": 0.5}, X)
    with pytest.raises(PolicyError, match=r"'blocs\.\*' matches no group or module of this model; did you mean"):
        fxprune.compress(net(), {"blocs.*": 0.5}, X)
    with pytest.raises(PolicyError, match=r"'Zzz' .*visualize"):
        fxprune.compress(net(), {"Zzz": 0.5}, X)


def test_a_module_without_a_group_to_prune_is_refused_and_a_glob_passes_over_what_is_locked() -> None:
    with pytest.raises(PolicyError, match=r"no group of module 'blocks\.0' can be pruned: the user asked to leave it alone"):
        fxprune.compress(net(), {"blocks.0": 0.5}, X, ignore="blocks.*")
    assert removed(net(), {"*": 0.5}, ignore="stem") == {"blocks.0.up": 8, "blocks.1.up": 10}


def test_shrinking_takes_the_same_keys() -> None:
    done = fxprune.shrink(net(), {"*.up": 0.5}, lambda slim: None, X, steps=2)
    assert {name: len(units) for name, units in fxprune.record(done.model).removed_units.items()} == {"blocks.0.up": 8, "blocks.1.up": 10}


# -- most ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "gone"),
    [
        (0.5, {"stem": 6, "blocks.0.up": 8, "blocks.1.up": 10}),
        ({"blocks.0": 0.25}, {"stem": 3, "blocks.0.up": 4, "blocks.1.up": 18}),
        ({"*": 0.75, "*.up": 0.25}, {"stem": 9, "blocks.0.up": 4, "blocks.1.up": 5}),
        ({"stem": 0}, {"blocks.0.up": 14, "blocks.1.up": 18}),
    ],
)
def test_no_group_loses_more_than_its_limit(most: Any, gone: dict[str, int]) -> None:
    assert removed(net(), 0.9, most=most) == gone
    rounded = removed(net(), 0.9, most=most, round_to=4)
    assert all(count <= gone[name] for name, count in rounded.items()) and rounded


@pytest.mark.parametrize(
    ("bad", "words"), [(1.5, "every group is 1.5"), ({"stem": -1}, "'stem' is -1"), ({"zebra": 0.5}, "the key 'zebra' of most names no")]
)
def test_a_limit_that_is_none_is_refused(bad: Any, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        fxprune.compress(net(), 0.5, X, most=bad)


# -- ignore -------------------------------------------------------------------------------------------------------------------


def test_a_string_of_ignore_is_one_name() -> None:
    """Read letter by letter, "stem" would be the modules s, t, e and m."""
    layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(13))).eval()
    graph = fxprune.analyze(layers, torch.randn(2, 6), ignore="11")
    assert [g.name for g in graph.groups if "ignore" in g.reason] == ["11"]
    assert removed(net(), 0.5, ignore="blocks.*.up") == {"stem": 6}


@pytest.mark.parametrize("ignore", [nn.Linear, [nn.Linear], (nn.Linear, "stem")])
def test_ignore_takes_classes(ignore: Any) -> None:
    head = (nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 2))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)
    if isinstance(ignore, tuple):
        with pytest.raises(InputError, match="ignore names 'stem'"):
            fxprune.analyze(model, X, ignore=ignore)
        return
    slim = fxprune.compress(model.eval(), 0.5, X, ignore=ignore)
    rec = fxprune.record(slim)
    assert set(rec.removed_units) == {"0"} and rec.policy.options["ignore"] == ["4", "6"]
    assert set(fxprune.record(fxprune.compress(model, rec.policy)).removed_units) == {"0"}
    with pytest.raises(InputError, match="ignore names LSTM, which"):
        fxprune.analyze(model, X, ignore=nn.LSTM)


def test_one_module_may_stand_alone() -> None:
    model = net()
    assert removed(model, 0.5, ignore=model.blocks[0]) == {"blocks.1.up": 10}


# -- what is recorded, and what is asked of a graph ---------------------------------------------------------------------------


def test_round_to_1_overrides_a_policy_that_says_8() -> None:
    policy = fxprune.Policy({"blocks.1.up": 0.5}, options={"round_to": 8})
    assert removed(net(), policy) == {"blocks.1.up": 4}
    assert removed(net(), policy, round_to=1) == {"blocks.1.up": 10}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out, self.head = nn.Linear(10, 12), nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (y.unflatten(-1, (3, -1)).transpose(1, 2) for y in self.qkv(x).split(12, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        head: Tensor = self.head(x + self.out(mixed))
        return head


def test_a_graphs_own_options_are_recorded_and_its_file_loads(tmp_path: Path) -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 10)
    graph = fxprune.analyze(model, x, attention="heads", ignore=["embed"])
    slim = fxprune.compress(graph, 0.5)
    assert fxprune.record(slim).policy.options["attention"] == "heads" and fxprune.record(slim).policy.options["ignore"] == ["embed"]
    fxprune.save(slim, tmp_path / "slim.safetensors")
    again = fxprune.load(tmp_path / "slim.safetensors", model)
    assert torch.equal(again(x), slim(x))


def test_what_a_graph_was_not_analysed_with_is_refused() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 10)
    graph = fxprune.analyze(model, x, attention="heads", ignore=["embed"])
    with pytest.raises(InputError, match="analysed with attention='heads'"):
        fxprune.compress(graph, 0.5, attention="head_dim")
    with pytest.raises(InputError, match="another ignore"):
        fxprune.compress(graph, 0.5, ignore="out")
    fxprune.compress(graph, 0.5, attention="heads", ignore=model.embed)


def by_rank(group: Any, module: nn.Module) -> Tensor:
    return torch.arange(group.size, dtype=torch.float32)


def test_a_callable_importance_is_recorded_by_its_name() -> None:
    slim = fxprune.compress(net(), 0.5, X, importance=by_rank)
    assert fxprune.record(slim).policy.options["importance"] == "callable:by_rank"
    with pytest.raises(PolicyError, match="with the function 'by_rank' as importance; pass it as importance= again"):
        fxprune.compress(net(), fxprune.record(slim).policy)
    again = fxprune.compress(net(), fxprune.record(slim).policy, importance=by_rank)
    assert torch.equal(again(X), slim(X))


def test_a_search_records_a_callable_importance_and_chooses_its_units_again() -> None:
    config = fxprune.SearchConfig(strategy="uniform", importance=by_rank, repair="none")
    result = fxprune.search(net(), X, lambda slim: 0.5, config=config)
    assert result.policy.options["importance"] == "callable:by_rank"
    again = fxprune.compress(net(), result.policy)
    assert torch.equal(again(X), result.model.eval()(X))


def test_a_dict_is_no_config_of_a_search() -> None:
    config: Any = {"targets": "macs=0.5"}
    with pytest.raises(SearchError, match="config is a dict; pass fxprune.SearchConfig"):
        fxprune.search(net(), X, lambda slim: 0.5, config=config)


# -- wrappers -----------------------------------------------------------------------------------------------------------------


def test_wrappers_are_seen_through() -> None:
    model = net()
    compiled: Any = torch.compile(model, backend="eager")
    for wrapped in (nn.DataParallel(model), compiled, nn.DataParallel(compiled)):
        assert unwrapped(wrapped) is model
        slim = fxprune.compress(wrapped, 0.5, X)
        assert slim.get_parameter("stem.weight").shape[0] == 6
        assert fxprune.record(nn.DataParallel(slim)) is fxprune.record(slim)
        recompiled: Any = torch.compile(slim, backend="eager")
        assert fxprune.record(recompiled) is fxprune.record(slim)


def test_a_module_of_the_users_with_an_attribute_named_module_is_no_wrapper() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            doubled: Tensor = 2 * self.module(x)
            return doubled

    holder = Holder()
    assert unwrapped(holder) is holder


# -- the warning --------------------------------------------------------------------------------------------------------------


def test_a_policy_that_removes_nothing_warns_and_says_why() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"policy": 0.01}, r"no group loses a whole unit at this sparsity \('blocks.1.up' has 20\)"),
        ({"policy": 0.5, "round_to": 64}, "round_to=64 rounds every width up"),
        ({"policy": 0.5, "most": 0.0}, "most= leaves every group whole"),
        ({"policy": 0.5, "ignore": ["stem", "blocks"]}, r"all groups it names are locked: the largest are .*\(ignore\).*fxprune\.explain"),
        ({"policy": {"*": 0.5}, "ignore": ["*"]}, "all groups it names are locked: "),
    ]
    for options, words in cases:
        with pytest.warns(fxprune.PruningWarning, match=words) as caught:
            slim = fxprune.compress(net(), example_inputs=X, **options)
        assert not fxprune.record(slim).kept
        (text,) = {str(w.message) for w in caught}
        assert fxprune.record(slim).notes[-1] == text


class Locked(nn.Module):
    """Wide layers whose channels are sorted, and a narrow one that can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.wider, self.narrow, self.head = nn.Linear(8, 40), nn.Linear(40, 60), nn.Linear(60, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.narrow(self.wider(self.wide(x).sort(1).values).sort(1).values))
        return head


def test_most_of_the_network_locked_warns_with_the_largest_parts() -> None:
    words = r"9% can go, the others are locked: the largest are 'wider' \(60 channels: .*\); 'wide' \(40"
    with pytest.warns(fxprune.PruningWarning, match=words):
        slim = fxprune.compress(Locked().eval(), 0.5, torch.randn(2, 8))
    assert slim.get_parameter("narrow.weight").shape[0] == 5 and "'wider' (60 channels" in fxprune.record(slim).notes[-1]


def test_what_was_left_alone_on_purpose_does_not_warn() -> None:
    removed(net(), 0.5, ignore=["*.up"])  # pytest makes warnings errors
    removed(net(), {"blocks.0.up": 0.5})
    removed(net(), {"*": 0.0})
    removed(net(), 0.9, most=0.1)
    model = copy.deepcopy(net())
    fxprune.compress(fxprune.analyze(model, X), {})


# -- what is no name, no number, no list ---------------------------------------------------------------------------------------


def test_modules_and_their_classes_are_keys_as_their_names_are() -> None:
    model = net()
    assert removed(model, {model.blocks[0]: 0.5}) == removed(model, {"blocks.0": 0.5})
    assert removed(model, {model.blocks[1].up: 0.5}) == {"blocks.1.up": 10}
    assert removed(model, {Block: 0.5}) == removed(model, {"blocks.0": 0.5, "blocks.1": 0.5})
    assert removed(model, {"blocks.0.up": 0.5, model.stem: 0.25}) == {"stem": 3, "blocks.0.up": 8}
    assert removed(model, 0.5, most={model.blocks[1]: 0.25}) == removed(model, 0.5, most={"blocks.1": 0.25})
    with pytest.raises(PolicyError, match="is a Linear, which is no module of this model"):
        removed(model, {nn.Linear(3, 3): 0.5})
    with pytest.raises(PolicyError, match="is the class GRU, which is no module of this model"):
        removed(model, {nn.GRU: 0.5})


def test_numbers_of_numpy_are_numbers() -> None:
    assert removed(net(), np.float32(0.5)) == removed(net(), 0.5) == removed(net(), np.float64(0.5))
    assert removed(net(), {"stem": np.float32(0.5)}) == {"stem": 6}
    assert removed(net(), 0.5, round_to=np.int64(8)) == removed(net(), 0.5, round_to=8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ignore": 3}, "ignore is an int; it takes modules, classes of modules, names and globs"),
        ({"round_to": 7.5}, "round_to is 7.5; it must be a whole number"),
        ({"calibration": X}, "calibration is a Tensor; pass batches: a list"),
        ({"calibration": {"x": X}}, "calibration is a dict; pass batches: a list"),
        ({"calibration": 3}, "calibration is a int; pass batches: a list"),
        ({"calibration": [X], "loss": 3}, "loss is an int; pass a function"),
        ({"importance": lambda group, module: None}, "the importance callable gave None for group 'stem'"),
        ({"outputs": ["logits"]}, "outputs names 'logits', which the model does not return; it returns one tensor"),
        ({"outputs": [1]}, "outputs names 1, which the model does not return; it returns one tensor"),
    ],
)
def test_what_is_no_such_thing_is_said_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises((InputError, PolicyError), match=re.escape(said)) as raised:
        removed(net(), 0.5, **options)
    assert "\n" not in str(raised.value)


def test_the_one_tensor_that_is_returned_keeps_its_width_by_its_place() -> None:
    assert removed(net(), 0.5, outputs=[0]) == removed(net(), 0.5) == removed(net(), 0.5, outputs=-1)
    assert removed(net(), 0.5, ignore=None) == removed(net(), 0.5)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_a_scripted_model_is_refused_in_one_line(make: Any) -> None:
    with pytest.raises(UnsupportedError, match="compiled by torch.jit, and cannot be traced; pass the module it was made of"):
        fxprune.compress(make(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))), 0.5, X)


# -- policy files that were edited by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"options": {"round-to": 8}}, "unknown option 'round-to' in the policy; did you mean round_to?"),
        ({"options": {"units": "x"}}, r"the policy's option units is 'x'; it maps group names to units"),
        ({"options": {"units": {"stem": "0-900"}}}, "has '0-900' for group 'stem'; write ascending numbers from 0 to 11"),
        ({"options": {"units": {"stem": "5,3"}}}, "has '5,3' for group 'stem'; write ascending"),
        ({"options": {"units": {"stem": 3.5}}}, "has 3.5 for group 'stem'; write ascending"),
        ({"options": {"units": {"sten": "0-2"}}}, "names 'sten', which is no group of this model; did you mean stem?"),
        ({"inputs": {"tuple": 5}}, "recorded inputs are malformed: 'tuple' holds an int; it must hold a list"),
    ],
)
def test_an_edit_that_would_be_ignored_is_refused(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    (tmp_path / "policy.json").write_text(json.dumps({"sparsity": {"stem": 0.3}, **data}))
    with pytest.raises((PolicyError, InputError), match=message) as caught:
        fxprune.compress(net(), tmp_path / "policy.json", None if "inputs" in data else X)
    assert "\n" not in str(caught.value)


def test_units_are_used_again_unless_the_sparsity_was_edited(tmp_path: Path) -> None:
    units = {"importance": "l2", "units": {"stem": "0-2"}}
    kept = {p: fxprune.record(fxprune.compress(net(), fxprune.Policy({"stem": p}, options=units), X)).removed_units for p in (0.25, 0.5)}
    assert kept[0.25]["stem"].tolist() == [0, 1, 2] and len(kept[0.5]["stem"]) == 6
    with pytest.raises(PolicyError, match="unknown option 'grain' in the policy; there are attention, blocks"):
        fxprune.compress(net(), fxprune.Policy({"stem": 0.5}, options={"grain": 1}), X)


def test_a_policy_that_json_cannot_hold_and_one_nested_too_deeply(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="its inputs, options and meta must hold only what JSON has") as caught:
        fxprune.Policy({}, meta={"a": object()}).save(tmp_path / "policy.json")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    (tmp_path / "policy.json").write_text("[" * 100_000)
    with pytest.raises(PolicyError, match="nested too deeply|not JSON"):
        fxprune.Policy.load(tmp_path / "policy.json")


def test_a_sparsity_of_numpys_or_a_fraction_counts() -> None:
    assert removed(net(), np.float32(0.5)) == removed(net(), Fraction(1, 2)) == removed(net(), 0.5)
