"""Experts that are modules of a list: each is weighed by a share of its own, and goes, code and tensors, where what it adds is left out."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.passes.ir.masks import is_mask
from fxprune.passes.ir.nodes import sources, target_name
from fxprune.passes.ir.traced import TracedModel
from fxprune.passes.ir.writes import memory, written
from fxprune.passes.labels.choices import Gate, Sum
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value

_MOVES = frozenset(
    {
        *("view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "t", "expand", "expand_as", "contiguous", "clone"),
        *("detach", "to", "float", "double", "type_as", "any", "sum", "T", "bool", "int", "long"),
    }
)
_TOTALS = frozenset({"any", "sum"})  # zero of zeros, and of none
_PICKS = frozenset({"getitem", "__getitem__"})
_PRODUCTS = frozenset({"mul", "multiply"})
_SUMS = frozenset({"add", "iadd", "add_"})
_HELD = "one channel fills a whole tensor"


def pin_gates(walk: LabelContext, labels: Iterable[int] | None) -> None:
    """What single channels weigh is read by something that cannot do without: they stay, as the place says where each is read alone."""
    wanted = set(labels or ())
    here = walk.node
    for gate in walk.gates if wanted else ():
        if gate.label in wanted:
            walk.node = gate.node
            walk.pin(np.array([gate.label], dtype=np.int64), _HELD)
    walk.node = here


def follow_gates(walk: LabelContext, node: fx.Node, args: Any, inputs: Sequence[Value], result: Any) -> Any:
    """``result`` of an operation on tensors that are zero where channels go: one that is zero too, or a sum that can do without."""
    name, first = target_name(node), args[0] if args else None
    weighed = [v for v in inputs if v.gone is not None]
    if name in ("where", "nonzero") and len(inputs) == 1 and weighed:
        empty = weighed[0].gone
        return replace(result, empty=empty) if isinstance(result, Value) else tuple(replace(v, empty=empty) for v in result)
    if (unwritten := _unwritten(node, args)) is not None:
        walk.sums.append(Sum(walk.mode, node, -1, unwritten))
        return result
    if any(v.empty is not None for v in inputs):  # what they pick is of use to the expert alone: settle_gates checks
        if name in _MOVES - _TOTALS | _PICKS and isinstance(first, Value) and isinstance(result, Value):
            return replace(result, empty=first.empty)
        return result
    if name in _PICKS and isinstance(first, Value) and isinstance(result, Value):
        return replace(result, gone=first.gone)  # maybe by a mask of the tokens that chose the expert: then of use to nothing else
    if not isinstance(result, Value):
        for value in weighed if not _asks_form(node, result) else ():
            pin_gates(walk, value.gone)
        return result
    if name in _MOVES and len(weighed) == 1 and weighed[0] is first:
        return replace(result, gone=weighed[0].gone)
    if name in _PRODUCTS and len(weighed) == 1 and len(inputs) <= 2:
        return replace(result, gone=weighed[0].gone)
    if name in _SUMS and len(args) == 2 and not node.kwargs:
        if len(inputs) == 1 and args[1 if first is weighed[0] else 0] == 0:  # where sum() starts
            return replace(result, gone=weighed[0].gone)
        if len(inputs) == 2 and _may_stand_alone(node):
            for place, value in enumerate(args):
                if value.gone is not None:
                    walk.sums.append(Sum(walk.mode, node, place, value.gone))
            labels = [value.gone for value in args if value.gone is not None]
            return replace(result, gone=labels[0] | labels[1]) if len(labels) == 2 else result
    for value in weighed:
        pin_gates(walk, value.gone)
    return result


def overwritten_gates(walk: LabelContext, target: fx.Node) -> None:
    """Something is written where the share of an expert may lie, which it may no longer be."""
    for gate in walk.gates:
        if gate.mode == walk.mode and memory(gate.node) == memory(target):
            pin_gates(walk, [gate.label])


def _unwritten(node: fx.Node, args: Any) -> frozenset[int] | None:
    """The labels without which ``node`` writes nothing into its first operand: it goes by positions, or a mask, of what chose them."""
    name = target_name(node)
    if node.target is operator.setitem:
        raw = list(node.args[1]) if isinstance(node.args[1], (tuple, list)) else [node.args[1]]
        given = list(args[1]) if isinstance(args[1], (tuple, list)) else [args[1]]
    elif name in ("index_add", "index_add_") and len(args) > 2:
        raw, given = [node.args[2]], [args[2]]
    else:
        return None
    found = set()
    for source, value in zip(raw, given, strict=True):
        if isinstance(value, Value) and value.empty is not None:
            found.add(value.empty)
        elif isinstance(value, Value) and value.gone is not None and isinstance(source, fx.Node) and is_mask(source.meta.get("val")):
            found.add(value.gone)
    return found.pop() if len(found) == 1 else None


def compared(walk: LabelContext, node: fx.Node, args: Any, result: Any) -> Any:
    """``result`` of a comparison of positions with the number of one expert: true nowhere where that expert goes."""
    if target_name(node) != "eq" or len(args) != 2 or not isinstance(result, Value) or ":" in walk.mode:
        return result
    first, number = args
    if not isinstance(first, Value) or first.picks is None or type(node.args[1]) is not int or not 0 <= number < len(first.picks):
        return result
    label = int(first.picks[number])
    walk.followed.append(first.picks)
    walk.gates.append(Gate(walk.mode, node, label))
    return replace(result, gone=frozenset({label}))


def _asks_form(node: fx.Node, result: Any) -> bool:
    return target_name(node) in ("size", "dim", "numel") or (node.target is getattr and not isinstance(result, Value))


def _may_stand_alone(node: fx.Node) -> bool:
    """Whether each operand has the form of the sum."""
    metas = [one.meta.get("val") for one in (node, *node.args) if isinstance(one, fx.Node)]
    return len(metas) == 3 and len({(tuple(m.shape), m.dtype) for m in metas if isinstance(m, torch.Tensor)}) == 1


@dataclass(frozen=True, eq=False)
class Gated:
    """What goes with experts that are modules. ``sums``: where what they add can be left out, by graph. ``nodes``: graph -> node -> the
    label with which it goes. ``tensors``: name of a tensor -> the label. ``labels``: all of them."""

    traced: TracedModel
    sums: Mapping[str, Sequence[Sum]]
    nodes: Mapping[str, Mapping[fx.Node, int]]
    tensors: Mapping[str, int]
    labels: frozenset[int]

    def dead(self, gone: Collection[int]) -> dict[str, set[fx.Node]]:
        """By graph, the nodes that are of no use without what the labels ``gone`` add."""
        return {mode: _dead(self.traced, mode, sums, gone) for mode, sums in self.sums.items()}

    def lost(self, dead: Mapping[str, set[fx.Node]]) -> set[str]:
        """The tensors that nothing but nodes of ``dead`` reads."""
        return _lost(self.traced, dead)


def settle_gates(walk: LabelContext) -> Gated | None:
    """The experts that may go as modules; single channels that are read alone elsewhere stay."""
    if not walk.gates and not walk.sums:
        return None
    find = walk.labels.find

    def root(label: int) -> int:
        return int(find(np.array([label]))[0])

    routed = {r for choice in walk.choices_among for r in find(choice.vector).tolist()}
    rooted = [replace(one, labels=frozenset(map(root, one.labels))) for one in walk.sums]
    sums = {mode: [one for one in rooted if one.mode == mode] for mode in walk.traced.graphs}
    gates: dict[int, list[Gate]] = {}
    for gate in walk.gates:
        gates.setdefault(root(gate.label), []).append(gate)
    named = {label for of in sums.values() for one in of for label in one.labels}
    regions = {mode: _Regions(walk.traced, mode, of) for mode, of in sums.items()} if routed & named else {}
    free: dict[int, tuple[dict[str, set[fx.Node]], set[str]]] = {}
    for label in sorted(routed & named):
        dead = {mode: one.of(label) for mode, one in regions.items()}
        if not all(dead.values()) or any(gate.node not in dead[gate.mode] for gate in gates.get(label, ())):
            continue
        lost = {name for mode, one in regions.items() for name in one.read(dead[mode]) if name in walk.traced.skeleton.aliases}
        lost = {name for name in lost if all(one.readers.get(name, set()) <= dead[mode] for mode, one in regions.items())}
        shares = {choice.node for choice in walk.choices_among if label in find(choice.vector)}
        # What is read of a logit, of which no share was computed, would be minus infinity where the expert goes.
        if lost and all(any(one in shares for one in sources(gate.node)) for gate in gates.get(label, ())):
            free[label] = dead, lost
    for label in sorted((named | set(gates)) - set(free)):
        if label in gates:
            pin_gates(walk, [gate.label for gate in gates[label]])
        else:
            walk.pin(np.array([label], dtype=np.int64), "what is stacked is read whole")
    if not free:
        return None
    nodes: dict[str, dict[fx.Node, int]] = {mode: {} for mode in sums}
    tensors: dict[str, int] = {}
    for label, (dead, lost) in free.items():
        for mode, of in dead.items():
            nodes[mode].update(dict.fromkeys(of, label))
        tensors.update(dict.fromkeys(lost, label))
    return Gated(walk.traced, sums, nodes, tensors, frozenset(free))


class _Regions:
    """For each label of one graph, the nodes that are of no use without it, found from the sums that can be cut on."""

    def __init__(self, traced: TracedModel, mode: str, sums: Sequence[Sum]) -> None:
        self._skeleton, self._sums = traced.skeleton, sums
        self._by_label: dict[int, list[Sum]] = {}
        for one in sums:
            if len(one.labels) == 1:  # what several add goes with all of them, which the sums behind it say
                self._by_label.setdefault(next(iter(one.labels)), []).append(one)
        self._sharing: dict[int | None, set[fx.Node]] = {}
        self._target: dict[fx.Node, fx.Node] = {}
        self.readers: dict[str, set[fx.Node]] = {}
        for node in traced.graphs[mode].nodes:
            self._sharing.setdefault(memory(node), set()).add(node)
            if (target := written(node, traced.skeleton.module)) is not None:
                self._target[node] = target
            for name in _tensors_of(traced, node):
                self.readers.setdefault(name, set()).add(node)
        self._names: dict[fx.Node, list[str]] = {}
        for name, nodes in self.readers.items():
            for node in nodes:
                self._names.setdefault(node, []).append(name)

    def read(self, nodes: Collection[fx.Node]) -> set[str]:
        """The tensors that nodes read."""
        return {name for node in nodes for name in self._names.get(node, ())}

    def of(self, label: int) -> set[fx.Node]:
        """The nodes that are of no use without ``label``; none where what they write may be read elsewhere."""
        cut: dict[fx.Node, set[fx.Node]] = {}
        for one in self._by_label.get(label, ()):
            operands = _operands(one.node)
            cut.setdefault(one.node, set()).update([operands[one.place]] if one.place >= 0 else one.node.all_input_nodes[1:])
            if one.place >= 0 and sum(other is operands[one.place] for other in operands) > 1:
                return set()
        dead: set[fx.Node] = set()
        todo = [node for nodes in cut.values() for node in nodes]
        while todo:
            node = todo.pop()
            if node in dead or node.op in ("placeholder", "output"):
                continue
            if all(user in dead or node in cut.get(user, ()) or self._only_writes(user, node) for user in node.users):
                written_to = [user for user in node.users if self._only_writes(user, node)]
                dead.add(node)
                dead.update(written_to)
                todo += [above for one in (node, *written_to) for above in one.all_input_nodes]
        for node in dead:
            target = self._target.get(node)
            shared = set() if target is None else {one for one in self._sharing.get(memory(target), ()) if memory(target) is not None}
            if not shared <= dead or (target is not None and (target not in dead or memory(target) is None)):
                return set()
        return dead

    def _only_writes(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether a node writes into another, and nobody reads what it gives."""
        return not user.users and user.op != "output" and self._target.get(user) is node


def _operands(node: fx.Node) -> list[Any]:
    """What a sum adds, or a stack stacks."""
    if target_name(node) == "stack":
        held: Any = node.args[0] if node.args else node.kwargs["tensors"]
        return list(held)
    return list(node.args)


def _tensors_of(traced: TracedModel, node: fx.Node) -> list[str]:
    """The names of the tensors that a node reads, itself or through the module that it calls."""
    skeleton = traced.skeleton
    if node.op == "get_attr":
        return [str(node.target)]
    if node.op != "call_module":
        return []
    module = skeleton.module(str(node.target))
    held = [tensor for _, tensor in (*module.named_parameters(), *module.named_buffers())]
    return [name for tensor in held if (name := skeleton.tensor_names.get(id(tensor))) is not None]


def _dead(traced: TracedModel, mode: str, sums: Sequence[Sum], gone: Collection[int]) -> set[fx.Node]:
    """The nodes of a graph that are of no use where ``gone`` go: nothing that is left reads them, and they write to nothing that is."""
    graph, module = traced.graphs[mode], traced.skeleton.module
    cut = {(one.node, one.place) for one in sums if one.labels <= set(gone)}
    if not cut:
        return set()
    cut_nodes = {node for node, _ in cut}
    unwritten = {node for node, place in cut if place < 0}

    def reads(node: fx.Node) -> list[fx.Node]:
        if node not in cut_nodes:
            return list(node.all_input_nodes)
        if node in unwritten:
            return [node.args[0]]  # type: ignore[list-item]
        operands = _operands(node)
        left = [one for place, one in enumerate(operands) if (node, place) not in cut]
        return [one for one in left if isinstance(one, fx.Node)]

    def of_use(roots: list[fx.Node]) -> set[fx.Node]:
        alive: set[fx.Node] = set()
        while roots:
            node = roots.pop()
            if node not in alive:
                alive.add(node)
                roots += reads(node)
        return alive

    ends = [node for node in graph.nodes if node.op in ("placeholder", "output")]
    writes = [(node, target) for node in graph.nodes if node not in unwritten and (target := written(node, module)) is not None]
    checks = [node for node in graph.nodes if target_name(node) in ("_assert", "_assert_async")]
    before = of_use(ends + checks)
    inside = {memory(node) for node in graph.nodes if node not in before and node.op != "get_attr"} - {memory(node) for node in before}
    lasting = [node for node, target in writes if target in before or memory(target) not in inside]
    alive = of_use(ends + checks + lasting)
    return {node for node in graph.nodes if node not in alive}


def _lost(traced: TracedModel, dead: Mapping[str, set[fx.Node]]) -> set[str]:
    read: set[str] = set()
    gone: set[str] = set()
    for mode, graph in traced.graphs.items():
        for node in graph.nodes:
            (gone if node in dead.get(mode, ()) else read).update(_tensors_of(traced, node))
    return {name for name in gone - read if name in traced.skeleton.aliases}
