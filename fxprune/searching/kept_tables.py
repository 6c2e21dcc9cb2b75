"""Error tables kept in a search's folder, so that a resumed search reads what it need not compute again.

One safetensors file: what the table says of each group by the group's number, and in the metadata what it was made of. It is read as data
from outside: sizes are bounded and checked against the network before they are believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxprune.allocation.tables import ROUNDS, ErrorTable
from fxprune.atomic import replace_tensors
from fxprune.errors import FileError, first_line
from fxprune.evaluation.batches import inputs_of
from fxprune.passes.compat import tree_flatten
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.repair.splitting import samples

FORMAT, NAME = "fxprune-table/1", "table.safetensors"
PARTS = {"ranking": torch.float64, "widths": torch.int64, "effects": torch.float64}
HEADER = 2**20  # bytes that names and shapes may take, besides 512 for each group


def kept_table(
    folder: Path,
    graph: CouplingGraph,
    batches: Sequence[Any],
    ranking: Mapping[str, Any] | None,
    made_by: Mapping[str, Any],
    make: Callable[[], ErrorTable],
) -> ErrorTable:
    """The table in ``folder`` where it is that of this network and these inputs, else what ``make`` gives, which is then kept there.

    Args:
        folder: of the search.
        graph, batches, ranking: what the table is made of, weights and inputs included, as for ``error_table``.
        made_by: Its other arguments, plain JSON.
        make: Computes it.

    Raises:
        FileError: The file is damaged or no table of this network, or cannot be written.
    """
    path = folder / NAME
    described = {"format": FORMAT, "of": _mark(graph, batches, ranking), **made_by}
    groups = {group.name: group.size for group in graph.groups if group.prunable}
    most = sum(samples(inputs_of(batch, graph.inputs)) for batch in batches)
    if path.exists():
        found = _read(path, described, groups, most)
        if found is not None:
            return found
    table = make()
    _write(path, described, groups, table)
    return table


def _write(path: Path, described: Mapping[str, Any], groups: Mapping[str, int], table: ErrorTable) -> None:
    tensors = {
        f"{number}.{part}": torch.from_numpy(np.ascontiguousarray(getattr(table, part)[name])).to(kind)
        for number, name in enumerate(groups)
        for part, kind in PARTS.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_tensors(path, tensors, {"fxprune": json.dumps(described, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot write {path}: {first_line(error)}; choose a folder that can be written") from error


def _read(path: Path, described: Mapping[str, Any], groups: Mapping[str, int], most: int) -> ErrorTable | None:
    """The table, or None where it is another network's, or was made of other inputs. ``most``: the samples that there are."""
    try:
        bound = HEADER + sum(512 + 8 * (size + _widths(size) * (1 + most)) for size in groups.values())
        if path.stat().st_size > bound:
            raise ValueError(f"it has more than the {bound} bytes that a table of this network can have")
        with safe_open(path, "pt") as opened:
            if (opened.metadata() or {}).get("fxprune") != json.dumps(described, sort_keys=True):
                return None
            wanted = {f"{number}.{part}" for number in range(len(groups)) for part in PARTS}
            if set(opened.keys()) != wanted:
                raise ValueError("it has not the groups of this network")
            read = [{part: _checked(opened.get_tensor(f"{n}.{part}"), part) for part in PARTS} for n in range(len(groups))]
        _check(read, groups, most)
    except (OSError, SafetensorError, ValueError) as error:
        raise FileError(f"cannot go on from {path}: {first_line(error)}; remove it, and the table is computed again") from error
    by_part = {part: {name: one[part].numpy() for name, one in zip(groups, read, strict=True)} for part in PARTS}
    return ErrorTable(**by_part)


def _widths(size: int) -> int:
    """How many widths of a group a table may hold."""
    return min(size, ROUNDS) + 1


def _checked(tensor: Tensor, part: str) -> Tensor:
    if tensor.dtype is not PARTS[part] or not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"its {part} are damaged")
    return tensor


def _check(read: Sequence[Mapping[str, Tensor]], groups: Mapping[str, int], most: int) -> None:
    lengths = {one["effects"].shape[1:] for one in read}
    if len(lengths) > 1 or any(len(one) != 1 or one[0] > most for one in lengths):
        raise ValueError("its effects are of other samples")
    for (name, size), one in zip(groups.items(), read, strict=True):
        widths = one["widths"]
        shaped = one["ranking"].shape == (size,) and widths.ndim == 1 and 0 < len(widths) <= _widths(size)
        if not shaped or len(one["effects"]) != len(widths):
            raise ValueError(f"what it says of {name!r} is not of its size")
        if int(widths[0]) != 0 or int(widths[-1]) >= max(size, 1) or bool((widths.diff() <= 0).any()):
            raise ValueError(f"its widths of {name!r} are no rising numbers of units")


def _mark(graph: CouplingGraph, batches: Sequence[Any], ranking: Mapping[str, Any] | None) -> str:
    """Tells one network with its weights, inputs and ranking from another."""
    groups = [[group.name, group.size, group.prunable] for group in graph.groups]
    found = hashlib.sha256(json.dumps([groups, graph.options], sort_keys=True, default=str).encode())
    add_to(found, sorted(graph.model.state_dict().items()))
    for batch in batches:
        leaves, structure = tree_flatten(batch)
        add_to(found, [(str(structure), leaf) for leaf in leaves])
    add_to(found, sorted((name, torch.as_tensor(one)) for name, one in (ranking or {}).items()))
    return found.hexdigest()


def add_to(digest: Any, items: Iterable[tuple[str, Any]]) -> None:
    """Take named values into a digest of ``hashlib``, tensors with their shape, dtype and every bit."""
    for name, value in items:
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
            dense = value.detach().cpu() if value.layout is torch.strided else value.detach().cpu().to_dense()
            digest.update(dense.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value!r} ".encode())
