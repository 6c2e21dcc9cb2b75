"""What candidates of a classifier are scored by: accuracy on held-out images, and likeness to the original's class scores there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.errors import InputError
from fxprune.evaluation.accuracy import labelled, logits_of
from fxprune.evaluation.running import call, device_of, evaluating, to_device


@dataclass(frozen=True)
class Likeness:
    """module -> "accuracy", the share of labels met, and "likeness", how near its class scores are to the original's, 0 to 1.

    Likeness is the mean of two figures: 1 minus the total variation distance of the class probabilities, and the share of the variance
    of the original's class scores (each image's less their mean) that the module's explain. A few hundred images tell candidates apart by
    it whose accuracies differ by chance alone. ``wanted``: the original's scores, each image's less their mean, a tensor a batch.
    """

    batches: Sequence[Any]
    wanted: Sequence[Tensor]

    @classmethod
    def of(cls, original: nn.Module, batches: Iterable[Any]) -> Likeness:
        """Likeness to ``original`` on ``batches`` of (inputs, labels), which stay where they are. Raises ``InputError`` without any."""
        held = list(batches)
        if not held:
            raise InputError("there is no batch to score on")
        with evaluating(original):
            return cls(held, [_centred(_scores(original, batch)) for batch in held])

    def __call__(self, module: nn.Module) -> Mapping[str, float]:
        right, near, missed, total = 0, 0.0, 0.0, 0
        with evaluating(module):
            for batch, wanted in zip(self.batches, self.wanted, strict=True):
                found, labels = _centred(_scores(module, batch)), labelled(batch)[1].to(wanted.device).flatten()
                right += int((found.argmax(1) == labels).sum())
                near += float((1 - (found.softmax(1) - wanted.softmax(1)).abs().sum(1) / 2).sum())
                missed += float((found - wanted).square().sum())
                total += len(labels)
        explained = max(0.0, 1 - missed / max(self.variance, 1e-30))
        return {"accuracy": right / total, "likeness": (near / total + explained) / 2}

    @property
    def variance(self) -> float:
        """Of the original's scores about their mean over all images, summed."""
        together = torch.cat(list(self.wanted))
        return float((together - together.mean(0)).square().sum())

    def first(self, images: int) -> Likeness:
        """The same on the first batches only, as many as hold ``images``."""
        sizes = np.cumsum([len(labelled(batch)[1]) for batch in self.batches])
        count = int(np.searchsorted(sizes, images)) + 1
        return Likeness(self.batches[:count], self.wanted[:count])


def _scores(module: nn.Module, batch: Any) -> Tensor:
    """Class scores as (rows, classes); where every position is scored, a row each."""
    scores = logits_of(call(module, to_device(labelled(batch)[0], device_of(module))))
    return scores.float().movedim(1, -1).reshape(-1, scores.shape[1])


def _centred(scores: Tensor) -> Tensor:
    return scores - scores.mean(1, keepdim=True)
