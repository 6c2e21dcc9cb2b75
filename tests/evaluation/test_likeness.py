"""Likeness to the original: what it says of the original itself, of a stranger, and of those in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import InputError
from fxprune.evaluation.likeness import Likeness


class Mixed(nn.Module):
    """The original's scores and noise, in shares."""

    def __init__(self, original: nn.Module, noise: float) -> None:
        super().__init__()
        self.original, self.noise = original, noise

    def forward(self, x: Tensor) -> Tensor:
        scores = self.original(x)
        drawn = torch.randn(scores.shape, generator=torch.Generator().manual_seed(int(x.abs().sum() * 1000)))
        mixed: Tensor = scores + self.noise * drawn
        return mixed


def made(*, positions: bool = False) -> tuple[nn.Module, Likeness]:
    torch.manual_seed(0)
    head = nn.Conv2d(3, 5, 3) if positions else nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    original = nn.Sequential(nn.BatchNorm2d(3), head).train()
    inputs = [3 * torch.randn(8, 3, 4, 4) for _ in range(4)]
    with torch.no_grad():
        batches = [(x, original.eval()(x).argmax(1)) for x in inputs]
    return original.train(), Likeness.of(original, batches)


@pytest.mark.parametrize("positions", [False, True])
def test_the_original_is_wholly_like_itself(positions: bool) -> None:
    original, likeness = made(positions=positions)
    found = likeness(original)
    assert found["accuracy"] == 1
    assert found["likeness"] == pytest.approx(1, abs=1e-6)
    assert original.training  # as it was


def test_the_more_noise_the_less_alike() -> None:
    original, likeness = made()
    found = [likeness(Mixed(original, noise))["likeness"] for noise in (0.0, 0.1, 0.5, 2.0)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.6
    assert likeness(Mixed(original, 100.0))["likeness"] >= 0


def test_a_constant_added_to_all_scores_of_an_image_changes_nothing() -> None:
    original, likeness = made()
    original.eval()

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = original(x) + x.sum((1, 2, 3))[:, None]
            return found

    assert likeness(Shifted())["likeness"] == pytest.approx(likeness(original)["likeness"], abs=1e-5)


def test_the_first_images_are_whole_batches() -> None:
    _, likeness = made()
    assert [len(likeness.first(images).batches) for images in (1, 8, 9, 24, 1000)] == [1, 1, 2, 3, 4]


def test_nothing_to_score_on_is_refused() -> None:
    with pytest.raises(InputError, match="no batch to score on"):
        Likeness.of(nn.Linear(2, 2), [])
