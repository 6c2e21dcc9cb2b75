"""Whether a module, traced, computes what a slim graph computes: node for node, each number where it is used.

Three graphs are laid side by side: the original's, its rewrite, and that of the user's class with fewer channels. The last has to be the
first in structure, so that it stays as dynamic, and the second in every number that reaches a tensor operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxprune.passes.ir.nested import has_tensor, tensors
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.labels.values import values
from fxprune.passes.rewriting.literal_changes import FACTORIES, SPLITS, VIEWS, leaves
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.rules.moving.indexing import entries_of

# What these compute is said by the shapes of what goes in and of what comes out.
_BY_SHAPE = VIEWS | SPLITS | FACTORIES | {"unflatten", "squeeze"}


@dataclass(frozen=True)
class Difference:
    """Where a kept class departs from the slim graph. ``node``: of the original's graph, None where one graph is longer."""

    node: fx.Node | None
    path: bool = False  # another operation is run
    found: Any = None
    wanted: Any = None


class Agreement:
    """One mode's comparison; ``difference()`` is the first departure, or None."""

    def __init__(self, slimmer: Slimmer, mode: str, old: fx.Graph, new: fx.Graph, kept: fx.Graph) -> None:
        self.slimmer, self.known = slimmer, slimmer.graph.values[mode]
        self.old, self.kept = old, kept
        self.copied = slimmer.copied
        self.new = {self.copied[node]: node for node in new.nodes if node in self.copied}
        self._numbers: dict[fx.Node, Any] = {}

    def difference(self) -> Difference | None:
        twin: dict[fx.Node, fx.Node] = {}  # node of the kept class -> of the original
        theirs = list(self.kept.nodes)
        for i, old in enumerate(self.old.nodes):
            if i >= len(theirs) or (old.op, _called(old)) != (theirs[i].op, _called(theirs[i])):
                return Difference(old, path=True)
            twin[theirs[i]] = old
            found = self._at(old, theirs[i], twin)
            if found is not None:
                return found
        return Difference(None, path=True) if len(theirs) > len(twin) else None

    def _at(self, old: fx.Node, kept: fx.Node, twin: Mapping[fx.Node, fx.Node]) -> Difference | None:
        mine, theirs = list(leaves((old.args, old.kwargs))), list(leaves((kept.args, kept.kwargs)))
        if len(mine) != len(theirs):
            return Difference(old, path=True)
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(a, fx.Node) != isinstance(b, fx.Node) or isinstance(b, fx.Node) and twin[b] is not a:
                return Difference(old, path=True)
        if target_name(old) == "_assert":
            return None if not isinstance(kept.args[0], fx.Node) or kept.args[0].meta.get("val", True) else Difference(old)
        shaped = self._shape(old, kept)
        if shaped is not None:
            return shaped
        given = old.meta.get("val")
        if old.op in ("placeholder", "get_attr") or old.op != "output" and given is not None and not has_tensor(given):
            return None  # a number: it is compared where it is used
        if target_name(old) in _BY_SHAPE and not _other_numbers(old, mine, theirs):
            return None
        return self._arguments(old, kept, twin)

    def _shape(self, old: fx.Node, kept: fx.Node) -> Difference | None:
        for value, tensor in zip(values(self.known.get(old)), tensors(kept.meta.get("val")), strict=False):
            wanted = tuple(self.slimmer.count(value, axis) for axis in range(value.ndim))
            if wanted != tuple(tensor.shape):
                return Difference(old, found=tuple(tensor.shape), wanted=wanted)
        return None

    def _arguments(self, old: fx.Node, kept: fx.Node, twin: Mapping[fx.Node, fx.Node]) -> Difference | None:
        new = self.new.get(old, old)
        if (new.op, _called(new)) != (old.op, _called(old)):
            return Difference(old, wanted=_called(new), found=_called(old))
        mine = _plain((new.args, new.kwargs), self._argument)
        theirs = _plain((kept.args, kept.kwargs), lambda n: n.meta["val"] if _is_number(twin[n].meta.get("val")) else _Same(twin[n]))
        if mine == theirs:
            return None
        if target_name(old) in ("getitem", "__getitem__", "setitem"):
            x = values(self.known.get(old.args[0]))  # type: ignore[arg-type]
            if x:
                shape = [self.slimmer.count(x[0], axis) for axis in range(x[0].ndim)]
                places = [_places(side[0][1], shape) for side in (mine, theirs)]
                if places[0] == places[1]:
                    mine, theirs = [_without_index(side) for side in (mine, theirs)]
        pairs = list(zip(leaves(mine), leaves(theirs), strict=False))
        wrong = next(((a, b) for a, b in pairs if a != b), None)
        if wrong is None and len(list(leaves(mine))) == len(list(leaves(theirs))):
            return None
        return Difference(old, wanted=wrong[0] if wrong else None, found=wrong[1] if wrong else None)

    def _argument(self, node: fx.Node) -> Any:
        return self._number(node) if self._counts(node) else _Same(self._old(node) or node)

    def _old(self, node: fx.Node) -> fx.Node | None:
        """The original's node; of what the rewrite swept away the original's own arguments are asked for."""
        return node if node.graph is self.old else self.copied.get(node)

    def _counts(self, node: fx.Node) -> bool:
        """Whether a node of the rewrite gives a number; one that it added does, if it computes with numbers."""
        old = self._old(node)
        if old is not None:
            return _is_number(old.meta.get("val"))
        return node.op == "call_function" and bool(node.all_input_nodes) and all(self._counts(n) for n in node.all_input_nodes)

    def _number(self, node: fx.Node) -> Any:
        """The number that a node of the rewrite stands for."""
        if node in self._numbers:
            return self._numbers[node]
        found: Any
        if node.op == "call_method" and node.target == "size" and len(node.args) == 2:
            source, axis = node.args
            value = self.known[self._old(source)]  # type: ignore[index, arg-type]
            found = self.slimmer.count(value, int(axis) % value.ndim)  # type: ignore[arg-type]
        elif node.op == "call_function" and all(self._counts(n) for n in node.all_input_nodes) and node.all_input_nodes:
            found = node.target(*_plain(node.args, self._number), **_plain(node.kwargs, self._number))  # type: ignore[operator]
        else:
            found = self._old(node).meta["val"]  # type: ignore[union-attr]
        self._numbers[node] = found
        return found


@dataclass(frozen=True)
class _Same:
    """A tensor among arguments: the node of the original's graph."""

    node: fx.Node

    def __repr__(self) -> str:
        return self.node.name


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _without_index(side: Any) -> Any:
    (first, _, *rest), named = side
    return [[first, *rest], named]


def _called(node: fx.Node) -> Any:
    return str(node.target) if node.op in ("placeholder", "get_attr", "call_module", "call_method") else node.target


def _plain(nested: Any, node: Callable[[fx.Node], Any]) -> Any:
    if isinstance(nested, fx.Node):
        return node(nested)
    if isinstance(nested, (tuple, list)):
        return [_plain(one, node) for one in nested]
    if isinstance(nested, dict):
        return {key: _plain(value, node) for key, value in nested.items()}
    if isinstance(nested, slice):
        return slice(*(_plain(one, node) for one in (nested.start, nested.stop, nested.step)))
    return nested


def _other_numbers(old: fx.Node, mine: list[Any], theirs: list[Any]) -> bool:
    """Whether two calls differ in more than sizes: in what is no number, or in the axis that is split."""
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if not isinstance(a, fx.Node)]
    if target_name(old) in SPLITS and pairs and pairs[-1][0] != pairs[-1][1] and ("dim" in old.kwargs or len(old.args) > 2):
        return True
    return any(type(a) is not type(b) or not isinstance(a, int) and a != b for a, b in pairs)


def _places(index: Any, shape: list[int]) -> Any:
    """An index with every slice of an axis as the places that it picks."""
    entries = entries_of(tuple(index) if isinstance(index, list) else index, len(shape))
    found, axis = [], -1
    for entry in entries:
        axis += entry is not None
        if isinstance(entry, slice) and all(b is None or isinstance(b, int) for b in (entry.start, entry.stop, entry.step)):
            entry = entry.indices(shape[axis])
        elif isinstance(entry, int) and not isinstance(entry, bool):
            entry %= shape[axis]
        found.append(entry)
    return found
