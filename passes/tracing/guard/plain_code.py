"""Code that a trace cannot get wrong, by its bytecode: it calls layers and functions and computes, and asks nothing of what it holds.

Most networks are written so. The comparison with a run, which costs two forward passes, is left to the others.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fxprune.passes.compat import OpOverloadPacket
from fxprune.passes.ir.contents import is_foreign
from fxprune.passes.tracing.side_effects.reachable import Reach, codes, held

# Handlers and blocks, what is kept or filled, and membership: the code may go another way, or be another thing the next time.
_OPCODES = frozenset(
    dis.opmap[name]
    for name in (
        *("POP_EXCEPT", "SETUP_FINALLY", "SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL", "MATCH_CLASS", "MATCH_MAPPING"),
        *("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR", "IMPORT_NAME"),
    )
    if name in dis.opmap
)
# Names by which code asks what it holds, or the process, rather than computing with it.
_NAMES = frozenset(
    {
        *("str", "repr", "format"),
        *("id", "hash", "type", "callable", "globals", "locals", "vars", "dir", "hasattr", "setattr", "delattr", "eval", "exec", "compile"),
        *("__dict__", "__setattr__", "__class__", "__name__", "_modules", "_parameters", "_buffers", "data_ptr", "untyped_storage"),
        *("is_meta", "is_cuda", "is_cpu", "storage", "is_contiguous", "layout", "data"),
        *("item", "tolist", "numpy", "cpu", "register_buffer", "register_forward_hook", "register_forward_pre_hook", "add_module"),
        *("environ", "getenv", "random", "seed", "time", "perf_counter", "next", "iter", "state_dict", "is_fx_tracing", "is_compiling"),
        *("get_rng_state", "set_rng_state", "current_device", "is_available", "modules", "named_modules", "children"),
        *(
            "named_parameters",
            "parameters",
            "named_buffers",
            "buffers",
            "named_children",
            "get_submodule",
            "get_parameter",
            "vmap",
            "train",
        ),
    }
)
_TELEMETRY = frozenset({"_log_api_usage_once"})  # of torchvision: it asks for types and computes nothing
_SPECIAL = frozenset({"__call__", "__getattr__", "__getattribute__", "__torch_function__", "_call_impl", "train", "__new__", "__len__"})
_IS, _IN, _CONST, _CACHE, _WIDE = (dis.opmap.get(name, -1) for name in ("IS_OP", "CONTAINS_OP", "LOAD_CONST", "CACHE", "EXTENDED_ARG"))
_VALUES = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, types.ModuleType)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, staticmethod, classmethod, OpOverloadPacket)


def is_plain(modules: Iterable[nn.Module], reach: Reach) -> bool:
    """Whether all that the forward passes of ``modules`` can reach is such code, and nothing hooks into them."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ or "parametrizations" in module._modules:
            return False
    if any(_SPECIAL & cls.__dict__.keys() for cls in reach.classes if not issubclass(cls, tuple)):
        return False
    for owner, name in reach.places.values():
        try:
            value = held(owner, name)
        except ValueError:  # an empty cell
            continue
        if not _is_code(value):
            return False
    return all(_plain(f.__code__) for f in reach.functions if f.__name__ not in ("__init__", *_TELEMETRY))


def _is_code(value: Any) -> bool:
    """What has no state that a trace could mistake: numbers and names, functions and classes, and tuples of them."""
    if isinstance(value, tuple):
        return all(map(_is_code, value))
    return isinstance(value, (*_VALUES, *_CODE, property)) or (callable(value) and is_foreign(type(value)))


@functools.cache
def _plain(code: types.CodeType) -> bool:
    for part in codes(code):
        if _NAMES & set(part.co_names):
            return False
        raw = part.co_code
        operations = raw[::2]
        if _OPCODES & set(operations):
            return False
        if (_IS in operations or _IN in operations) and not _asks_for_constants(raw, part.co_consts):
            return False
    return True


def _asks_for_constants(raw: bytes, constants: tuple[Any, ...]) -> bool:
    """Whether every ``is`` compares with None, True or False, and every ``in`` looks into a tuple that stands there."""
    last: Any = Ellipsis
    wide = 0
    for at in range(0, len(raw), 2):
        operation = raw[at]
        if operation == _CACHE:
            continue
        if operation == _WIDE:
            wide = (wide | raw[at + 1]) << 8
            continue
        if operation == _IS and last is not None and last is not True and last is not False:
            return False
        if operation == _IN and not isinstance(last, (tuple, frozenset, str)):
            return False
        last = constants[wide | raw[at + 1]] if operation == _CONST else Ellipsis
        wide = 0
    return True
