"""The same channels out of another copy of the network."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fxprune.attached import Sources, attach, record_of
from fxprune.errors import FileError, InputError
from fxprune.evaluation.callers_modes import in_plain_modes
from fxprune.evaluation.wrappers import sliceable, unwrapped
from fxprune.files.rebuilding import check_original, rebuilt
from fxprune.records import PruningRecord


@in_plain_modes
def apply(record: PruningRecord | nn.Module, model: nn.Module) -> nn.Module:
    """Remove the channels that a pruning removed from another copy of the same network: a moving average, another checkpoint, another rank.

    Args:
        record: the record of a pruning, or a slim module that carries one, bare or in the wrappers of ``torch.compile``, DDP or FSDP.
        model: a copy of the original that was pruned, with weights of its own; it is not changed. It may be wrapped likewise.

    Returns:
        A slim module with the weights of ``model``, its modes and ``requires_grad`` flags: the same kept indices, whatever the copy's own
        importance would have chosen. A repair of the record is not made again, as its ``notes`` then say.

    Raises:
        InputError: the record is none, or ``model`` is no copy of the original; says what differs.
        UnsupportedError: ``model`` is quantised, or sharded among processes.
    """
    found = record if isinstance(record, PruningRecord) else record_of(unwrapped(record)) if isinstance(record, nn.Module) else None
    if found is None:
        raise InputError(f"this {type(record).__name__} is no pruning record and carries none; pass fxprune.record(slim) or slim itself")
    copy = sliceable(unwrapped(model))
    try:
        check_original(found, copy, "the record's")
        slim = rebuilt(copy, found)
    except FileError as error:
        raise InputError(f"cannot apply the record to this {type(copy).__name__}: {error}; pass a copy of what was pruned") from error
    notes = found.notes
    if found.repair != "none":
        notes = (*notes, f"the repair {found.repair!r} of the record was not made again: the weights are the copy's own")
    attach(slim, replace(found, repair="none", notes=notes), Sources(copy))
    return slim
