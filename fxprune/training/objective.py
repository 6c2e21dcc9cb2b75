"""What a training minimises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.evaluation.accuracy import labelled, logits_of
from fxprune.evaluation.running import call


class Objective:
    """What a training minimises; this one, cross-entropy with the labels. Others derive from it."""

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def learner(self, model: nn.Module, loader: Iterable[Any], device: torch.device) -> nn.Module:
        """The module that is trained and called with a batch's inputs: the model, or one around it with parameters of its own."""
        return Whole(model)

    def inputs(self, batch: Any) -> Any:
        """What of a batch goes into the network."""
        return labelled(batch)[0]

    def loss(self, outcome: Any, batch: Any, number: int) -> Tensor:
        """The loss of the ``number``-th batch of an epoch, a mean over its rows; ``outcome``: what the learner returned."""
        return F.cross_entropy(logits_of(outcome), labelled(batch)[1], ignore_index=self.ignore_index)

    def right(self, outcome: Any, batch: Any) -> tuple[Tensor, Tensor] | None:
        """How many labels were met, of how many; None where there are none."""
        labels = labelled(batch)[1]
        return ((logits_of(outcome).argmax(1) == labels).sum(), (labels != self.ignore_index).sum())

    def validated(self, model: nn.Module, score: float) -> dict[str, Any]:
        """Told each new best score; gives entries for that epoch's record."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a training that goes on needs to know: tensors and plain values."""
        return {}

    def restore(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Resume from what ``state`` gave; ``model`` is the one that is trained."""


class Whole(nn.Module):
    """The model, called with inputs of any form in one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return call(self.model, inputs)
