"""Slim modules in files: one safetensors file with the weights and, in its metadata, everything else. No pickle is written or read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fxprune.atomic import replace_tensors
from fxprune.attached import attach, record_of
from fxprune.errors import FileError, FxPruneError, first_line
from fxprune.evaluation.callers_modes import in_plain_modes
from fxprune.evaluation.copying import copied
from fxprune.evaluation.running import device_of
from fxprune.evaluation.wrappers import own_module
from fxprune.files.rebuilding import check_original, rebuilt
from fxprune.files.record_json import decode_record, encode_record
from fxprune.records import PruningRecord

FORMAT = "fxprune-slim/1"
# In front of the names of tensors that no state_dict has (non-persistent buffers, plain attributes): the rest of the file is one.
_EXTRA = "fxprune.extra/"
_LAYOUTS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
_SPARSE = "sparse_coo"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def save(slim: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a slim module to ``path``; an older file there is replaced only when the new one is whole.

    The file holds the weights under their names, so it also reads as a plain safetensors state_dict; tied tensors once, their other names
    as aliases in the metadata; non-persistent buffers and tensor attributes under names of their own; and the pruning record.

    Args:
        slim: what ``compress``, ``search`` or ``load`` returned, bare or in the wrappers of ``torch.compile``, DDP or FSDP.
        path: of the file; its folder is made where it is missing.

    Raises:
        InputError: ``slim`` is no module.
        FileError: the module has no record, a tensor is one that safetensors does not know, or the path cannot be written.
    """
    slim = own_module(slim, "slim")
    record = record_of(slim)
    if record is None:
        raise FileError(f"cannot save this {type(slim).__name__}: it carries no pruning record; pass what compress returned")
    tensors, aliases, layouts = _contents(slim)
    described = {"format": FORMAT, "model": type(slim).__name__, "aliases": aliases, "layouts": layouts, "record": encode_record(record)}
    target = Path(path)
    try:
        # One entry: safetensors writes several in random order, and equal modules should give equal files.
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_tensors(target, tensors, {"fxprune": json.dumps(described)})
    except TypeError as error:
        raise FileError(f"cannot save to {target}: the policy's inputs, options or meta are not plain JSON: {error}") from error
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot save to {target}: {first_line(error)[:200]}; choose a folder that can be written") from error
    except (ValueError, RuntimeError, KeyError) as error:
        raise FileError(f"cannot save to {target}: safetensors takes no such tensor: {first_line(error)[:200]}") from error


@in_plain_modes
def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Rebuild the slim module of ``path``: ``apply`` with the record of the file, and then the weights of the file.

    Args:
        path: of a file that ``save`` wrote. No pickle is read.
        model: a fresh original, which may lie on the meta device, unless its root could not be traced. It may be wrapped as for ``save``
            and is not changed.

    Returns:
        What ``compress`` gave: a ``torch.fx.GraphModule``, or, where the root could not be traced, a copy of the user's module with slim
        parts.
        It lies where the model does, on the CPU for a model on meta, and has its modes and ``requires_grad`` flags; weights, dtypes and the
        record are the file's.

    Raises:
        InputError: ``model`` is no module.
        FileError: in one line that says what differs: the file is none of ``save``'s, is damaged, or was made of another model.
    """
    model = own_module(model, "model")
    device = device_of(model)
    return _loaded(Path(path), model, torch.device("cpu") if device.type == "meta" else device)[0]


@in_plain_modes
def rebuild(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """The slim module of the file at ``path`` on the meta device.

    It has the names, shapes, dtypes and ties of the saved module and its record, but no weights. A plain state_dict loads into it:
    ``rebuild(model, path).load_state_dict(safetensors.torch.load_file(path), assign=True)``, the file's own or one that was trained
    elsewhere;
    tied names may be there once or all. What no state_dict holds (non-persistent buffers, tensor attributes) has the file's values already.

    Args:
        model: a fresh original, which may lie on the meta device itself. It is not changed.
        path: of a file that ``save`` wrote.

    Returns:
        The slim module on the meta device.

    Raises:
        InputError: ``model`` is no module.
        FileError: as ``load`` does.
    """
    slim, aliases = _loaded(Path(path), own_module(model, "model"), None)
    tied = _Ties(aliases)
    slim._register_load_state_dict_pre_hook(tied.complete)
    slim.register_load_state_dict_post_hook(tied.tie)
    return slim


class _Ties:
    """Hooks of ``load_state_dict`` for a state_dict in which each tied tensor stands once, as in a file."""

    def __init__(self, aliases: Mapping[str, str]) -> None:
        self.aliases = dict(aliases)

    def complete(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Give tied names their tensor, and leave out what no state_dict has."""
        for name, first in self.aliases.items():
            if not name.startswith(_EXTRA) and f"{prefix}{first}" in state:
                state.setdefault(f"{prefix}{name}", state[f"{prefix}{first}"])
        for name in [name for name in state if name.startswith(f"{prefix}{_EXTRA}")]:
            del state[name]

    def tie(self, module: nn.Module, _: Any) -> None:
        """``assign=True`` made a parameter of every name."""
        places = {name: (holder, key) for name, holder, key in _slots(module)}
        for name, first in self.aliases.items():
            holder, key = places[name]
            source, its = places[first]
            holder[key] = source[its]


def _loaded(path: Path, model: nn.Module, device: torch.device | None) -> tuple[nn.Module, dict[str, str]]:
    """The slim module of a file and the file's aliases; without a device its state_dict lies on meta."""
    described, tensors = _read(path)
    try:
        record = decode_record(described["record"])
        aliases, layouts = _names(described["aliases"], "aliases"), _names(described["layouts"], "layouts")
        check_original(record, model, "the file's")
        volatile: set[str] = set()
        slim = rebuilt(_with_values_read(model, record, tensors), record, volatile)
        if device is None:
            tensors = {name: tensor if name.startswith(_EXTRA) else tensor.to("meta") for name, tensor in tensors.items()}
        _leave_out(slim, tensors, aliases, volatile)
        _assign(slim, tensors, aliases, layouts, device)
    except FileError as error:
        raise FileError(f"cannot load {path}: {error}") from error
    except KeyError as error:
        raise FileError(f"cannot load {path}: its metadata have no {str(error)[:80]}") from error
    except (FxPruneError, RuntimeError) as error:
        where = "on meta" if _on_meta(model) else "on the inputs that the file names"
        advice = "build it on the CPU" if _on_meta(model) else "pass the model that the file was made of"
        raise FileError(f"cannot load {path}: this model cannot be analysed {where} ({first_line(error)[:200]}); {advice}") from error
    attach(slim, record)
    return slim, aliases


def _names(found: Any, what: str) -> dict[str, str]:
    """A mapping of names, as metadata must have it."""
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FileError(f"its metadata are damaged: {what!r} is no mapping of names to names")
    return found


def _contents(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Tensors by their names in a file, each once; other name -> name for the tied ones; name -> memory layout."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    layouts: dict[str, str] = {}
    names: dict[int, str] = {}
    storages: set[int] = set()
    for name, holder, key in _slots(module):
        tensor = holder[key]
        if tensor.is_meta:
            raise FileError(f"cannot save {name}: it lies on the meta device and has no values; load the weights first")
        sparse = tensor.layout is torch.sparse_coo and name.startswith(_EXTRA)  # a table of the code's own; weights have to be dense
        if tensor.layout != torch.strided and not sparse:
            raise FileError(f"cannot save {name}: it is sparse ({tensor.layout}); make it dense with to_dense()")
        if id(tensor) in names:
            aliases[name] = names[id(tensor)]
            continue
        names[id(tensor)] = name
        layout = _SPARSE if sparse else next((n for n, f in _LAYOUTS.items() if _is_laid_out(tensor, f)), None)
        if layout is not None:
            layouts[name] = layout
        plain = (tensor.to_dense() if sparse else tensor).detach().contiguous().cpu()
        storage = plain.untyped_storage()
        # safetensors writes no two names into one storage, nor part of one.
        tensors[name] = plain.clone() if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes else plain
        storages.add(storage.data_ptr())
    return tensors, aliases, layouts


def _slots(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every place that holds a tensor: its name in a file, the mapping it is in, and its key there."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for holder in (owner._parameters, owner._buffers, owner.__dict__):
            for key, tensor in holder.items():
                if isinstance(tensor, Tensor):
                    in_state = holder is not owner.__dict__ and key not in owner._non_persistent_buffers_set
                    yield f"{dot}{key}" if in_state else f"{_EXTRA}{dot}{key}", holder, key


def _on_meta(model: nn.Module) -> bool:
    return any(holder[key].is_meta for _, holder, key in _slots(model))


def _is_laid_out(tensor: Tensor, layout: torch.memory_format) -> bool:
    fits = tensor.ndim == (4 if layout is torch.channels_last else 5)
    return fits and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with path.open("rb") as opened:
            start = opened.read(9)
        # A safetensors file begins with 8 bytes for the length of a JSON object, and the object; any byte may be among the 8.
        if start[8:] != b"{" and start.startswith((_ZIP, _PICKLE)):
            raise FileError(f"cannot load {path}: it is a pickle, which can run code; only what fxprune.save wrote is read")
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            # Copied out: the reader's tensors lie at the file's own offsets, and other alignments give other roundings.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118, it is no mapping
    except OSError as error:
        raise FileError(f"cannot load {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FileError(f"cannot load {path}: it is no whole safetensors file: {first_line(error)[:200]}") from error
    if "fxprune" not in metadata:
        raise FileError(f"cannot load {path}: it holds weights but no pruning record; only fxprune.save's files can be loaded")
    try:
        described = json.loads(metadata["fxprune"])
    except (ValueError, RecursionError) as error:
        raise FileError(f"cannot load {path}: its metadata are damaged: {error}") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        found = described.get("format") if isinstance(described, dict) else described
        raise FileError(f"cannot load {path}: its format is {str(found)[:40]!r}; this fxprune reads {FORMAT!r}")
    return described, tensors


def _with_values_read(model: nn.Module, record: PruningRecord, tensors: Mapping[str, Tensor]) -> nn.Module:
    """``model``, or a copy that has the file's values where the analysis reads some: in flags that say that the network has run before
    (k-means and ActNorm fill their buffers then), and on meta in index tables."""
    indices = [name for name, holder, key in _slots(model) if name in record.renumbered and not holder[key].is_floating_point()]
    if indices and _on_meta(model):  # lengths of weights are in the file as they have to be
        raise FileError(f"the original values of {indices[0]!r} are needed and not in it; build the model on the CPU")
    read = {name for name, holder, key in _slots(model) if name in tensors and _is_read(name, holder[key], tensors[name])}
    if not read:
        return model
    twin = copied(model, {id(holder[key]): holder[key] for _, holder, key in _slots(model)})
    for name, holder, key in list(_slots(twin)):
        if name in read:
            holder[key] = tensors[name] if holder[key].is_meta else tensors[name].to(holder[key].device)
    return twin


def _is_read(name: str, own: Tensor, found: Tensor) -> bool:
    """Whether the analysis may read a tensor of the model that has other values in the file: a buffer of one number, and integers of a
    model without values. How often a norm saw a batch is nothing that code asks for."""
    if isinstance(own, nn.Parameter) or own.shape != found.shape:
        return False
    if own.is_meta:
        return own.numel() == 1 or not found.is_floating_point()
    return own.numel() == 1 and not name.endswith("num_batches_tracked") and not torch.equal(found.to(own.device), own.detach())


def _leave_out(slim: nn.Module, tensors: dict[str, Tensor], aliases: Mapping[str, str], volatile: set[str]) -> None:
    """Of what forward keeps for itself (``volatile``), a table that it made for another size than this model has: this one's will do."""
    for name, holder, key in _slots(slim):
        if name.startswith(_EXTRA) and name.removeprefix(_EXTRA) in volatile and name in tensors and name not in aliases.values():
            tensors[name] = tensors[name] if tensors[name].shape == holder[key].shape else holder[key].detach()


def _assign(
    slim: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], layouts: Mapping[str, str], device: torch.device | None
) -> None:
    """Put the file's tensors in their places; tied places get the same one."""
    slots = list(_slots(slim))
    named = {*tensors, *aliases}
    double = sorted(aliases.keys() & tensors.keys())
    if double:
        raise FileError(f"its metadata are damaged: {double[0]!r} is an alias and a tensor")
    strange = [name for name, _, _ in slots if name not in named] or sorted(named - {name for name, _, _ in slots})
    if strange:
        where = "is missing from the file" if strange[0] not in named else "is in the file alone"
        raise FileError(f"it does not fit this model: {strange[0]!r} {where}")
    placed: dict[str, Tensor] = {}
    for name, holder, key in slots:
        own, first = holder[key], aliases.get(name, name)
        if first not in tensors:
            raise FileError(f"its metadata are damaged: {name!r} is an alias of {first!r}, which is not there")
        if own.shape != tensors[first].shape:
            raise FileError(f"it does not fit this model: {name!r} is {_shape(tensors[first])} in the file and {_shape(own)} in the model")
        if (own.is_floating_point(), own.is_complex()) != (tensors[first].is_floating_point(), tensors[first].is_complex()):
            raise FileError(f"it does not fit this model: {name!r} is {tensors[first].dtype} in the file and {own.dtype} in the model")
        if first not in placed:
            value = tensors[first] if device is None else tensors[first].to(device)
            if layouts.get(first) == _SPARSE:
                value = value.to_sparse()
            elif first in layouts:
                value = value.contiguous(memory_format=_layout(layouts[first], value))
            placed[first] = nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
        holder[key] = placed[first]


def _layout(name: str, tensor: Tensor) -> torch.memory_format:
    layout = _LAYOUTS.get(name)
    if layout is None or tensor.ndim != (4 if layout is torch.channels_last else 5):
        raise FileError(f"its metadata are damaged: a tensor of shape {_shape(tensor)} is said to be laid out as {name[:40]!r}")
    return layout


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "a scalar"
