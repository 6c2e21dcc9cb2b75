"""Whether a trace that did without what earlier calls left computes what the model computes now."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.passes.compat import tree_leaves, tree_map

_CLOSE = 1e-3  # of the largest magnitude: another order of the same operations differs by less


class _Run(fx.Interpreter):
    """A traced graph on the tensors and modules of a model."""

    def __init__(self, graph: fx.Graph, model: nn.Module, constants: Mapping[str, torch.Tensor]) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.constants = constants

    def fetch_attr(self, target: str) -> Any:
        return self.constants[target] if target in self.constants else super().fetch_attr(target)


@torch.no_grad()
def agrees(
    model: nn.Module, graph: fx.Graph, constants: Mapping[str, torch.Tensor], example: tuple[tuple[Any, ...], dict[str, Any]]
) -> bool:
    """Run both, in evaluation mode, on copies and with the same random numbers. True where that cannot be judged, on meta for instance."""
    tensors = [t for t in (*tree_leaves(example), *model.parameters()) if isinstance(t, torch.Tensor)]
    if any(t.is_meta for t in tensors):
        return True
    try:
        wanted, found = (_results(one, model, graph, constants, example) for one in (False, True))
    except Exception:  # noqa: BLE001 - the user's code, or a copy that cannot be made; neither says anything of the trace
        return True
    pairs = list(zip(wanted, found, strict=False))
    return len(wanted) == len(found) and all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _results(traced: bool, model: nn.Module, graph: fx.Graph, constants: Mapping[str, torch.Tensor], example: Any) -> list[torch.Tensor]:
    twin = copy.deepcopy(model).eval()
    args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, example)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not traced:
            out = twin(*args, **kwargs)
        else:
            given = _by_name(twin, args, kwargs)
            out = _Run(graph, twin, constants).run(*(given.get(str(n.target)) for n in graph.nodes if n.op == "placeholder"))
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments under the names that the tracer gave them."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({f"{name}_{i}": v for i, v in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return found


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.numel() or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return bool(torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE * float(a.abs().max()), equal_nan=True))
