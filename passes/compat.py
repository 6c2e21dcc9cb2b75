"""Names of torch that it keeps to itself, gathered so that a new version of torch breaks one file."""

from __future__ import annotations

from typing import Any

import torch
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
