"""``explain``: what is locked, why, and what to do about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.cli.command import main
from fxprune.models.small import digits_net
from fxprune.report.explaining import OTHERWISE, advice

GOLDEN = Path(__file__).parent / "passes" / "golden"


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


def test_every_reason_in_the_golden_reports_has_advice_of_its_own() -> None:
    reasons = {m.group(1) for path in GOLDEN.glob("*.txt") for m in re.finditer(r"locked: (.*)", path.read_text(encoding="utf-8"))}
    assert len(reasons) > 20
    plain = sorted(r for r in reasons if advice(r) == OTHERWISE)
    whole = ("slides along it", "sampl", "fills a whole tensor", "a diagonal", "runs along", "mixed", "index of a maximum")
    assert all(any(w in r for w in whole) for r in plain), plain


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--explain", "--out", str(tmp_path / "none")]) == 0
    assert "groups of channels can be pruned" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    assert main(["--explain", "--report", str(tmp_path)]) == 2
