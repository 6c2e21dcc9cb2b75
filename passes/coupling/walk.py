"""Labels: which channel each slice of a tensor is, and the walk that carries them through the graph.

A ``Value`` stands for a tensor. For each axis that carries channels it holds one label per index; an axis without labels has a
fixed size. A slice of the tensor goes when its label goes, so what is left is a rectangle by construction. Labels that must go
together are united in a union-find (``Labels``); labels that must stay are pinned, with the reason.

Operations that only move elements are run literally on label tensors; where a result would vary along two axes of one original
axis (a view into heads and head dimension, a channel shuffle), ``rectangles`` picks the axis and unites each slice along it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.utils.rnn import PackedSequence

from fxprune.errors import FAULTS, FxPruneError, first_line
from fxprune.passes.coupling.choices import settle_choices
from fxprune.passes.coupling.gates import compared, follow_gates, overwritten_gates, pin_gates
from fxprune.passes.ir.nested import has_tensor, packed, tensors
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.ir.objects import made_object
from fxprune.passes.ir.outputs import Outputs, chosen, left_out
from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.passes.ir.traced import TracedModel
from fxprune.passes.ir.writes import changes_container, written
from fxprune.passes.labels.choices import JOINING, carried, left_behind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, lift, values
from fxprune.passes.rules import binding, registry
from fxprune.passes.rules.layer_specs import called_again, channel_dims
from fxprune.passes.tracing.sizes.axis_origin import same_axis
from fxprune.passes.tracing.sizes.fixed_sizes import is_fixed
from fxprune.passes.tracing.sizes.other_sizes import Shapes, shapes_at_other_sizes


class Walk(LabelContext):
    """One interpretation of the traced graphs with labels; see the module's docstring."""

    def __init__(
        self,
        traced: TracedModel,
        attention: str = "auto",
        fixed: Iterable[tuple[str, int]] = (),
        forced: dict[str, str] | None = None,
        outputs: Outputs | None = None,
        experts: bool = False,
    ) -> None:
        """``outputs``: which of what the network returns keep their widths; None: all. ``experts``: whether whole experts may go."""
        super().__init__(traced, attention, fixed, forced, channel_dims)
        self.outputs, self.experts = outputs, experts
        self.narrower: dict[str, list[Value]] = {}  # what is returned beside ``outputs``

    def run(self) -> Walk:
        for mode, graph in self.traced.graphs.items():
            env: dict[fx.Node, Any] = {}
            self.mode = mode
            self.env[mode] = env
            self.costs[mode] = []
            for node in graph.nodes:
                self.node = node
                env[node] = result = self._step(node, env)
                target = written(node, self.traced.skeleton.module)
                if target is not None and isinstance(result, Value):
                    self.overwritten(target, result.zero)
                if target is not None:
                    overwritten_gates(self, target)
        settle_choices(self, self.experts)
        self.node = None
        self._real.clear()  # masks and tables; the few that a rewrite asks for are made again
        return self

    def is_fixed(self, node: Any, axis: int) -> bool:
        return is_fixed(node, axis, self.traced.skeleton.module)

    def is_size_of(self, size: fx.Node, node: fx.Node, axis: int) -> bool:
        if super().is_size_of(size, node, axis):
            return True
        if target_name(size) != "size" or size.meta["val"] != node.meta["val"].shape[axis]:
            return False
        read: Any = size.args[0]
        other: Any = size.args[1]
        module = self.traced.skeleton.module
        return same_axis(read, other % read.meta["val"].ndim, module) == same_axis(node, axis, module)

    def other_shapes(self, node: fx.Node) -> tuple[Shapes, ...] | None:
        return shapes_at_other_sizes(node.graph, self.traced) if node.graph is self.traced.graphs[self.mode] else None

    def _step(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        value = node.meta.get("val")
        if node.op == "placeholder":
            return lift(
                value, Reason(ReasonKind.INPUT, f"it comes from {self._edge('input', f' {node.name!r}')}", name=node.name, part=self._part)
            )
        if node.op == "get_attr":
            return self.attribute(str(node.target)) if isinstance(value, torch.Tensor) else value
        args = map_arg(node.args, env.__getitem__)
        kwargs = map_arg(node.kwargs, env.__getitem__)
        if node.op == "output" or node.target is made_object:
            for found in values(self._kept_whole(node, args)):
                for vector in found.axes.values():
                    self.labels.pin(vector, Reason(ReasonKind.OUTPUT, f"it reaches {self._edge('output')}", part=self._part))
                pin_gates(self, found.gone)
                if found.picks is not None:
                    text = f"positions of what is chosen among them reach {self._edge('output')}"
                    self.labels.pin(found.picks, Reason(ReasonKind.CHOICE, text, part=self._part))
            return value
        if "body" in node.meta:
            return self._checked(node, self._body(node, env))
        inputs = list(values((args, kwargs)))
        if not inputs and not has_tensor(value):
            return value
        if changes_container(node) and isinstance(args[0], (list, dict)):
            return self._changed(node, args, kwargs)
        if isinstance(node.target, type) and node.target not in (int, float):  # a named tuple or a dataclass is built
            return packed(*args) if node.target is PackedSequence else node.target(*args, **kwargs)
        module = self.traced.skeleton.module(str(node.target)) if node.op == "call_module" else None
        if module is not None:
            rule = registry.module_rule(module) if str(node.target) not in self.traced.opaque else None
        else:
            rule = registry.METHODS.get(str(node.target)) if node.op == "call_method" else registry.function_rule(node.target)
        if rule is not None:
            self.followed = []
            return self._positions(node, args, kwargs, inputs, self._ruled(rule, node, module, args, kwargs, inputs))
        return self._positions(node, args, kwargs, inputs, self._unruled(node, module, value, inputs))

    def _changed(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a change of a list or a dictionary gives, which is made here too. Whoever gave ``forward`` one sees what is put into it."""
        source: Any = node.args[0]
        while source.target is operator.getitem:
            source = source.args[0]
        for found in values((args[1:], kwargs)) if source.op == "placeholder" else ():
            self.pin_all(found, f"it is put into a {type(args[0]).__name__} that comes from outside", ReasonKind.OUTPUT)
            self.pin(found.picks, "positions of what is chosen among them are put there", ReasonKind.CHOICE)
            pin_gates(self, found.gone)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _unruled(self, node: fx.Node, module: nn.Module | None, value: Any, inputs: Sequence[Value]) -> Any:
        """What an operation without a rule gives."""
        if module is None and not has_tensor(value):
            return value  # a number computed from tensors (a dtype, a device): nothing to carry
        if module is not None and (why := self.traced.opaque.get(str(node.target))) is not None:
            return self.opaque(node, inputs, f"{self.op_name()} could not be traced: {why}", ReasonKind.UNTRACED)
        return self.opaque(node, inputs)

    def _positions(self, node: fx.Node, args: Any, kwargs: Any, inputs: list[Value], result: Any) -> Any:
        """``result`` with what it holds of positions among channels; where the operation does not follow them, the channels stay."""
        if any(v.gone is not None or v.empty is not None for v in inputs):
            result = follow_gates(self, node, args, inputs, result)
        if all(v.picks is None for v in inputs):
            return result
        first = args[0] if args else kwargs.get("input")
        if node.target in (operator.getitem, getattr) and not isinstance(first, Value):
            return result  # one of several results is taken
        if target_name(node) in JOINING and isinstance(first, (list, tuple)):
            together = [v.picks for v in first if isinstance(v, Value) and v.picks is not None]
            if len(together) == len(first) and len({len(vector) for vector in together}) == 1:
                for vector in together:
                    self.unite(together[0], vector)
                    self.followed.append(vector)
        result = compared(self, node, args, result)
        followed = {id(vector) for vector in self.followed}
        for value in left_behind(node, first, inputs, result):
            if id(value.picks) not in followed:
                self.pin(value.picks, "positions of what is chosen among them are read", ReasonKind.CHOICE)
        return carried(node, first, result)

    def _kept_whole(self, node: fx.Node, args: Any) -> Any:
        """What keeps its width of what a node returns, or makes to be returned: all, or what ``outputs`` names."""
        if self.outputs is None or self._part:
            return args
        returned = next(iter(reversed(node.graph.nodes))).args[0]
        if node.op == "output" or returned is node:  # an object that is all that is returned: its attributes are the parts
            parts = args[0] if node.op == "output" else args[1]
            for name, part in left_out(parts, self.outputs):
                self.narrower.setdefault(name, []).extend(values(part))
            return chosen(parts, self.outputs)
        if node in _nodes(chosen(returned, self.outputs)):
            return args
        for name, part in left_out(returned, self.outputs):
            if node in _nodes(part):
                self.narrower.setdefault(name, []).extend(values(args))
        return ()

    def _ruled(self, rule: registry.Rule, node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any, inputs: Sequence[Value]) -> Any:
        """What a rule says. One that fails, ours or the user's, says nothing: what the operation touches stays whole."""
        out = kwargs.get("out")
        try:
            result = self._checked(node, self._asked(rule, node, module, args, kwargs))
            if module is not None:
                called_again(self, node, module, inputs, values(result))
            return result if out is None else self._into(node, out, result)
        except FxPruneError:
            raise
        except FAULTS as error:
            self.followed = []
            text = f"its rule failed ({type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'})"
            self.unknown.setdefault(f"{self.op_name()}: {text}", self.where())
            return self.opaque(node, inputs, text, ReasonKind.RULE_FAILED)

    def _asked(self, rule: registry.Rule, node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
        self.given = values((args, {key: value for key, value in kwargs.items() if key != "out"}))
        fixed = (self, node) if module is None else (self, node, module)
        if not rule.bound and binding.takes(rule.infer, fixed, args, kwargs):
            return rule.infer(*fixed, *args, **kwargs)
        arguments = binding.form_of(node, module).arguments(args, kwargs)
        if module is None:
            arguments.pop("out", None)
        return binding.call(rule.infer, fixed, arguments)

    def _into(self, node: fx.Node, out: Any, result: Any) -> Any:
        """``out=``: the result is written into tensors that are there already, so the channels of both are the same."""
        for target, made in zip(values(out), values(result), strict=True):
            self.pin(made.picks, "positions of what is chosen among them are written", ReasonKind.CHOICE)
            pin_gates(self, made.gone)
            if target.shape != made.shape:
                self.pin_all(target, "it is resized to hold a result", ReasonKind.ASSIGNED)
                self.pin_all(made, "it is written into a tensor of another size", ReasonKind.ASSIGNED)
            else:
                self.combine(made.shape, [target, made])
        free = [
            Value(m.shape, {a: v for a, v in m.axes.items() if a in t.axes}, m.zero, m.why)
            for t, m in zip(values(out), values(result), strict=True)
        ]
        return tuple(free) if isinstance(result, tuple) else free[0]

    def _body(self, call: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """What a call gives whose code was traced aside: its labels, carried through that code."""
        given: list[Any] = []
        map_arg(call.args, lambda n: given.append(env[n]))
        inner: dict[fx.Node, Any] = {}
        *nodes, output = call.meta["body"].nodes
        for node in nodes:
            self.node = node
            inner[node] = given.pop(0) if node.op == "placeholder" else self._step(node, inner)
        return map_arg(output.args[0], inner.__getitem__)

    @property
    def _part(self) -> str:
        return self.mode.rpartition(":")[0]

    def _edge(self, what: str, name: str = "") -> str:
        """The network's input or output, or that of the part of it that the walk is in."""
        part = self._part
        return f"the {what}{name} of {part!r}, a part traced by itself" if part else f"the network's {what}{name}"

    def _checked(self, node: fx.Node, result: Any) -> Any:
        for value, meta in zip(values(result), tensors(node.meta.get("val")), strict=True):
            if tuple(value.shape) != tuple(meta.shape):
                raise AssertionError(f"{node.name}: a rule gave shape {tuple(value.shape)}, the operation {tuple(meta.shape)}")
            for axis, vector in value.axes.items():
                if len(vector) != value.shape[axis]:
                    raise AssertionError(f"{node.name}: {len(vector)} labels on axis {axis} of size {value.shape[axis]}")
        return result


def _nodes(nested: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(nested, found.append)
    return found
