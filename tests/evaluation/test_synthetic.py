"""Calibration inputs that are made without data."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import EvaluationError, InputError
from fxprune.evaluation.synthetic import without_labels
from fxprune.passes.verify import difference


class Small(nn.Module):
    """Trained for a moment on inputs that are far from noise: smooth, and never below zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(12), nn.BatchNorm2d(12)])
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.first(x)))
        y: Tensor = self.head(F.relu(self.norms[1](self.second(x))).mean((2, 3)))
        return y


def images(count: int, seed: int) -> Tensor:
    drawn = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return 3 * F.interpolate(drawn, (6, 6), mode="bilinear")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = Small().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(40):
        x = images(64, step)
        label = 2 * (x[:, 0].mean((1, 2)) > 1.5).long() + (x[:, 1].mean((1, 2)) > 1.5).long()
        optimizer.zero_grad()
        F.cross_entropy(model(x), label).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


def read(model: nn.Module, batch: Tensor) -> float:
    """How far the means that BatchNorm layers read are from those they keep, in deviations."""
    gaps: list[Tensor] = []

    def note(norm: Any, args: tuple[Tensor, ...]) -> None:
        gaps.append(((args[0].mean((0, 2, 3)) - norm.running_mean) / norm.running_var.sqrt()).abs().mean())

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return float(torch.stack(gaps).mean())


def test_batch_norms_read_what_they_keep(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = fxprune.synthetic_batches(model, images(2, 0), 96, batch_size=64, steps=40)
    noise = fxprune.synthetic_batches(model, images(2, 0), 96, batch_size=64, steps=0)
    assert [tuple(batch.shape) for batch in made] == [(64, 3, 6, 6), (32, 3, 6, 6)] == [tuple(batch.shape) for batch in noise]
    for one, other in zip(made, noise, strict=True):
        assert read(model, one) < 0.2 * read(model, other) and not one.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and not model.training
    assert all(p.requires_grad and p.grad is None and not m._forward_pre_hooks for m in model.modules() for p in m.parameters())


def test_a_seed_gives_the_same_inputs(model: nn.Module) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (fxprune.synthetic_batches(model, images(2, 0), 8, steps=3, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("policy", [0.5, "macs=0.4"])
def test_repair_on_them_is_better_than_none(model: nn.Module, policy: Any) -> None:
    x = images(64, 1000)

    def error(**more: Any) -> float:
        slim = fxprune.compress(model, policy, x[:2], **more)
        with torch.no_grad():
            return difference(model(x), slim(x))

    assert error(calibration="none", repair="lstsq") < 0.6 * error(repair="none")
    slim = fxprune.compress(model, 0.5, x[:2], calibration="none", repair="bn")
    assert fxprune.record(slim).policy.options["importance"] == "l2" and fxprune.record(slim).repair == "bn"
    assert fxprune.record(fxprune.compress(fxprune.analyze(model, x[:2]), 0.5, calibration="none")).repair == "none"


def test_searches_and_steps_take_them(model: nn.Module) -> None:
    x = images(2, 0)
    config = fxprune.SearchConfig(targets=("macs=0.6",), strategy="table", repair="bn", tolerance=0.2)
    found = fxprune.search(model, x, lambda slim: 1.0, config=config, calibration="none")
    assert fxprune.record(found.model).repair == "bn"
    done = fxprune.shrink(model, 0.5, lambda slim: None, x, steps=1, calibration="none", repair="lstsq")
    assert fxprune.record(done.model).repair == "lstsq"


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = self.head((self.words(ids) * mask.unsqueeze(2)).mean(1) * scale)
        return y


def test_other_inputs_are_drawn() -> None:
    example = {"ids": torch.tensor([[1, 2, 3]]), "mask": torch.tensor([[1, 1, 0]]), "scale": torch.ones(1, 1)}
    (batch,) = fxprune.synthetic_batches(Words().eval(), example, 200, batch_size=200)
    assert batch["ids"].shape == (200, 3) and set(batch["ids"].flatten().tolist()) == set(range(50))
    assert set(batch["mask"].flatten().tolist()) == {0, 1} and batch["scale"].shape == (200, 1) and float(batch["scale"].std()) > 0.5


def test_several_positional_inputs_come_by_name() -> None:
    example = (torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long), torch.ones(1, 1))
    made = fxprune.synthetic_batches(Words().eval(), example, 20, batch_size=4)
    assert [[*batch] for batch in made] == [["ids", "mask", "scale"]] * 5
    slim = fxprune.compress(Words().eval(), {"words": 0.5}, example, calibration="none", repair="lstsq")
    assert fxprune.record(slim).repair == "lstsq" and slim(*example).shape == (1, 2)

    class Unnamed(nn.Linear):
        def forward(self, *inputs: Tensor) -> Tensor:
            return super().forward(inputs[0] + inputs[1])

    with pytest.raises(InputError, match="pass the example inputs as a dict"):
        fxprune.synthetic_batches(Unnamed(3, 2), (torch.ones(1, 3), torch.ones(1, 3)), 4)


def test_what_cannot_be_is_said(model: nn.Module) -> None:
    x = images(2, 0)
    with pytest.raises(InputError, match="1 or more"):
        fxprune.synthetic_batches(model, x, 0)
    with pytest.raises(InputError, match="batch as their first axis"):
        fxprune.synthetic_batches(model, torch.tensor(1.0))
    with pytest.raises(EvaluationError, match="pass calibration data"):
        fxprune.synthetic_batches(model, x[:, :2], 4)
    with pytest.raises(InputError, match=re.escape('"none" for inputs that are made without data')):
        fxprune.compress(model, 0.5, x, calibration="nothing")

    class Cut(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    with pytest.raises(EvaluationError, match="no gradient reaches the inputs"):
        fxprune.synthetic_batches(Cut().eval(), x, 4)


def test_the_ranking_needs_no_labels() -> None:
    assert without_labels("auto", "none", "lstsq") == "reconstruction" and without_labels("auto", "none", "bn") == "l2"
    assert without_labels("l1", "none", "bn") == "l1" and without_labels("auto", [torch.ones(1)], "bn") == "auto"
    assert without_labels("auto", "data", "bn") == "auto"
