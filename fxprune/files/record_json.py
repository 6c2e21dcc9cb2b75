"""A pruning record as JSON and back. Index lists are written as ranges, "0-3,7", which is short and can be read."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxprune import attached
from fxprune.errors import FileError, PolicyError
from fxprune.index_lists import MOST, indices, ranges
from fxprune.policies import Policy
from fxprune.records import LayerRepair, Profile, PruningRecord

Json = Any


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
        "notes": [str(note) for note in record.notes],  # plain ones: pickles of a kept class need no fxprune
        "keep_class": record.keep_class,
        "blocks": dict(record.blocks),
        "folded": record.folded,
        "repaired": {name: encode_repair(one) for name, one in record.repaired.items()},
        "steps": [encode_record(step) for step in record.steps],
    }


def decode_record(data: Json, *, within: bool = False) -> PruningRecord:
    """The record that ``encode_record`` wrote; ``within``: as a step of another. Raises ``FileError`` naming the part that is missing or
    damaged. Equal index lists share their memory."""
    try:
        lists = _lists(data["lists"])
        policy = data["policy"]
        steps = _checked(data.get("steps", []), list, "steps")
        if steps and within:
            raise FileError("its record is damaged: a step has steps of its own")
        return PruningRecord(
            kept={name: {_axis(dim): _nth(lists, n) for dim, n in dims.items()} for name, dims in data["kept"].items()},
            removed_units={name: _nth(lists, n) for name, n in data["removed_units"].items()},
            policy=Policy(policy["sparsity"], policy["inputs"], policy["options"], policy["meta"]),
            repair=_checked(data["repair"], str, "repair"),
            before=_decode_profile(data["before"]),
            after=_decode_profile(data["after"]),
            renumbered=tuple(_checked(name, str, "renumbered") for name in data["renumbered"]),
            notes=tuple(_checked(note, str, "notes") for note in data["notes"]),
            steps=tuple(decode_record(step, within=True) for step in steps),
            keep_class=bool(data.get("keep_class", False)),
            blocks={str(name): _checked(text, str, "blocks") for name, text in data.get("blocks", {}).items()},
            folded=bool(data.get("folded", False)),
            repaired={str(name): decode_repair(one) for name, one in data.get("repaired", {}).items()},
        )
    except KeyError as error:
        raise FileError(f"its record is damaged: {str(error)[:80]} is missing") from error
    except (TypeError, ValueError, AttributeError, OverflowError, PolicyError) as error:
        raise FileError(f"its record is damaged: {' '.join(str(error).split())[:200]}") from error


def _lists(texts: Json) -> list[Tensor]:
    found: list[Tensor] = []
    room = MOST
    for text in _checked(texts, list, "lists"):
        found.append(indices(text))
        room -= len(found[-1])
        if room < 0:
            raise FileError(f"its record is damaged: it names more than {MOST} channels")
    return found


def _nth(lists: list[Tensor], number: Json) -> Tensor:
    if type(number) is not int or not 0 <= number < len(lists):
        raise FileError(f"its record is damaged: there is no list {str(number)[:40]!r}")
    return lists[number]


def _axis(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 3):
        raise FileError(f"its record is damaged: {text[:40]!r} is no dimension")
    return int(text)


def _checked(value: Json, kind: type[Any], what: str) -> Any:
    if not isinstance(value, kind):
        raise FileError(f"its record is damaged: {what!r} holds {str(value)[:40]!r}, no {kind.__name__}")
    return value


def encode_repair(one: LayerRepair) -> Json:
    """What was done to one layer as what ``json.dumps`` takes."""
    return [one.done, one.ridge, one.before, one.after, *([list(one.stands_in)] if one.stands_in else [])]


def decode_repair(data: Json) -> LayerRepair:
    """What ``encode_repair`` wrote. Raises ``FileError``, ``TypeError`` or ``ValueError`` where it is damaged."""
    done, ridge, before, after, *blocks = _checked(data, list, "repaired")
    strength = None if ridge is None else float(ridge)
    instead = tuple(_checked(name, str, "repaired") for name in (blocks[0] if blocks else ()))
    return LayerRepair(_checked(done, str, "repaired"), strength, float(before), float(after), instead)


def _encode_profile(profile: Profile) -> Json:
    return {
        "macs": profile.macs,
        "params": profile.params,
        "param_bytes": profile.param_bytes,
        "peak_activation_bytes": profile.peak_activation_bytes,
        "per_layer": {name: dict(costs) for name, costs in profile.per_layer.items()},
    }


def _decode_profile(data: Mapping[str, Json]) -> Profile:
    layers = {str(name): {str(k): _count(v) for k, v in costs.items()} for name, costs in data["per_layer"].items()}
    macs, params, size, peak = (_count(data[name]) for name in ("macs", "params", "param_bytes", "peak_activation_bytes"))
    return Profile(macs, params, size, peak, layers)


def _count(value: Json) -> int:
    if type(value) is not int or value < 0:
        raise FileError(f"its record is damaged: {str(value)[:40]!r} is no count")
    return value


def _reduced(record: PruningRecord) -> tuple[Any, ...]:
    """How a record is pickled: as a dict where the module that carries it is of the user's class, and may be loaded without fxprune."""
    found: Any = (dict, (list(encode_record(record).items()),)) if record.keep_class else object.__reduce_ex__(record, 2)
    return tuple(found)


copyreg.pickle(PruningRecord, _reduced)
attached.readers.append(decode_record)
