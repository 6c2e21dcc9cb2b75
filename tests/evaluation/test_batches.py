"""Calibration batches: every step takes the same forms, and a batch that does not fit is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import EvaluationError, InputError

LABELS = torch.arange(8) % 4
WAYS: tuple[dict[str, Any], ...] = (
    *({"policy": 0.5, "repair": kind} for kind in ("bn", "bias", "lstsq", "joint")),
    *({"policy": 0.5, "importance": kind} for kind in ("taylor", "reconstruction")),
    {"policy": "macs=0.5", "repair": "lstsq"},
)


def images(seed: int, count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n, self.b, self.f = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.f(self.b((self.n(self.a(x)) - self.n(self.a(y))).relu()).mean((2, 3)))


class Single(Pair):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.f(self.b(self.n(self.a(x)).relu()).mean((2, 3)))


def slim(model: nn.Module, example: Any, batches: list[Any], **how: Any) -> dict[str, Tensor]:
    return fxprune.compress(model.eval(), how.pop("policy"), example, calibration=batches, **how).state_dict()


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_inputs_are_told_from_labels_everywhere(how: dict[str, Any]) -> None:
    pairs = [(images(seed), images(seed + 10)) for seed in range(3)]
    two = (images(1, 2), images(2, 2))
    of_two = [slim(Pair(), two, [(pair, LABELS) for pair in pairs], **how)]
    of_two += [slim(Pair(), {"x": two[0], "y": two[1]}, [{"x": x, "y": y, "labels": LABELS} for x, y in pairs], **how)]
    of_one = [slim(Single(), two[0], [(x, LABELS) for x, _ in pairs], **how)]
    of_one += [slim(Single(), {"x": two[0]}, [{"x": x, "target": LABELS} for x, _ in pairs], **how)]
    of_one += [slim(Single(), {"x": two[0]}, [({"x": x}, LABELS) for x, _ in pairs], **how)]
    if how.get("importance") != "taylor" and how.get("repair") is None:  # what needs no labels is the same without
        of_two += [slim(Pair(), two, pairs, **how)]
        of_one += [slim(Single(), two[0], [x for x, _ in pairs], **how)]
    slim(Pair(), two, pairs, **how)
    for same in (of_two, of_one):
        for other in same[1:]:
            assert all(torch.equal(tensor, same[0][name]) for name, tensor in other.items())


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (
            [images(0), torch.randint(0, 255, (8, 3, 8, 8))],
            r"^calibration batch 1 has a tensor of torch.int64 where the example's is torch.float32$",
        ),
        ([images(0)[0]], r"^calibration batch 0 has a tensor of shape \(3, 8, 8\) where the example's has 4 axes"),
        ([images(0)[:0]], "^calibration batch 0 is empty$"),
        ([images(0).numpy()], "^calibration batch 0 holds an ndarray"),
        ([None], "^calibration batch 0 holds no tensor"),
        ((images(0), LABELS), r"^calibration batch 1 has a tensor of shape \(8,\)"),
        ([((images(0), images(1)), LABELS)], "^calibration batch 0 has 2 tensors as inputs where the example has 1"),
    ],
)
def test_what_does_not_fit_is_refused(batches: Any, said: str) -> None:
    for how in ({"policy": 0.5, "repair": "bn"}, {"policy": "macs=0.5"}):
        with pytest.raises(InputError, match=said):
            slim(Single(), images(0, 2), batches, **how)
    with pytest.raises(InputError, match=said):
        config = fxprune.SearchConfig(targets="macs=0.5", evaluations=3)
        fxprune.search(Single().eval(), images(0, 2), lambda _: 0.5, config=config, calibration=batches)


@pytest.mark.parametrize(
    "how", [{"policy": 0.5, "repair": kind, "importance": "l2"} for kind in ("bn", "bias", "lstsq", "joint")] + [*WAYS[-3:]], ids=str
)
def test_values_that_are_not_finite_never_reach_the_weights(how: dict[str, Any]) -> None:
    bad = images(1)
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(EvaluationError, match="not finite|is nan on batch 1"):
        slim(Single(), images(0, 2), [(images(0), LABELS), (bad, LABELS)], **how)


def test_single_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(3, 10)
    for kind in ("bn", "lstsq"):
        for rows in (1, 2, 3):
            made = fxprune.compress(model, 0.5, x, importance="l2", repair=kind, calibration=[torch.randn(rows, 10)] * 2)
            assert all(bool(torch.isfinite(t).all()) for t in made.state_dict().values())
            said = any("batches of two samples or more" in note for note in fxprune.record(made).notes)
            assert said == (kind == "bn" and rows == 1)
