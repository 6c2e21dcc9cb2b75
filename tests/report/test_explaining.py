"""``explain``: what is locked, why, and what to do about it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxprune
from fxprune.cli.command import main
from fxprune.models.small import digits_net, resnet20
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.report.explaining import OTHERWISE, advice
from fxprune.searching import problem

AS_IT_MUST = {ReasonKind.INPUT, ReasonKind.OUTPUT, ReasonKind.SINGLE_UNIT, ReasonKind.STRUCTURE}


@torch.library.custom_op("fxprune_tests::resemblance", mutates_args=())
def resemblance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum()


@resemblance.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(())


class Odd(nn.Module):
    """One pair of layers meets an operation that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 10), nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(self.c(x).relu()), torch.ops.fxprune_tests.resemblance(self.a(x)[0], self.b(x)[0])


def test_says_what_can_go_and_what_is_locked() -> None:
    found = fxprune.explain(Odd(), torch.randn(3, 6))
    assert (found.groups, found.prunable) == (7, 1)
    assert any("resemblance" in name for name in found.unknown)
    (lock,) = (x for x in found.locks if "resemblance" in x.reason)
    assert lock.groups == ("a", "b") and lock.channels == 16
    assert "register_op" in lock.advice
    text = str(found)
    assert "1 of 7 groups of channels can be pruned" in text
    assert text.index("register_op") < text.index("Locked, as it must be")
    assert "it reaches the network's output (head)" in text


def test_shares_are_those_of_compress() -> None:
    model, x = digits_net().eval(), torch.randn(1, 1, 8, 8)
    found = fxprune.explain(model, x)
    made = fxprune.record(fxprune.compress(model, 0.5, x))
    assert found.params_left == pytest.approx(made.after.params / made.before.params)
    assert found.macs_left == pytest.approx(made.after.macs / made.before.macs)


def test_a_graph_is_explained_without_analysis_and_ignore_is_a_reason() -> None:
    model, x = digits_net().eval(), torch.randn(1, 1, 8, 8)
    whole = fxprune.explain(model, x)
    assert str(fxprune.explain(fxprune.analyze(model, x))) == str(whole)
    first = next(g.name for g in fxprune.analyze(model, x).groups if g.prunable)
    asked = fxprune.explain(model, x, ignore=[first])
    assert asked.prunable == whole.prunable - 1
    assert any("ignore=" in lock.advice and first in lock.groups for lock in asked.locks)


def test_advice_goes_by_the_kind_of_a_reason_not_by_its_words() -> None:
    given = Reason(ReasonKind.INPUT, "it comes from the network's input 'x'", name="x")
    part = Reason(ReasonKind.INPUT, "it comes from the input 'x' of 'body'", name="x", part="body")
    met = Reason(ReasonKind.COMPUTED, "it comes from could_not_be_traced")
    assert advice(Reason(ReasonKind.FIXED_SIZE, "the layer reads channels of fixed size", because=given)) == ""
    assert "torch.export" in advice(Reason(ReasonKind.FIXED_SIZE, "the layer reads channels of fixed size", because=part))
    assert "in brackets" in advice(Reason(ReasonKind.FIXED_SIZE, "it meets a tensor of fixed size", because=met))
    assert advice(Reason(ReasonKind.OPERATION, "a window slides along it", operation="ignore", where="net.py:3")) == OTHERWISE
    assert all(advice(Reason(kind, "")) for kind in ReasonKind if kind not in AS_IT_MUST)
    assert not any(advice(Reason(kind, "")) for kind in AS_IT_MUST)


def test_a_reason_is_its_text_and_keeps_its_data_when_copied() -> None:
    given = Reason(ReasonKind.INPUT, "it comes from x", name="x")
    reason = Reason(ReasonKind.FIXED_SIZE, "it meets a fixed size", operation="add", where="net.py:7", because=given)
    assert reason == "it meets a fixed size (it comes from x) at add (net.py:7)"
    assert reason.general == "it meets a fixed size (it comes from x)"
    for twin in (copy.deepcopy(reason), pickle.loads(pickle.dumps(reason))):
        assert twin == reason and twin.kind is reason.kind and twin.root.name == "x" and twin.where == "net.py:7"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--explain", "--out", str(tmp_path / "none")]) == 0
    assert "groups of channels can be pruned" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    assert main(["--explain", "--report", str(tmp_path)]) == 2


def test_the_command_line_explains_the_network_it_names_by_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It used to take the weights of whatever run lay in the folder, and to pass over options of the analysis."""
    monkeypatch.chdir(tmp_path)
    kept = Path("fxprune-out") / "checkpoint" / "original.safetensors"
    kept.parent.mkdir(parents=True)
    save_file({"another.network": torch.zeros(2)}, kept)
    assert main(["--explain"]) == 0
    assert "groups of channels can be pruned" in capsys.readouterr().out
    given: dict[str, object] = {}

    def analyze(model: nn.Module, *inputs: object, **options: object) -> CouplingGraph:
        given.update(options)
        return fxprune.analyze(model, *inputs, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(problem, "analyze", analyze)
    assert main(["--explain", "--norms", "exact", "--experts", "--blocks"]) == 0
    assert (given["norms"], given["experts"], given["blocks"]) == ("exact", True, True)


def test_blocks_are_told_of_where_they_were_looked_for() -> None:
    found = fxprune.explain(fxprune.analyze(resnet20(), torch.randn(1, 3, 32, 32), blocks=True))
    assert "7 of 7 blocks can be left out: layer1.0, layer1.1, layer1.2, layer2.1 and 3 more." in str(found)
    some = replace(found, blocks={"a": "", "b": "its input has another form"})
    assert "1 of 2 blocks can be left out: a." in str(some) and "b: its input has another form" in str(some).partition("have to stay")[2]
    assert "blocks" not in str(replace(found, blocks={}))
