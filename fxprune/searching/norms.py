"""Recovery of the norms: between a repair and distillation only the vectors train, normalisation scales and shifts and biases.

They are a thousandth of the parameters and take minutes where distillation takes hours (PERP, Zimmer 2023, https://arxiv.org/abs/2312.15230,
there for weights that are set to zero; here for channels that are gone). No label is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.evaluation.accuracy import logits_of
from fxprune.evaluation.batches import inputs_of
from fxprune.evaluation.running import call, device_of, evaluating, to_device
from fxprune.training.config import History
from fxprune.training.distillation import DistillConfig, distill

LR = 1e-3  # ResNet-20: ten times as much loses a point, thirty times diverges
HELD = 5  # one batch in so many is not trained on but decides which weights are kept
TEMPERATURE = 2.0


def recover_norms(slim: nn.Module, teacher: nn.Module, batches: Iterable[Any], config: DistillConfig) -> History:
    """Train the vectors of ``slim`` in place to give the teacher's responses.

    Args:
        slim: The repaired slim module.
        teacher: The original; it is not changed.
        batches: Inputs, or pairs of inputs and labels, which are not read.
        config: Epochs, learning rate, seed and what else ``distill`` takes; what is trained and by which loss is set here. BatchNorm keeps
            the statistics that the repair gave it.

    Returns:
        The history, one record an epoch.

    Raises:
        InputError: There is no vector to train.
        EvaluationError: The output holds no tensor.
    """
    vectors = replace(config, parameters="vectors", batchnorm="frozen", loss=unlike, inputs=inputs_of, replace_teacher=False)
    return distill(slim, teacher, batches, config=vectors)


def halves(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to train on, and those by which the best weights are kept; a single one is both."""
    held = list(batches[HELD - 1 :: HELD]) or list(batches[-1:])
    fit = [batch for batch in batches if not any(batch is one for one in held)]
    return fit or held, held


def nearness(teacher: nn.Module, batches: Sequence[Any]) -> Callable[[nn.Module], float]:
    """Module -> how near its outputs on ``batches`` are to the teacher's, 0 at best: what weights are kept by without labels."""
    with evaluating(teacher):
        wanted = [call(teacher, to_device(inputs_of(batch), device_of(teacher))) for batch in batches]

    def near(module: nn.Module) -> float:
        with evaluating(module):
            found = [call(module, to_device(inputs_of(batch), device_of(module))) for batch in batches]
        return -sum(float(unlike(a, b, None)) for a, b in zip(found, wanted, strict=True)) / len(batches)

    return near


def unlike(output: Any, wanted: Any, batch: Any) -> Tensor:
    """The divergence of class scores, (samples, classes, ...), from the wanted ones at a temperature; else the squared error."""
    del batch  # labels are not read
    found, aim = logits_of(output).float(), logits_of(wanted).float()
    if found.ndim < 2 or found.shape[1] < 2:
        return F.mse_loss(found, aim)
    ours, theirs = (F.log_softmax(scores / TEMPERATURE, 1) for scores in (found, aim))
    count = found.numel() // found.shape[1]
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * TEMPERATURE**2 / max(1, count)
