"""Whether a traced graph, with nothing pruned, computes on the example what the model computes: the second line of defence.

A trace follows Python code with stand-ins for tensors and modules. Whatever makes that code take another path than it takes in a run shows
here, of whatever kind it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import FAULTS, first_line
from fxprune.passes.compat import tree_map
from fxprune.passes.ir.nested import tensors
from fxprune.passes.ir.nodes import CHOOSING, target_name
from fxprune.passes.ir.outputs import returned_tensors
from fxprune.passes.tracing.guard.untouched import WritesWeights, untouched
from fxprune.passes.tracing.side_effects.reachable import Reach, reachable

_CLOSE = 1e-3  # of the largest magnitude: another order of the same operations differs by less
_ROUNDINGS = 16  # or so many times the precision of the dtype
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """``gap``: the largest relative difference of an output; infinite where the forms differ or the graph fails. ``where``: file:line of
    the first layer that differs, or empty. ``why``: what the graph's failure says, or empty. ``chooses``: the graph chooses among
    values (top-k, comparisons), so that a difference in rounding may have become a large one."""

    gap: float
    where: str
    why: str
    chooses: bool

    def __str__(self) -> str:
        at = f"{self.where}: " if self.where else ""
        how = f"fails ({self.why})" if self.why else "gives another form" if math.isinf(self.gap) else f"differs by {self.gap:.1e}"
        return f"{at}on the example the traced graph {how}, while the model itself computes something else"


class _Run(fx.Interpreter):
    """A traced graph on the tensors and modules of a model. ``seen``: called with every module call's node and result."""

    def __init__(
        self, graph: fx.Graph, model: nn.Module, constants: Mapping[str, torch.Tensor], seen: Callable[[fx.Node, Any], None] | None = None
    ) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.constants, self.seen = constants, seen

    def fetch_attr(self, target: str) -> Any:
        return self.constants[target] if target in self.constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.seen is not None and n.op == "call_module":
            self.seen(n, result)
        return result


class Comparison:
    """A model and the graph of it (or of the part at ``path``) on one example. ``constants``: what the graph holds beside the model;
    ``others``: the modules that are in another mode than the whole, and their flag."""

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        constants: Mapping[str, torch.Tensor],
        example: Call,
        reach: Reach,
        training: bool,
        others: Mapping[str, bool],
    ) -> None:
        self.model, self.graph, self.constants, self.example = model, graph, constants, example
        self.reach, self.training, self.others = reach, training, others

    def difference(self, writing: bool = False) -> Difference | None:
        """None where the two agree, and where nobody can judge: on meta, where the model fails, where no seed makes it repeat itself.

        ``writing``: a graph that writes into weights, where the model does not, differs; otherwise nobody can judge it.
        """
        if on_meta(self.model, self.example):
            return None
        wanted = self._original()
        if wanted is None:
            return None
        chooses = any(target_name(node) in CHOOSING for node in self.graph.nodes)
        try:
            found = self._traced()
        except FAULTS as error:
            if isinstance(error, WritesWeights) and not writing:
                return None
            return Difference(math.inf, "", first_line(error), chooses)
        gap = _gap(wanted, found)
        if gap == 0:
            return None
        again = self._original()
        if again is None or _gap(wanted, again) > 0:
            return None
        return Difference(gap, self._first(), "", chooses)

    def _original(self, hooks: Callable[[], list[Any]] = list) -> list[torch.Tensor] | None:
        """What the model gives, or None where it fails or writes into its weights."""
        args, kwargs = _cloned(self.example)
        handles: list[Any] = []
        try:
            with untouched(self.model, self.reach, self.training) as guard:
                self._hold()
                handles = hooks()
                found = [t.clone() for t in returned_tensors(self.model(*args, **kwargs))]
        except Exception:  # noqa: BLE001 - the user's code: whatever it raises, there is nothing to compare with
            return None
        finally:
            for handle in handles:
                handle.remove()
        return None if guard.written else found

    def _traced(self, seen: Callable[[fx.Node, Any], None] | None = None) -> list[torch.Tensor]:
        args, kwargs = _cloned(self.example)
        given = by_name(self.model, args, kwargs)
        with untouched(self.model, self.reach, self.training):
            self._hold()
            run = _Run(self.graph, self.model, self.constants, seen)
            out = run.run(*(given.get(str(n.target)) for n in self.graph.nodes if n.op == "placeholder"))
            return [t.clone() for t in returned_tensors(out)]

    def _hold(self) -> None:
        for name, flag in self.others.items():
            self.model.get_submodule(name).training = flag

    def _first(self) -> str:
        """Where the first layer is called whose result differs: file:line, or empty."""
        layers: dict[str, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                layers.setdefault(str(node.target), node)
        wanted: dict[fx.Node, list[torch.Tensor]] = {}
        found: dict[fx.Node, list[torch.Tensor]] = {}

        def hooks() -> list[Any]:
            return [self.model.get_submodule(name).register_forward_hook(_keeping(wanted, node)) for name, node in layers.items()]

        self._original(hooks)
        self._traced(lambda node, out: _keep(found, node, out))
        nodes = layers.values()
        first = next((n for n in nodes if n in found and (n not in wanted or _gap(wanted[n], found[n]) > 0)), None)
        return "" if first is None else str(first.meta.get("where") or "")


def _keep(found: dict[Any, list[torch.Tensor]], key: Any, out: Any) -> None:
    """Copies of the tensors that the first call gave."""
    if key not in found:
        found[key] = [t.clone() for t in returned_tensors(out)]


def _keeping(found: dict[Any, list[torch.Tensor]], key: Any) -> Callable[..., None]:
    return lambda module, args, out: _keep(found, key, out)


def difference_of_slim(model: nn.Module, slim: nn.Module, example: Call, parts: Sequence[str]) -> tuple[str, str]:
    """What is wrong in evaluation with a network whose ``parts`` are graphs, nothing of it pruned, and the first of them that differs;
    empty where nothing is, and where it is none of them."""
    reach = reachable(dict.fromkeys(model.modules()))

    def run(one: nn.Module) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
        args, kwargs = _cloned(example)
        seen: dict[str, list[torch.Tensor]] = {}

        handles: list[Any] = []
        try:
            with untouched(one, reach, False):
                handles = [one.get_submodule(path).register_forward_hook(_keeping(seen, path)) for path in parts]
                return [t.clone() for t in returned_tensors(one(*args, **kwargs))], seen
        finally:
            for handle in handles:
                handle.remove()

    if on_meta(model, example):
        return "", ""
    try:
        wanted, inside = run(model)
    except Exception:  # noqa: BLE001 - the user's code: whatever it raises, there is nothing to compare with
        return "", ""
    try:
        found, slim_inside = run(slim)
    except FAULTS as error:
        return f"with nothing pruned the slim network fails on the example: {first_line(error)}", ""
    gap = _gap(wanted, found)
    if gap == 0 or _gap(wanted, run(model)[0]) > 0:
        return "", ""
    first = next((path for path in inside if path in slim_inside and _gap(inside[path], slim_inside[path]) > 0), "")
    where = f", first in its part {first!r}" if first else ", in the code around its parts, which knows modules by what they are"
    return f"with nothing pruned the slim network differs by {gap:.1e} from the model on the example{where}", first


def on_meta(model: nn.Module, example: Call) -> bool:
    """Whether weights or inputs have no values."""
    return any(t.is_meta for t in (*tensors(example), *model.parameters(), *model.buffers()))


def another(example: Call) -> Call:
    """Inputs of the same shapes with other numbers, the same each time; integers and flags stay, which may stand for one another."""
    generator = torch.Generator().manual_seed(0)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.is_meta or value.layout is not torch.strided:
            return value
        noise = torch.randn(value.shape, generator=generator).to(value)
        return value.detach() + noise * (value.detach().std(correction=0) / 2 if value.numel() > 1 else 1)

    moved_args, moved_kwargs = tree_map(moved, example)
    return moved_args, moved_kwargs


def _cloned(example: Call) -> Call:
    cloned: Call = tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, example)
    return cloned


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
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


def _gap(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The largest difference beyond rounding, relative to the largest magnitude of its tensor; 0 where all agree."""
    if len(wanted) != len(found):
        return math.inf
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        if a.shape != b.shape:
            return math.inf
        if not a.numel() or a.layout is not torch.strided or torch.equal(a, b):
            continue
        if not (a.is_floating_point() or a.is_complex()):
            return math.inf
        close = max(_CLOSE, _ROUNDINGS * torch.finfo(a.dtype).eps)
        scale = float(a.abs().nan_to_num(0, 0, 0).max())
        if not torch.allclose(a, b, rtol=close, atol=close * scale, equal_nan=True):
            worst = max(worst, float((a - b).abs().nan_to_num(math.inf).max()) / (scale + 1e-12))
    return worst
