"""Repairs of a run's results that are kept in its checkpoint: a resumed run takes them from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.atomic import replace_text
from fxprune.cli.run_folder import read_json
from fxprune.files.record_json import decode_repair, encode_repair
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.records import LayerRepair
from fxprune.repair.registry import named
from fxprune.repair.repairer import Repairer
from fxprune.searching.kept_tables import add_to
from fxprune.searching.recovery import read_weights, write_weights


class KeptRepairs:
    """Repairs like the ``Repairer`` that ``make`` returns, and keeps the results in ``folder``, by the weights that it began with.

    The weights are written first and what was done to them last, so that a repair is there whole or not at all. ``given``: the repair as
    the options name it.
    """

    def __init__(self, folder: Path, given: Any, make: Callable[[], Repairer]) -> None:
        self.folder, self._make = folder, make
        self.kind = named(given)[0]
        self.layers: dict[str, LayerRepair] = {}

    @cached_property
    def repairer(self) -> Repairer:
        """Made when a repair has yet to be done: it reads the calibration images."""
        return self._make()

    def __call__(self, slim: nn.Module, slimmer: Slimmer) -> tuple[str, ...]:
        """Repair ``slim`` in place; returns notes for the record."""
        stem = f"repaired-{_mark(slim)}"
        weights, said = self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"
        if said.exists():
            kept = read_json(said, f"{self.folder.parent} cannot be resumed")
            read_weights(slim, weights)
            self.layers = {name: decode_repair(one) for name, one in kept["layers"].items()}
            return tuple(kept["notes"])
        notes = self.repairer(slim, slimmer)
        self.layers = self.repairer.layers
        write_weights(slim, weights)
        layers = {name: encode_repair(one) for name, one in self.layers.items()}
        replace_text(said, json.dumps({"notes": list(notes), "layers": layers}, indent=2) + "\n")
        return notes


def _mark(slim: nn.Module) -> str:
    """Tells the weights of one slim network from another's."""
    found = hashlib.sha256()
    add_to(found, sorted(slim.state_dict().items()))
    return found.hexdigest()[:16]
