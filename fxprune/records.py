"""Plain data about a pruning: what was kept, and what it costs before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxprune.errors import FxPruneError
from fxprune.policies import Policy


@dataclass(frozen=True)
class Profile:
    """What a network costs for one call on its example inputs.

    ``macs``: multiply-accumulates of convolutions, linears and matrix products.
    ``params``: number of parameter elements, tied ones counted once.
    ``param_bytes``: their bytes.
    ``peak_activation_bytes``: most bytes of activations alive at once, run operation by operation without gradients.
    ``per_layer``: qualified module name -> {"macs": ..., "params": ...}.
    """

    macs: int
    params: int
    param_bytes: int
    peak_activation_bytes: int
    per_layer: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    timer: Callable[[int], float] | None = field(default=None, repr=False, compare=False)

    def latency(self, runs: int = 10) -> float:
        """Median seconds of one forward call over ``runs`` calls on the device of the model (after warm-up)."""
        if self.timer is None:
            raise FxPruneError("this profile was read from a record and has no model to time; call fxprune.profile(model, inputs)")
        return self.timer(runs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "timer": None}


@dataclass(frozen=True)
class LayerRepair:
    """What a repair did to a layer.

    ``done``: "fitted" (its weights and constant changed), "shifted" (its constant alone) or "sliced" (nothing, since that was better on
    inputs that were not fitted). ``ridge``: the strength chosen, of the mean variance of its inputs. ``before``, ``after``: mean squared
    distance from the original's responses on inputs that were not fitted, as shares of their variance, as sliced and as repaired; of
    layers that a ReLU alone reads, behind it. ``stands_in``: names of the blocks that were left out and that it was fitted to stand in for.
    """

    done: str
    ridge: float | None
    before: float
    after: float
    stands_in: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruningRecord:
    """What a compression did, always in terms of the outermost original model.

    ``kept``: parameter or buffer (floating, or a mask) name -> {dimension: LongTensor of kept original indices}, for those that changed.
    ``removed_units``: group name -> LongTensor of removed unit numbers, 0 to the size of the group.
    ``renumbered``: names of index buffers whose values were renumbered, and of lengths of normed weights that were set again.
    ``repair``: "none", "bn", "bias", "lstsq" or "joint": what was done after slicing. After the last three parameters are no longer
        slices of the original's.
    ``repaired``: layer name -> ``LayerRepair``, for the layers that a repair reached.
    ``steps``: where a slim module was pruned again, the record of each pruning in terms of the module it was given; else empty.
    ``keep_class``: whether the slim module is an instance of the original's class. ``folded``: whether its BatchNorms are folded away.
    ``blocks``: name of a block that was left out -> what became of it: "removed", and which layers stand in for it.
    ``notes``: sentences a user should know: what tracing specialised, what could not be kept.
    """

    kept: Mapping[str, Mapping[int, torch.Tensor]]
    removed_units: Mapping[str, torch.Tensor]
    policy: Policy
    repair: str
    before: Profile
    after: Profile
    renumbered: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    steps: tuple[PruningRecord, ...] = ()
    keep_class: bool = False
    folded: bool = False
    repaired: Mapping[str, LayerRepair] = field(default_factory=dict)
    blocks: Mapping[str, str] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> PruningRecord:
        return self  # it is never changed

    def with_repair(self, repair: str, notes: tuple[str, ...] = (), layers: Mapping[str, LayerRepair] | None = None) -> PruningRecord:
        """The same record after a repair; ``notes``: how much was repaired, and what could not be; ``layers``: what was done to each."""
        repaired, said = dict(layers or {}), tuple(dict.fromkeys((*self.notes, *notes)))
        instead = {block: [path for path, one in repaired.items() if block in one.stands_in] for block in self.blocks}
        blocks = {block: f"removed, {' and '.join(paths)} stands in" if paths else self.blocks[block] for block, paths in instead.items()}
        return replace(self, repair=repair, notes=said, repaired=repaired, blocks=blocks)
