"""Networks that say how good speech sounds: the same recording in more noise has to sound worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.trained.converted import converted
from benchmarks.trained.network import CONVOLUTIONAL, TRANSFORMER, Network, Task, file_of
from benchmarks.trained.speaking import SENTENCES, VOICES, said

LEVELS = (-10.0, -7.0, -4.0, -1.0, 2.0, 5.0)  # dB of the speech above the noise


def noisy(sentences: Sequence[str], voices: Sequence[str], samples: int, seed: int) -> Tensor:
    """Every phrase in its voice at every level of ``LEVELS``, (phrases, levels, samples), 16,000 samples a second, -1 to 1.

    Half of the noise is white and half of it brown; a phrase is said again until the samples are full.
    """
    draw, found = np.random.default_rng(seed), []
    for place, (text, voice) in enumerate(zip(sentences, voices, strict=True)):
        wave = np.resize(said(text, voice), samples)
        noise = draw.standard_normal(samples) if place % 2 else np.cumsum(draw.standard_normal(samples))
        noise -= np.convolve(noise, np.ones(400) / 400, "same")  # no drift
        noise *= wave.std() / noise.std()
        mixed = np.stack([wave + 10 ** (-level / 20) * noise for level in LEVELS])
        found.append(0.8 * mixed / np.abs(mixed).max(1, keepdims=True))
    return torch.from_numpy(np.stack(found)).float()


def ordered(judged: Callable[[Tensor], Tensor], recordings: Tensor) -> float:
    """The share of pairs of levels of one recording, 3 dB apart or more, of which the one in less noise is judged better."""
    marks = torch.stack([judged(one) for one in recordings])  # (phrases, levels)
    better = marks[:, None, :] > marks[:, :, None]
    pairs = torch.ones(len(LEVELS), len(LEVELS)).triu(1).bool()
    return float(better[:, pairs].float().mean())


def _phrases(samples: int) -> tuple[Tensor, Tensor]:
    """What is scored, and what is calibrated on: other sentences and other voices."""
    asked = noisy(SENTENCES[:6], VOICES[:6], samples, 1)
    return asked, noisy(SENTENCES[6:10], VOICES[8:12], samples, 0)


def distilled(_: Path) -> Task:
    """Distill-MOS (Stahl 2025, https://arxiv.org/abs/2502.05356): convolutions over a spectrogram, and seven transformer layers."""
    from distillmos import ConvTransformerSQAModel

    model = ConvTransformerSQAModel(segmenting_in_forward=False).eval()
    asked, others = _phrases(122_880)  # the 7.68 seconds that it takes
    spread = others.transpose(0, 1).flatten(0, 1)  # a batch has several voices at a level
    return Task(model, asked[0, :2], list(spread.split(6)), lambda net: ordered(lambda one: net(one).flatten(), asked))


def dns(_: Path) -> Task:
    """DNSMOS P.835 (Reddy 2022, https://arxiv.org/abs/2110.01763): the quality of the whole, third of its three outputs."""
    model = converted(file_of("speechmos", "dnsmos_models", "sig_bak_ovr.onnx"))
    asked, others = _phrases(144_160)
    spread = others.transpose(0, 1).flatten(0, 1)
    # The file computes the batch of an Expand as a tensor: it is that of the example, and so has to be that of the batches.
    return Task(model, asked[0], list(spread.split(len(LEVELS))), lambda net: ordered(lambda one: net(one)[:, 2], asked))


NETWORKS = (
    Network(
        "distill-mos",
        TRANSFORMER,
        ("distillmos", "xls-r-sqa", "espeakng-loader"),
        "how good speech sounds",
        "90 pairs of noise levels, 6 voices of eSpeak NG",
        distilled,
    ),
    Network(
        "dnsmos",
        CONVOLUTIONAL,
        ("speechmos", "espeakng-loader", "onnx2torch"),
        "how good speech sounds (ONNX)",
        "90 pairs of noise levels, 6 voices of eSpeak NG",
        dns,
    ),
)
