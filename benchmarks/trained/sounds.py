"""Sounds whose properties are known exactly, because they are made here."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def tones(count: int, samples: int, rate: int, low: float, high: float, seed: int) -> tuple[Tensor, Tensor]:
    """Steady harmonic tones in light noise, (count, samples), and their fundamental frequencies in Hz, (count,).

    Frequencies are drawn evenly on a logarithmic scale; each tone has up to twelve partials whose strengths fall, with phases at random,
    and noise 20 to 40 dB below it.
    """
    draw = np.random.default_rng(seed)
    pitches = low * (high / low) ** draw.random(count)
    return torch.stack([torch.from_numpy(_tone(pitch, samples, rate, draw)).float() for pitch in pitches]), torch.from_numpy(
        pitches
    ).float()


def _tone(pitch: float, samples: int, rate: int, draw: np.random.Generator) -> Array:
    time = np.arange(samples) / rate
    partials = np.arange(1, 13)
    partials = partials[partials * pitch < 0.45 * rate]
    strengths = partials ** -draw.uniform(0.7, 2.0) * draw.uniform(0.5, 1.0, len(partials))
    phases = draw.uniform(0, 2 * np.pi, len(partials))
    wave: Array = (strengths[:, None] * np.sin(2 * np.pi * partials[:, None] * pitch * time + phases[:, None])).sum(0)
    wave += wave.std() * 10 ** draw.uniform(-2, -1) * draw.standard_normal(samples)
    wave *= 0.5 / np.abs(wave).max()
    return wave


def cents(found: Tensor, wanted: Tensor) -> Tensor:
    """How far frequencies are apart, in cents, a hundredth of a semitone each."""
    return 1200 * torch.log2(found.clamp_min(1e-3) / wanted).abs()
