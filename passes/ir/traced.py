"""The traced model as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from fxprune.passes.ir.notes import Note
from fxprune.passes.ir.skeleton import Skeleton


@dataclass
class TracedModel:
    """What tracing a module gave.

    ``graphs``: "eval" and, where it differs, "train"; node.meta holds ``val`` (concrete value on the example, tensors on meta) and
    ``where`` (file:line in the user's source).
    ``constants``: attribute name -> tensor, for tensors the forward pass made or held outside parameters and buffers.
    ``read``: names of tensors whose values Python code has read, so that numbers in the graph stand for them.
    ``notes``: what had to be specialised or could not be kept. ``opaque``: submodules and functions kept whole -> why.
    ``parts``: where the root could not be traced, the paths of the submodules that were; graphs are then named ``path:mode``.
    """

    skeleton: Skeleton
    graphs: dict[str, fx.Graph]
    constants: dict[str, torch.Tensor]
    read: set[str] = field(default_factory=set)
    notes: tuple[Note, ...] = ()
    opaque: dict[str, str] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)

    @property
    def eval_modes(self) -> list[str]:
        """The names of the graphs that evaluation runs."""
        return [mode for mode in self.graphs if mode.rpartition(":")[2] == "eval"]
