"""Importances, repairs and export formats of the user's own: registered, passed, or named by their path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.cli import arguments
from fxprune.cli.arguments import read
from fxprune.errors import DependencyError, ExportError, InputError, PolicyError
from fxprune.exporting.formats import Job
from fxprune.importance.registry import RankingData
from fxprune.passes.coupling.graph import CouplingGraph

pytestmark = pytest.mark.usefixtures("registries")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(96, 2)).eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
DATA = [(X, torch.tensor([0, 1, 0, 1]))]


def last_first(graph: CouplingGraph, data: RankingData) -> dict[str, Any]:
    """The units with the highest numbers go first."""
    return {g.name: np.arange(g.size)[::-1].copy() for g in graph.groups if g.prunable}


def loudness(graph: CouplingGraph, data: RankingData) -> dict[str, Any]:
    return {"0": torch.arange(8.0) + len(data.batches)}


LAST = fxprune.Criterion("last-first", last_first, needs_values=False)
LOUD = fxprune.Criterion("loudness", loudness, needs_data=True)


def kept(slim: nn.Module, name: str = "0.weight") -> list[int]:
    return list(fxprune.record(slim).kept[name][0].tolist())


def test_a_registered_criterion_is_known_by_its_name_everywhere(model: nn.Module, tmp_path: Path) -> None:
    assert fxprune.register_criterion(LAST) is LAST and fxprune.register_criterion(LAST) is LAST
    slim = fxprune.compress(model, 0.5, X, importance="last-first")
    assert kept(slim) == [0, 1, 2, 3]
    record = fxprune.record(slim)
    assert record.policy.options["importance"] == "last-first"
    record.policy.save(tmp_path / "policy.json")
    assert kept(fxprune.compress(model, tmp_path / "policy.json")) == [0, 1, 2, 3]
    request = read(["--importance", "last-first"])
    assert request.options is not None and request.options.search.importance == "last-first"


def test_a_criterion_need_not_be_registered(model: nn.Module) -> None:
    slim = fxprune.compress(model, 0.5, X, importance=LAST)
    assert kept(slim) == [0, 1, 2, 3]
    assert fxprune.record(slim).policy.options["importance"] == "callable:last-first"


def test_groups_that_a_criterion_leaves_out_go_by_l2(model: nn.Module) -> None:
    slim = fxprune.compress(model, 0.5, X, importance=LOUD, calibration=DATA)
    assert kept(slim) == [4, 5, 6, 7]
    assert kept(slim, "3.weight") == kept(fxprune.compress(model, 0.5, X, importance="l2"), "3.weight")


def test_what_a_criterion_lacks_or_gives_wrong_is_said(model: nn.Module) -> None:
    with pytest.raises(InputError, match='importance "loudness" needs calibration data'):
        fxprune.compress(model, 0.5, X, importance=LOUD)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))
    assert kept(fxprune.compress(empty, 0.5, X.to("meta"), importance=LAST)) == [0, 1, 2, 3]
    with pytest.raises(InputError, match="on the meta device"):
        fxprune.compress(empty, 0.5, X.to("meta"), importance=fxprune.Criterion("x", last_first))
    wrongs: tuple[tuple[Any, str], ...] = (
        (lambda graph, data: {"0": [1.0]}, "importance 'w' gave 1 scores for group '0'; it must give 8"),
        (lambda graph, data: {"nowhere": [1.0]}, "gave scores for 'nowhere', which is no group"),
        (lambda graph, data: {"0": [float("nan")] * 8}, "finite"),
        (lambda graph, data: [1.0], "gave a list; it must give a mapping"),
    )
    for wrong, message in wrongs:
        with pytest.raises(PolicyError, match=message):
            fxprune.compress(model, 0.5, X, importance=fxprune.Criterion("w", wrong))


def test_names_are_taken_once() -> None:
    with pytest.raises(InputError, match="the name is taken"):
        fxprune.register_criterion(fxprune.Criterion("l2", last_first))
    for name in ("auto", "a:b", ""):
        with pytest.raises(InputError, match="is not a name"):
            fxprune.register_criterion(fxprune.Criterion(name, last_first))
    with pytest.raises(InputError, match="the name is taken"):
        fxprune.register_repair("bn", lambda slim, batches: None)
    with pytest.raises(InputError, match="a word without a colon"):
        fxprune.register_repair("a:b", lambda slim, batches: None)
    with pytest.raises(InputError, match="the name is taken"):
        fxprune.register_format("onnx", fxprune.Format(".x", write_state))
    with pytest.raises(InputError, match=r"its suffix '\.onnx' is that of 'onnx'"):
        fxprune.register_format("mine", fxprune.Format(".onnx", write_state))
    with pytest.raises(InputError, match="must begin with a dot"):
        fxprune.register_format("mine", fxprune.Format("x", write_state))


USERS = """
import numpy as np, torch, fxprune
def rank(graph, data):
    return {g.name: np.arange(g.size) for g in graph.groups if g.prunable}
def by_group(group, module):
    return torch.arange(group.size)
def twice(slim, batches):
    slim.get_parameter("6.bias").mul_(2)
    return f"doubled on {len(batches)} batches"
CRITERION = fxprune.Criterion("users", rank)
NUMBER = 3
FORMAT = fxprune.Format(".users", lambda job, path: path.write_text("x"))
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_registry.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_registry", raising=False)
    return "users_registry"


@pytest.mark.parametrize("name", ["CRITERION", "by_group"])
def test_an_importance_by_its_path(model: nn.Module, users: str, name: str) -> None:
    path = f"{users}:{name}"
    slim = fxprune.compress(model, 0.5, X, importance=path)
    assert kept(slim) == [4, 5, 6, 7] and fxprune.record(slim).policy.options["importance"] == path
    config = fxprune.SearchConfig(targets="macs=0.7", strategy="uniform", importance=path, repair="none", tolerance=0.2)
    found = fxprune.search(model, X, lambda m: 1.0, config=config)
    assert found.policy.options["importance"] == path and kept(found.model)[-1] == 7
    assert kept(fxprune.compress(model, found.policy)) == kept(found.model)  # the units are in it
    again = fxprune.Policy({"0": 0.5}, found.policy.inputs, {"importance": path})
    with pytest.raises(PolicyError, match=f"was made with importance '{path}'; pass it as importance= again"):
        fxprune.compress(model, again)  # a file's word is not imported
    assert kept(fxprune.compress(model, again, importance=path)) == [4, 5, 6, 7]


def test_a_path_that_is_no_importance(model: nn.Module, users: str) -> None:
    with pytest.raises(InputError, match="is an int; it must be a Criterion or"):
        fxprune.compress(model, 0.5, X, importance=f"{users}:NUMBER")


def test_a_callable_importance_is_recorded_by_its_name(model: nn.Module) -> None:
    """It used to be recorded as "l2"."""

    def rank(group: Any, module: nn.Module) -> Any:
        return torch.arange(group.size)

    config = fxprune.SearchConfig(targets="macs=0.7", strategy="uniform", importance=rank, repair="none", tolerance=0.2)
    found = fxprune.search(model, X, lambda m: 1.0, config=config)
    assert str(found.policy.options["importance"]).startswith("callable:") and "rank" in found.policy.options["importance"]
    shrunk = fxprune.shrink(model, 0.5, lambda slim: None, X, steps=2, importance=rank)
    assert "rank" in fxprune.record(shrunk.model).policy.options["importance"]


def twice(slim: nn.Module, batches: Any) -> str:
    slim.get_parameter("6.bias").mul_(2)
    return f"doubled on {len(batches)} batches"


def test_a_repair_by_name_function_and_path(model: nn.Module, users: str) -> None:
    fxprune.register_repair("twice", twice)
    bias = model.state_dict()["6.bias"].clone()
    for repair, name in (("twice", "twice"), (twice, "callable:twice"), (f"{users}:twice", f"{users}:twice")):
        slim = fxprune.compress(model, 0.5, X, repair=repair, calibration=DATA)
        record = fxprune.record(slim)
        assert record.repair == name and "doubled on 1 batches" in record.notes
        assert torch.equal(slim.state_dict()["6.bias"], 2 * bias)
    assert torch.equal(model.state_dict()["6.bias"], bias)
    config = fxprune.SearchConfig(targets="macs=0.7", strategy="uniform", repair=twice, tolerance=0.2)
    found = fxprune.search(model, X, lambda m: 1.0, config=config, calibration=DATA)
    assert fxprune.record(found.model).repair == "callable:twice" and torch.equal(found.model.state_dict()["6.bias"], 2 * bias)
    with pytest.raises(InputError, match='repair="twice" needs calibration data'):
        fxprune.compress(model, 0.5, X, repair="twice")


def test_what_a_repair_does_wrong_is_said(model: nn.Module) -> None:
    def renames(slim: nn.Module, batches: Any) -> None:
        slim.register_buffer("new", torch.zeros(1))

    def explodes(slim: nn.Module, batches: Any) -> None:
        slim.get_parameter("6.bias").fill_(float("inf"))

    def fails(slim: nn.Module, batches: Any) -> None:
        raise ValueError

    for repair, message in (
        (renames, "changed the form of 'new'"),
        (explodes, "left '6.bias' with values that are not finite"),
        (fails, "raised ValueError: no message"),
    ):
        with pytest.raises(InputError, match=message):
            fxprune.compress(model, 0.5, X, repair=repair, calibration=DATA)
    with pytest.raises(InputError, match=r"choose one of none, bn, bias, lstsq, joint, or pass a function"):
        fxprune.compress(model, 0.5, X, repair="nothing", calibration=DATA)


def write_state(job: Job, path: Path) -> None:
    torch.save(job.program(), path)


def write_program(job: Job, path: Path) -> None:
    torch.export.save(job.program(), path)


def run_program(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    return [torch.export.load(str(path)).module()(*inputs)]


def test_a_format_of_ones_own(model: nn.Module, tmp_path: Path, users: str) -> None:
    fxprune.register_format("mine", fxprune.Format(".mine.pt2", write_program, run_program))
    slim = fxprune.compress(model, 0.5, X)
    done = fxprune.export(slim, tmp_path / "slim.mine.pt2", verify=True)
    assert done.format == "mine" and done.difference is not None and done.difference < 1e-4
    done = fxprune.export(slim, tmp_path / "slim.users", f"{users}:FORMAT")
    assert done.path.read_text() == "x" and done.difference is None
    assert fxprune.export(slim, tmp_path / "other.users").format == f"{users}:FORMAT"  # known from then on
    with pytest.raises(InputError, match="cannot run its files here, so there is nothing to verify"):
        fxprune.export(slim, tmp_path / "slim.users", verify=True)
    request = read(["--export", f"mine,{users}:FORMAT"])
    assert request.options is not None and request.options.export == ("mine", f"{users}:FORMAT")
    with pytest.raises(InputError, match="is an int; it must be a fxprune.Format"):
        fxprune.export(slim, tmp_path / "slim.x", f"{users}:NUMBER")


def test_a_format_that_needs_what_is_not_there_or_writes_something_else(model: nn.Module, tmp_path: Path) -> None:
    slim = fxprune.compress(model, 0.5, X)
    fxprune.register_format("absent", fxprune.Format(".absent", write_program, writes=("surely_not_there",)))
    with pytest.raises(DependencyError, match="export to absent needs surely_not_there: pip install surely_not_there"):
        fxprune.export(slim, tmp_path / "slim.absent")
    fxprune.register_format("fails", fxprune.Format(".fails", write_state, lambda path, inputs: [inputs[0]]))
    with pytest.raises((ExportError, fxprune.VerificationError)):
        fxprune.export(slim, tmp_path / "slim.fails")
    assert not list(tmp_path.glob("slim.*"))


def test_help_lists_the_built_in_ones() -> None:
    assert "auto, taylor, l2, l1, variance, random, reconstruction" in arguments.HELP["importance"]
    assert "none, bn, bias, lstsq" in arguments.HELP["repair"]
    assert "torch, onnx, openvino, executorch, torch-int8, onnx-int8, openvino-int8" in arguments.HELP["export"]
