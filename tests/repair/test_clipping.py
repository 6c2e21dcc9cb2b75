"""Fits behind ReLUs: which layers they are for, and that what counts is what passes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxprune
from fxprune.repair import fitting, repairer
from fxprune.repair.clipping import Clipped, Rows
from fxprune.repair.layers import layers_of
from fxprune.repair.least_squares import Fit, Moments, fitted
from fxprune.repair.splitting import FIT, JUDGE, TUNE

INFINITE = float("inf")


class Clips(nn.Module):
    """Layers in front of activations of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f, self.g, self.h, self.i = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(9))
        self.norm, self.norm6 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.relu6, self.drop = nn.ReLU(inplace=True), nn.ReLU6(), nn.Dropout(0.5)
        self.weight, self.shift = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.drop(self.norm(self.a(x))))
        x = F.relu6(x + self.b(x))
        x = self.relu6(self.norm6(self.c(x)))
        x = torch.relu(self.d(x)) + self.e(x)
        y = self.f(x)
        x = y.relu() + y
        x = F.gelu(self.g(x)) + self.h(x).relu()
        x = self.i(x).relu_()
        z: Tensor = (x.mean((2, 3)) @ self.weight.t() + self.shift).relu()
        return z


def test_layers_know_the_clip_that_alone_reads_them() -> None:
    traced = fx.symbolic_trace(Clips().eval())
    clips = {one.path: one.clip for one in layers_of(traced, traced.graph)}
    relu, relu6 = (0.0, INFINITE), (0.0, 6.0)
    wanted = {"a": relu, "b": relu6, "c": relu6, "d": relu, "e": None, "f": None, "g": None, "h": relu, "i": relu}
    assert clips == wanted | {"weight": relu}


def halves(x: Tensor, p: Tensor, r: Tensor, beside: Tensor | None) -> list[Rows]:
    third = x.shape[1] // 3
    cut = [slice(i * third, (i + 1) * third) for i in range(3)]
    roles = zip((FIT, TUNE, JUDGE), cut, strict=True)
    return [(role, x[:, s], p[:, s], r[:, s], None if beside is None else beside[:, s]) for role, s in roles]


def plain_fit(rows: list[Rows]) -> tuple[Fit, list[Moments]]:
    folds = [Moments() for _ in range(3)]
    for role, x, p, r, _ in rows:
        folds[role].add(x, p, r)
    return fitted(folds, 1.0, takes_shift=True, refit=True), folds


def passed(rows: list[Rows], fit: Fit, bounds: tuple[float, float], gain: Tensor, constant: Tensor) -> float:
    """The squared error behind the clip on the rows that judge."""
    assert fit.change is not None and fit.shift is not None
    role, x, p, r, beside = rows[-1]
    still = constant if beside is None else constant + beside
    now = p + x @ fit.change.float().transpose(1, 2) + fit.shift.float().unsqueeze(1)
    wanted, given = ((gain * t + still).clamp(*bounds) for t in (p + r, now))
    return float((wanted - given).square().sum((0, 2)).mean())


@pytest.mark.parametrize("bounds", [(0.0, INFINITE), (0.0, 6.0)])
@pytest.mark.parametrize("added", [False, True])
def test_what_is_clipped_does_not_count(bounds: tuple[float, float], added: bool) -> None:
    """The responses are those of a ReLU's inputs with something below zero that no weight explains."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3000, 6, generator=drawn)
    true = torch.randn(2, 3, 6, generator=drawn) * 3
    gain = torch.tensor([0.5, -2.0, 1.0]).reshape(1, 1, 3).expand(2, 1, 3)
    constant = torch.tensor([0.1, 0.0, -0.5]).reshape(1, 1, 3).expand(2, 1, 3)
    beside = torch.randn(2, 3000, 3, generator=drawn) if added else None
    still = constant if beside is None else constant + beside
    seen = gain * (x @ true.transpose(1, 2)) + still
    noise = 8 * torch.rand(seen.shape, generator=drawn)
    seen = torch.where(seen < 0, seen - noise, torch.where(seen > bounds[1], seen + noise, seen))
    p = 0.5 * x @ true.transpose(1, 2)
    rows = halves(x, p, (seen - still) / gain - p, beside)
    plain, folds = plain_fit(rows)
    calls = 0

    def again() -> Iterator[Rows]:
        nonlocal calls
        calls += 1
        yield from rows

    found = Clipped(bounds, gain, constant).fit(plain, folds, again)
    before, after = (passed(rows, fit, bounds, gain, constant) for fit in (plain, found))
    assert found.clipped and after < 0.75 * before and 1 < calls <= 5
    assert found.after == pytest.approx(after, rel=1e-3) and found.after < found.before and found.after < found.energy
    assert plain.ridge == found.ridge


def test_where_nothing_is_clipped_the_fit_stays() -> None:
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(1, 600, 5, generator=drawn)
    r = x @ torch.randn(1, 5, 2, generator=drawn) + torch.randn(1, 600, 2, generator=drawn)
    rows = halves(x, torch.zeros_like(r), r, None)
    plain, folds = plain_fit(rows)
    found = Clipped((0.0, INFINITE), torch.ones(()), torch.tensor(100.0)).fit(plain, folds, lambda: rows)
    assert found.change is not None and plain.change is not None
    torch.testing.assert_close(found.change, plain.change, atol=1e-4, rtol=1e-4)
    assert found.after == pytest.approx(plain.after, rel=1e-4)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.third = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(x + self.third(F.relu(self.second(x))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def batches() -> list[Tensor]:
    drawn = torch.Generator().manual_seed(3)
    return [torch.randn(16, 3, 8, 8, generator=drawn) for _ in range(8)]


def error(slim: nn.Module, model: nn.Module) -> float:
    x = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((slim(x) - model(x)).square().mean())


def test_networks_come_nearer_than_by_plain_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Stages().eval()
    policy = {"second": 0.5, "first": 0.25}
    clipped = fxprune.compress(model, policy, batches()[0], calibration=batches(), repair="lstsq")
    monkeypatch.setattr(Clipped, "fit", lambda self, plain, folds, rows: plain)
    plain = fxprune.compress(model, policy, batches()[0], calibration=batches(), repair="lstsq")
    assert error(clipped, model) < error(plain, model)
    assert all(one.after <= one.before for one in fxprune.record(clipped).repaired.values())


def test_responses_that_do_not_fit_into_memory_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Stages().eval()
    policy = {"second": 0.5, "first": 0.25}
    held = fxprune.compress(model, policy, batches()[0], calibration=batches(), repair="lstsq")
    monkeypatch.setattr(repairer, "CACHE", 0)
    monkeypatch.setattr(repairer, "ROOM", 0)
    unheld = fxprune.compress(model, policy, batches()[0], calibration=batches(), repair="lstsq")
    for (name, a), b in zip(held.state_dict().items(), unheld.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_wide_layers_are_fitted_in_their_main_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "WIDE", 100)
    monkeypatch.setattr(fitting, "RANK", 72)
    torch.manual_seed(0)
    model = Stages().eval()
    slim = fxprune.compress(model, {"second": 0.1}, batches()[0], calibration=batches(), repair="lstsq")
    none = fxprune.compress(model, {"second": 0.1}, batches()[0])
    assert error(slim, model) < 0.5 * error(none, model)
