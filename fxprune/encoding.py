"""A pruning record as JSON and back. Index lists are written as ranges, "0-3,7", which is short and can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import FileError, PolicyError
from fxprune.policies import Policy
from fxprune.records import Profile, PruningRecord

Json = Any


def ranges(indices: Tensor) -> str:
    """Ascending whole numbers, a LongTensor of shape (n,), as text: runs from first to last, separated by commas."""
    if len(indices) == 0:
        return ""
    breaks = (indices.diff() != 1).nonzero().flatten() + 1
    runs = torch.tensor_split(indices, breaks.cpu())
    return ",".join(str(int(run[0])) if len(run) == 1 else f"{int(run[0])}-{int(run[-1])}" for run in runs)


def indices(text: Json) -> Tensor:
    """The LongTensor that ``ranges`` wrote as ``text``. Raises ``FileError`` for text that is not ascending ranges."""
    if text == "":
        return torch.empty(0, dtype=torch.int64)
    found: list[int] = []
    for run in str(text).split(","):
        first, dash, last = run.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(last) < int(first) or (found and int(first) <= found[-1]):
            raise FileError(f"its record is damaged: {str(text)[:40]!r} is no ascending list of ranges")
        found.extend(range(int(first), int(last) + 1))
    return torch.tensor(found)


def encode_record(record: PruningRecord) -> Json:
    """``record`` as what ``json.dumps`` takes. Equal index lists, of which a coupled group has many, are written once."""
    lists: dict[str, int] = {}

    def number(values: Tensor) -> int:
        return lists.setdefault(ranges(values), len(lists))

    kept = {name: {str(dim): number(values) for dim, values in dims.items()} for name, dims in record.kept.items()}
    return {
        "kept": kept,
        "removed_units": {name: number(values) for name, values in record.removed_units.items()},
        "lists": list(lists),
        "policy": {
            "sparsity": dict(record.policy.sparsity),
            "inputs": record.policy.inputs,
            "options": dict(record.policy.options),
            "meta": dict(record.policy.meta),
        },
        "repair": record.repair,
        "before": _encode_profile(record.before),
        "after": _encode_profile(record.after),
        "renumbered": list(record.renumbered),
        "notes": list(record.notes),
        "keep_class": record.keep_class,
        "folded": record.folded,
        "steps": [encode_record(step) for step in record.steps],
    }


def decode_record(data: Json) -> PruningRecord:
    """The record that ``encode_record`` wrote. Raises ``FileError`` naming the part that is missing or damaged."""
    try:
        lists = [indices(text) for text in data["lists"]]
        policy = data["policy"]
        return PruningRecord(
            kept={name: {int(dim): lists[n].clone() for dim, n in dims.items()} for name, dims in data["kept"].items()},
            removed_units={name: lists[n].clone() for name, n in data["removed_units"].items()},
            policy=Policy(policy["sparsity"], policy["inputs"], policy["options"], policy["meta"]),
            repair=str(data["repair"]),
            before=_decode_profile(data["before"]),
            after=_decode_profile(data["after"]),
            renumbered=tuple(data["renumbered"]),
            notes=tuple(data["notes"]),
            steps=tuple(decode_record(step) for step in data.get("steps", [])),
            keep_class=bool(data.get("keep_class", False)),
            folded=bool(data.get("folded", False)),
        )
    except KeyError as error:
        raise FileError(f"its record is damaged: {error} is missing") from error
    except (TypeError, ValueError, AttributeError, IndexError, PolicyError) as error:
        raise FileError(f"its record is damaged: {error}") from error


def _encode_profile(profile: Profile) -> Json:
    return {
        "macs": profile.macs,
        "params": profile.params,
        "param_bytes": profile.param_bytes,
        "peak_activation_bytes": profile.peak_activation_bytes,
        "per_layer": {name: dict(costs) for name, costs in profile.per_layer.items()},
    }


def _decode_profile(data: Mapping[str, Json]) -> Profile:
    layers = {str(name): {str(k): int(v) for k, v in costs.items()} for name, costs in data["per_layer"].items()}
    return Profile(int(data["macs"]), int(data["params"]), int(data["param_bytes"]), int(data["peak_activation_bytes"]), layers)
