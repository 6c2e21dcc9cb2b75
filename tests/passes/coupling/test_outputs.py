"""``outputs=``: what keeps its width of what a model returns; the rest comes out narrower, and is right as far as it is there."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError

torch.manual_seed(0)
X = torch.randn(2, 5, 8)


class Pair(NamedTuple):
    logits: Tensor
    hidden: Any


@dataclass
class Record:
    logits: Tensor
    hidden: Any = None


class Cache:
    def __init__(self, kept: Any) -> None:
        self.kept = kept


class Net(nn.Module):
    def __init__(self, result: Callable[[Tensor, list[Tensor]], Any]) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)
        self.result = result

    def forward(self, x: Tensor) -> Any:
        first = self.embed(x)
        second = first + self.down(self.up(first).relu())
        return self.result(self.head(second), [first, second])


FORMS: dict[str, tuple[Callable[[Tensor, list[Tensor]], Any], Any]] = {
    "dict": (lambda y, h: {"logits": y, "hidden": h}, "logits"),
    "ordered": (lambda y, h: OrderedDict(hidden=tuple(h), logits=y), ["logits"]),
    "tuple": (lambda y, h: (y, *h), 0),
    "last": (lambda y, h: (*h, y), [-1]),
    "list": (lambda y, h: [h, y], [1]),
    "named tuple": (lambda y, h: Pair(y, tuple(h)), ["logits"]),
    "dataclass": (lambda y, h: Record(y, tuple(h)), "logits"),
    "by place in a dict": (lambda y, h: {"logits": y, "hidden": h}, [0]),
    "object beside it": (lambda y, h: (y, Cache(h)), [0]),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_the_rest_comes_out_narrower(form: str) -> None:
    result, outputs = FORMS[form]
    model = Net(result).eval()
    assert not any(g.prunable for g in fxprune.analyze(model, X).groups if g.name in ("embed", "down"))
    graph = fxprune.analyze(model, X, outputs=outputs)
    assert {g.name for g in graph.groups if g.prunable} == {"embed", "up"}
    assert any("returned with fewer channels" in note for note in graph.notes)
    slim = fxprune.compress(model, 0.5, X, outputs=outputs, verify=True)
    kept = fxprune.record(slim).kept["embed.weight"][0]
    logits, hidden = _parts(form, slim(X))
    reference = Net(lambda y, h: (y, h)).eval()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, dims in fxprune.record(slim).kept.items():
            for dim, indices in dims.items():
                gone = [i for i in range(reference.get_parameter(name).shape[dim]) if i not in indices.tolist()]
                reference.get_parameter(name).index_fill_(dim, torch.tensor(gone), 0)
    wanted, states = reference(X)
    assert torch.allclose(logits, wanted, atol=1e-5)
    for mine, theirs in zip(hidden, states, strict=True):
        assert torch.allclose(mine, theirs[..., kept], atol=1e-5)


def _parts(form: str, found: Any) -> tuple[Tensor, Any]:
    if isinstance(found, dict):
        return found["logits"], found["hidden"]
    if hasattr(found, "logits"):
        return found.logits, found.hidden
    if form == "list":
        return found[1], found[0]
    if form == "object beside it":
        return found[0], found[1].kept
    return (found[-1], found[:-1]) if form == "last" else (found[0], found[1:])


def test_a_channel_that_a_wanted_output_shares_stays() -> None:
    model = Net(lambda y, h: {"logits": y, "state": h[1], "hidden": h}).eval()
    groups = {g.name: g for g in fxprune.analyze(model, X, outputs=["logits", "state"]).groups}
    assert not groups["embed"].prunable and "it reaches the network's output" in groups["embed"].reason and groups["up"].prunable


def test_it_goes_with_the_policy_the_file_and_the_graph(tmp_path: Path) -> None:
    model = Net(FORMS["dict"][0]).eval()
    graph = fxprune.analyze(model, X, outputs="logits")
    assert graph.options["outputs"] == ["logits"]
    policy = fxprune.Policy.uniform(graph, 0.5)
    policy.save(tmp_path / "policy.json")
    slim = fxprune.compress(model, tmp_path / "policy.json")
    assert slim(X)["hidden"][0].shape[-1] == 8
    assert torch.equal(fxprune.compress(graph, policy)(X)["logits"], slim(X)["logits"])
    fxprune.save(slim, tmp_path / "slim.safetensors")
    again = fxprune.load(tmp_path / "slim.safetensors", Net(FORMS["dict"][0]))
    assert torch.equal(again.eval()(X)["hidden"][1], slim(X)["hidden"][1])
    assert fxprune.record(again).policy.options["outputs"] == ["logits"]
    with pytest.raises(InputError, match="analysed with other outputs"):
        fxprune.compress(graph, 0.5, X, outputs=["hidden"])


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (["logit"], "outputs names 'logit', which the model does not return; it returns logits, hidden"),
        ([2], "outputs names 2"),
        ([], "outputs is empty"),
        ([0.5], "outputs holds a float"),
    ],
)
def test_a_wrong_name_is_refused(outputs: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fxprune.analyze(Net(FORMS["dict"][0]).eval(), X, outputs=outputs)


def test_outputs_that_are_all_named_change_nothing() -> None:
    model = Net(FORMS["dict"][0]).eval()
    graph = fxprune.analyze(model, X, outputs=["logits", "hidden"])
    assert [g.reason for g in graph.groups] == [g.reason for g in fxprune.analyze(model, X).groups] and not graph.notes


def test_it_holds_in_training_mode_with_an_output_of_its_own() -> None:
    class Aux(Net):
        def forward(self, x: Tensor) -> Any:
            first = self.embed(x)
            logits = self.head(first + self.down(self.up(first).relu()))
            return {"logits": logits, "aux": self.up(first)} if self.training else {"logits": logits}

    model = Aux(FORMS["dict"][0]).train()
    slim = fxprune.compress(model, 0.5, X, outputs=["logits"])
    assert slim(X)["aux"].shape[-1] == 12 and slim(X)["logits"].shape[-1] == 4
    assert set(slim.eval()(X)) == {"logits"}
    assert pickle.dumps(fxprune.record(slim))
