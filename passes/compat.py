"""Names of torch that it keeps to itself, under names of ours, gathered so that a new version of torch breaks one file.

Nothing else in the project imports a private name of torch or reaches for one by its dotted name (``tests/test_layers.py``). What every
module and graph carries as an attribute (``_modules``, ``_parameters``, ``_schema``) is not in the list.
"""

from __future__ import annotations

import functools
import importlib
import keyword
import re
from typing import Any

import torch
from torch import fx
from torch._functorch import apis
from torch._jit_internal import boolean_dispatched
from torch.fx import _pytree as fx_pytree
from torch.fx import _symbolic_trace
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph_module import _forward_from_src as forward_from_source
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd as DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNormBase
from torch.testing import _comparison as close_errors_home
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

__all__ = [
    "CHECKS",
    "CLOSE_ERRORS",
    "WEIGHT_NORMS",
    "BatchNormBase",
    "ConvNd",
    "ConvTransposeNd",
    "DropoutNd",
    "HigherOrderOperator",
    "InstanceNormBase",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "PyTreeCodeGen",
    "ScriptFunction",
    "ScriptMethod",
    "TorchDispatchMode",
    "assert_true",
    "close_errors_home",
    "dispatched",
    "find_proxy",
    "forward_from_source",
    "fx_pytree",
    "fx_tracing",
    "many_compiled",
    "native_functions",
    "pack_padded",
    "pad_packed",
    "quote_keywords",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "unwritable",
    "vmap_home",
]

# Modules and classes in which tracing replaces a name; mypy is not to hold us to their types.
fx_tracing: Any = _symbolic_trace
vmap_home: Any = apis
ScriptFunction: Any = torch._C.ScriptFunction
ScriptMethod: Any = torch._C.ScriptMethod
FunctionBase: Any = torch._C._FunctionBase  # of what a Function gets as ``ctx``

find_proxy = _symbolic_trace._find_proxy

# Operators of ATen and of libraries: one overload, all overloads of a name, and those that take graphs.
OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
HigherOrderOperator = torch._ops.HigherOrderOperator

# Functions that public ones call, and that traces hence hold.
native_functions: Any = torch._C._nn
assert_true: Any = torch._assert
pack_padded: Any = torch._VF._pack_padded_sequence
pad_packed: Any = torch._VF._pad_packed_sequence
CLOSE_ERRORS = "not_close_error_metas"  # of which assert_close raises the first
CHECKS = ("_check", "_check_with", "_check_tensor_all", "_check_tensor_all_with", "_check_index", "_check_value", "_check_is_size")
WEIGHT_NORMS: tuple[Any, ...] = (torch._weight_norm,) if hasattr(torch, "_weight_norm") else ()  # what the old weight_norm calls


def dispatched(function: Any) -> Any:
    """The function with a signature behind one that chooses between two by an argument (``F.max_pool2d`` by ``return_indices``)."""
    return boolean_dispatched[function]["if_false"] if function in boolean_dispatched else function


def quote_keywords(graph: fx.Graph) -> None:
    """Let the code of ``graph`` reach modules named by Python's keywords (``nn.ModuleDict({"in": ...})``): fx writes ``self.d.in``."""
    targets = {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}
    wrong = sorted((t for t in targets if any(map(keyword.iskeyword, t.split(".")))), key=len, reverse=True)
    codegen: Any = graph._codegen
    if wrong:
        codegen._body_transformer = functools.partial(_quoted, [(_path(t, False), _path(t, True)) for t in wrong])


def unwritable(graph: fx.Graph) -> str | None:
    """A module or tensor of ``graph`` that the code of fx by itself does not reach: it has a keyword in its name, or is called "self"."""
    targets = (str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module"))
    return next((t for t in targets if t == "self" or any(map(keyword.iskeyword, t.split(".")))), None)


def _path(target: str, keywords: bool) -> str:
    """``target`` as code, as fx writes it or with keywords quoted too."""
    code = "self"
    for part in target.split("."):
        quoted = not part.isidentifier() or (keywords and keyword.iskeyword(part))
        code = f'getattr({code}, "{part}")' if quoted else f"{code}.{part}"
    return code


def _quoted(pairs: list[tuple[str, str]], body: list[str]) -> list[str]:
    for wrong, right in pairs:
        body = [re.sub(rf"{re.escape(wrong)}(?![\w.])", lambda _, right=right: right, line) for line in body]  # type: ignore[misc]
    return body


def many_compiled() -> Any:
    """In the block ``torch.compile`` makes hundreds of forms of one code before it gives up: slim networks share their ``forward``."""
    config: Any = importlib.import_module("torch._dynamo.config")  # torch loads it when something is compiled
    return config.patch(recompile_limit=512, accumulated_recompile_limit=4096)
