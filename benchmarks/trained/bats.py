"""BatDetect2 (Mac Aodha 2022, https://doi.org/10.1101/2022.12.14.520490): when does a bat call? Sweeps made here, as pipistrelles call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trained.network import CONVOLUTIONAL, Network, Task

RATE, WINDOWS = 256_000, 8  # samples a second; windows of a recording of a quarter of a second


def recordings(count: int, params: dict[str, object], seed: int) -> tuple[Tensor, Tensor]:
    """Spectrograms (count, 1, frequencies, frames), and which of their windows have a call in the middle, (count, windows)."""
    from batdetect2.utils.audio_utils import generate_spectrogram

    draw = np.random.default_rng(seed)
    size, length = RATE // 4, RATE * 5 // 1000
    images, calls = [], []
    for _ in range(count):
        wave = 0.003 * draw.standard_normal(size)
        has = draw.random(WINDOWS) < 0.5
        for window in np.flatnonzero(has):
            start = int((window + draw.uniform(0.35, 0.5)) * size / WINDOWS)
            high, low = draw.uniform(75e3, 95e3), draw.uniform(42e3, 48e3)
            time = np.arange(length) / length
            frequency = low + (high - low) * np.exp(-5 * time)
            wave[start : start + length] += draw.uniform(0.1, 0.5) * np.hanning(length) * np.sin(2 * np.pi * np.cumsum(frequency) / RATE)
        spectrogram, _ = generate_spectrogram(wave.astype(np.float32), RATE, params)
        images.append(torch.from_numpy(np.ascontiguousarray(spectrogram)).float())
        calls.append(torch.from_numpy(has))
    whole = torch.stack(images)[:, None]
    return F.interpolate(whole, (128, whole.shape[3] // 64 * 32), mode="bilinear"), torch.stack(calls)


def bats(_: Path) -> Task:
    from batdetect2.utils.detector_utils import load_model

    model, params = load_model(device=torch.device("cpu"))
    scored, wanted = recordings(24, params, 1)

    def score(net: nn.Module) -> float:
        found = torch.cat([net(part)[0] for part in scored.split(4)]).amax((1, 2))
        return float(((F.adaptive_max_pool1d(found[:, None], WINDOWS)[:, 0] > 0.3) == wanted).float().mean())

    return Task(model.eval(), scored[:2], list(recordings(48, params, 0)[0].split(8)), score)


NETWORKS = (Network("batdetect2", CONVOLUTIONAL, ("batdetect2",), "bat calls in a recording", "192 windows of sweeps made here", bats),)
