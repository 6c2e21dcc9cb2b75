"""Recovery between prune steps: distil what is left and put the trained weights back where they were sliced from (Wang 2024, sec. 3.5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fxprune.api import record
from fxprune.atomic import replace_tensors
from fxprune.driver import Problem
from fxprune.errors import FileError, first_line
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.searching.candidates import Candidates


@dataclass(frozen=True)
class Recovery:
    """Trains the slim network of a removal vector, in place in the analysed one.

    ``working``: the analysed model, whose weights candidates are sliced from. ``distil``: trains a slim network in place.
    """

    candidates: Candidates
    working: nn.Module
    distil: Callable[[nn.Module], Any]

    def attached(self, problem: Problem) -> Problem:
        """``problem`` with this recovery."""
        return replace(
            problem,
            recover=self,
            save_weights=lambda path: write_weights(self.working, path),
            load_weights=lambda path: read_weights(self.working, path),
        )

    def __call__(self, removed: Any) -> None:
        graph = self.candidates.graph
        slimmer = Slimmer(graph, self.candidates.keep(removed))
        slim = slimmer.run()
        self.distil(slim)
        names = graph.traced.skeleton
        kept = {alias: slimmer.kept_dims(name) for name in names.names for alias in names.aliases[name]}
        _write(self.working, slim, kept, {alias for name in slimmer.renumber for alias in names.aliases[name]})


def put_back(working: nn.Module, slim: nn.Module) -> None:
    """Write the weights of a slim module of ``working`` to where they were sliced from, by its record."""
    made = record(slim)
    last = made.steps[-1] if made.steps else made
    _write(working, slim, last.kept, set(last.renumbered))


def _write(working: nn.Module, slim: nn.Module, kept: Mapping[str, Mapping[int, torch.Tensor]], renumbered: Set[str]) -> None:
    own = working.state_dict()
    with torch.no_grad():
        for name, trained in slim.state_dict().items():
            if name not in renumbered:  # those say which channels are read, and nothing is learned in them
                own[name][_places(kept.get(name, {}), trained)] = trained.to(own[name].device)


def _places(dims: Any, trained: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Index of the entries of the original tensor that ``trained`` was sliced from."""
    indices = [dims.get(d, torch.arange(size)) for d, size in enumerate(trained.shape)]
    return tuple(index.reshape([-1 if i == d else 1 for i in range(len(indices))]) for d, index in enumerate(indices))


def write_weights(model: nn.Module, path: Path) -> None:
    """Write a state_dict as safetensors; an older file is replaced only when the new one is whole."""
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_tensors(path, tensors)
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot write {path}: {error}; choose a folder that can be written") from error


def read_weights(model: nn.Module, path: Path) -> None:
    """Read what ``write_weights`` wrote into ``model``."""
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise FileError(f"cannot go on from {path}: {first_line(error)}; start the search again") from error
