"""``fold_batchnorm``: a slim module without the BatchNorms that follow its convolutions."""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from fxprune.attached import attach, record_of
from fxprune.costs.profiling import profile
from fxprune.errors import InputError, UnsupportedError
from fxprune.evaluation.callers_modes import in_plain_modes
from fxprune.example_inputs import build
from fxprune.passes.base import run_passes
from fxprune.passes.ir.slim_module import SlimModule
from fxprune.passes.rewriting.fold import FoldBatchNorm


@in_plain_modes
def fold_batchnorm(slim: nn.Module) -> fx.GraphModule:
    """A copy of ``slim`` in which every BatchNorm that alone reads a convolution is part of that convolution's weight and bias.

    It computes the same in evaluation mode, up to rounding, and is for running, not for training: BatchNorm's statistics are gone, and
    training mode computes as evaluation does. BatchNorms elsewhere stay, as those before a convolution, and those of layers that share
    weights. The record stays, so that the result is saved, loaded and pruned again like any other.

    Args:
        slim: the graph module that ``compress`` returned, in evaluation mode. It is not changed.

    Returns:
        The folded copy; ``slim`` itself where there is nothing to fold.

    Raises:
        InputError: ``slim`` is in training mode.
        UnsupportedError: ``slim`` is no graph module.
    """
    if not isinstance(slim, SlimModule):
        raise UnsupportedError(f"fold_batchnorm needs the graph module that compress returns; this {type(slim).__name__} has no graph")
    if slim.training:
        raise InputError("fold_batchnorm is for evaluation: BatchNorm computes something else in training mode; call slim.eval() first")
    made = run_passes(slim, [FoldBatchNorm()])
    record = record_of(slim)
    if made is not slim and record is not None:
        after = replace(profile(made, build(record.policy.inputs, device="meta")), timer=None)
        attach(made, replace(record, folded=True, after=after))
    return made
