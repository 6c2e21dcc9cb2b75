"""Names of torch that it keeps to itself, gathered so that a new version of torch breaks one file."""

from __future__ import annotations

import functools
import keyword
import re
from typing import Any

import torch
from torch import fx
from torch._functorch import apis
from torch._jit_internal import boolean_dispatched
from torch.fx import _symbolic_trace

# Modules and classes in which tracing replaces a name; mypy is not to hold us to their types.
fx_tracing: Any = _symbolic_trace
vmap_home: Any = apis
ScriptFunction: Any = torch._C.ScriptFunction
ScriptMethod: Any = torch._C.ScriptMethod

find_proxy = _symbolic_trace._find_proxy


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
