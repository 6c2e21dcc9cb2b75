"""All weights moved together after the layers were fitted one by one."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.repair import together
from fxprune.repair.distance import unlikeness
from fxprune.repair.splitting import FIT, JUDGE, Piece
from fxprune.repair.together import Together, move_together

CPU = torch.device("cpu")


class Net(nn.Module):
    """A residual network; ``detached``: nothing of its output reaches the weights."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body, self.back = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.back(F.relu(self.body(x))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y.detach() if self.detached else y


def images(count: int, seed: int, size: int = 16) -> list[Tensor]:
    return list(torch.randn(count * size, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).split(size))


def net(**options: bool) -> Net:
    torch.manual_seed(0)
    found = Net(**options)
    with torch.no_grad():
        for batch in images(8, 5):
            found.train()(batch)
    return found.eval()


def pair() -> tuple[nn.Module, Net, list[Piece]]:
    """A network and another near it, and inputs of which the last judge."""
    original = net()
    other = copy.deepcopy(original)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return original, other, [Piece(x, len(x), JUDGE if i > 5 else FIT) for i, x in enumerate(images(8, 1))]


def off(slim: nn.Module, original: nn.Module) -> float:
    unseen = torch.cat(images(8, 9))
    with torch.no_grad():
        return unlikeness([slim(unseen)], [original(unseen)])


def run(original: nn.Module) -> Any:
    return torch.no_grad()(original)


def test_the_outputs_come_nearer_and_all_else_stays_as_it_was() -> None:
    model, calibration = net(), images(10, 1)
    sliced = fxprune.compress(model, 0.6, calibration[0], calibration=calibration, repair="lstsq")
    policy = fxprune.record(sliced).policy
    slim, again = (fxprune.compress(model, policy, calibration=calibration, repair="joint") for _ in range(2))
    assert off(slim, model) < 0.9 * off(sliced, model)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in slim.state_dict().items())
    statistics = [name for name, _ in slim.named_buffers()]
    assert statistics and all(torch.equal(slim.state_dict()[name], sliced.state_dict()[name]) for name in statistics)
    assert all(p.requires_grad and p.grad is None for p in (*slim.parameters(), *model.parameters()))
    made = fxprune.record(slim)
    assert made.repair == "joint" and made.repaired
    assert any(note.startswith("repair moved all layers together") for note in made.notes)


def test_frozen_parameters_stay_frozen() -> None:
    original, other, pieces = pair()
    other.head.requires_grad_(False)
    assert isinstance(move_together(other, run(original), pieces, CPU), Together)
    assert not other.head.weight.requires_grad and other.stem.weight.requires_grad


@pytest.mark.parametrize("spoilt", ["all", "a step"])
def test_steps_that_lead_nowhere_are_taken_back(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, other, pieces = pair()
    before = copy.deepcopy(other.state_dict())
    monkeypatch.setattr(together, "STEPS", (1e4, 1e3) if spoilt == "all" else (1e4, 0.01))
    made = move_together(other, run(original), pieces, CPU)
    assert isinstance(made, Together) and made.kept == (spoilt == "a step")
    assert made.kept or all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_what_is_no_better_beyond_chance_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    original, other, pieces = pair()
    before = copy.deepcopy(other.state_dict())
    monkeypatch.setattr(together, "SURE", math.inf)
    made = move_together(other, run(original), pieces, CPU)
    assert isinstance(made, Together) and made.after < made.before and not made.kept
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_network_without_gradients_keeps_what_was_fitted() -> None:
    model, calibration = net(detached=True), images(10, 1)
    fitted, slim = (
        fxprune.compress(model, 0.4, calibration[0], importance="l2", calibration=calibration, repair=repair)
        for repair in ("lstsq", "joint")
    )
    assert all(torch.equal(value, fitted.state_dict()[name]) for name, value in slim.state_dict().items())
    assert any("moved no layers together: the network cannot be differentiated" in note for note in fxprune.record(slim).notes)


def test_half_precision_moves_by_less_than_its_own_steps() -> None:
    original, other, pieces = pair()
    original, other = original.bfloat16(), other.bfloat16()
    halves = [Piece(piece.inputs.bfloat16(), piece.samples, piece.role) for piece in pieces]
    made = move_together(other, run(original), halves, CPU)
    assert isinstance(made, Together) and made.kept and made.after < 0.9 * made.before


def test_outputs_that_are_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original, other, pieces = pair()
    twin, calls = copy.deepcopy(other), []

    def counted(inputs: Any) -> Any:
        calls.append(1)
        with torch.no_grad():
            return original(inputs)

    move_together(other, counted, pieces, CPU)
    assert len(calls) == len(pieces)
    monkeypatch.setattr(together, "HELD", 0)
    move_together(twin, counted, pieces, CPU)
    assert len(calls) > 3 * len(pieces)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in other.state_dict().items())


def test_candidates_of_a_search_are_fitted_alone_and_its_result_moves() -> None:
    model, calibration = net(), images(10, 1)
    seen: list[int] = []
    moved = together.move_together

    def score(slim: nn.Module) -> float:
        seen.append(1)
        return -off(slim, model)

    config = fxprune.SearchConfig(targets=("macs=0.5",), strategy="table", repair="joint")
    with pytest.MonkeyPatch.context() as patched:
        calls: list[int] = []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(len(seen))
            return moved(*args, **kwargs)

        patched.setattr("fxprune.repair.repairer.move_together", counted)
        found = fxprune.search(model, calibration[0], score, config=config, calibration=calibration)
    assert calls == [found.evaluations] == [len(seen)]
    assert fxprune.record(found.model).repair == "joint"
    assert any("layers together" in note for note in fxprune.record(found.model).notes)
