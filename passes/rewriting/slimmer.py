"""Kept units to a slim module: parameters sliced, attributes set, and every literal of the graph recomputed.

Numbers in the graph keep the meaning they have in the original: a read of a pruned size is answered with the original size (so
that ``C ** -0.5`` stays what it was), and where a number becomes a shape it is replaced by the new size of that node's output.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.errors import FAULTS, FxPruneError, UnsupportedError, first_line
from fxprune.passes.collector import paused_collector
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.contents import has_tensors
from fxprune.passes.ir.dead_code import impure
from fxprune.passes.ir.masks import is_mask
from fxprune.passes.ir.nodes import op_name, target_name
from fxprune.passes.ir.notes import Note
from fxprune.passes.ir.skeleton import at_or_below
from fxprune.passes.ir.slim_module import ASKING, MODES, SlimModule
from fxprune.passes.ir.traced import Surroundings
from fxprune.passes.ir.writes import is_rewritten_later, written
from fxprune.passes.labels.values import Value, Vector, values
from fxprune.passes.planning.plan import Keep
from fxprune.passes.rewriting.assemble import Copies, assemble, copies, drop, replace_module
from fxprune.passes.rewriting.blanks import Blanks
from fxprune.passes.rewriting.lines import Kept, Lines, as_indices
from fxprune.passes.rewriting.slicing import cut, keep_freed_memory, like
from fxprune.passes.rewriting.statistics import is_rms, rewrite_exact
from fxprune.passes.rules import binding, registry
from fxprune.passes.rules.layer_specs import has_sizes, resize
from fxprune.passes.rules.moving.indexing import left_of
from fxprune.passes.tracing.side_effects.memos import ABSENT, forget, stands_in
from fxprune.passes.tracing.sizes.fixed_sizes import depends, is_fixed

_ARITHMETIC = {
    getattr(operator, n) for n in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge")
}


@dataclass
class Template:
    """What every rewrite of one analysed model shares. ``module``: holds the graphs where no policy changes them, else None; ``blanks``:
    likewise where policies change numbers alone. Both are made by the second rewrite: one alone has no use for them."""

    copies: Copies
    lines: Lines
    resized: tuple[tuple[nn.Module, Value, Value, tuple[int, ...]], ...]  # the last: the lines that its sizes follow
    constant: bool
    module: SlimModule | None = None
    blanks: Blanks | None = None


class Slimmer:
    """One rewrite: the questions that rewrites of single operations ask (``kept``, ``size``, ``sizes``), and the slices made."""

    def __init__(self, graph: CouplingGraph, keep: Keep, norms: str | None = None) -> None:
        self.graph, self.norms = graph, str(norms or graph.options.get("norms", "plain"))
        self.exact = self.norms == "exact"
        self.skeleton = graph.traced.skeleton
        self._keep = np.append(keep, True)  # unit -1, "belongs to no group", is kept
        self._kept: dict[int, tuple[Vector, Vector | None]] = {}
        self.renumber: dict[str, torch.Tensor] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.copied: dict[fx.Node, fx.Node] = {}  # node of a rewritten graph -> the original's
        self.settings: tuple[Note, ...] = ()  # what a kept class's attributes were set to
        self.new: fx.Graph = fx.Graph()
        self._prefix = ""

    @property
    def keep(self) -> Keep:
        """Which units stay."""
        kept: Keep = self._keep[:-1]
        return kept

    # -- what rewrites ask --------------------------------------------------------------------------------------------------

    def value(self, node: Any) -> Any:
        """What the analysis knows of a copied node's tensor (or tensors)."""
        return node.meta["value"]

    @cached_property
    def _shared(self) -> Template:
        found: Template | None = self.graph.templates.get(self.norms)
        if found is None:
            found = self.graph.templates[self.norms] = self._template()
        return found

    @cached_property
    def _kept_lines(self) -> Kept:
        return self._shared.lines.kept(self._keep)

    @cached_property
    def _indices(self) -> list[torch.Tensor | None]:
        return as_indices(self._kept_lines)

    def kept_of(self, vector: Vector) -> Vector | None:
        """Positions kept along labels, or None where all are."""
        line = self._shared.lines.of_labels.get(id(vector))
        if line is not None:
            return self._kept_lines[line]
        found = self._kept.get(id(vector))
        if found is None:
            mask = self._keep[self.graph.units_of_labels(vector)]
            found = self._kept[id(vector)] = (vector, None if mask.all() else np.flatnonzero(mask))
        return found[1]

    def kept(self, value: Value, axis: int) -> Vector | None:
        vector = value.axes.get(axis)
        return None if vector is None else self.kept_of(vector)

    def count(self, value: Value, axis: int) -> int:
        kept = self.kept(value, axis)
        return value.shape[axis] if kept is None else len(kept)

    def size(self, node: Any, axis: int) -> int:
        return self.count(self.value(node), axis)

    def pruned(self, node: Any, axis: int) -> bool:
        value = self.value(node)
        return self.kept(value, axis % value.ndim) is not None

    def pruned_axis(self, value: Value, axis: int) -> bool:
        return self.kept(value, axis) is not None

    def touched(self, nested: Any) -> bool:
        found = values(nested)
        if any(value.picks is not None and self.kept_of(value.picks) is not None for value in found):
            return True
        return any(self.kept_of(v) is not None for value in found for v in value.axes.values())

    def argument(self, node: fx.Node, name: str, default: Any = None) -> Any:
        at = self._form(node).places.get(name)
        if at is None:
            return default
        return node.kwargs[at] if isinstance(at, str) else node.args[at]

    def set_argument(self, node: fx.Node, name: str, value: Any) -> None:
        at = self._form(node).places.get(name, name)
        if isinstance(at, str):
            node.kwargs = {**node.kwargs, at: value}
        elif isinstance(at, slice):
            node.args = (*node.args[: at.start], *value)
        else:
            node.args = (*node.args[:at], value, *node.args[at + 1 :])

    def _form(self, node: fx.Node) -> binding.Form:
        """How the node's call is bound, by what the original was given."""
        return binding.form_of(node.meta.get("old", node))

    def is_fixed(self, node: Any, axis: int) -> bool:
        return is_fixed(node.meta.get("old", node), axis, self.skeleton.module)

    def rescaled(self, given: Any, left: int) -> Any:
        if not isinstance(given, fx.Node) or depends(given.meta.get("old", given), self.skeleton.module) is None:
            return left
        return self._scaled(given, left, self.number(given))

    def number(self, value: Any) -> int:
        """The number a literal or an integer node stands for on the example (a channel count is the same for every input)."""
        return int(value.meta["number"]) if isinstance(value, fx.Node) else int(value)

    def sizes(self, node: Any, sizes: Any, first: int = 0) -> list[Any]:
        """Size arguments, one per axis of the node's tensor from axis ``first``: those of pruned axes replaced by what is left."""
        value = self.value(node)
        return [self._new_size(node, value, first + i, s) for i, s in enumerate(sizes)]

    def _new_size(self, node: fx.Node, value: Value, axis: int, given: Any) -> Any:
        kept = self.kept(value, axis)
        if kept is None or (isinstance(given, int) and given == -1):
            return given
        if not isinstance(given, fx.Node) or self._static(node, value, axis):
            return len(kept)
        return self._scaled(given, len(kept), value.shape[axis])

    def _static(self, node: fx.Node, value: Value, axis: int) -> bool:
        """The axis holds channels alone. Otherwise batch or space may be folded into it and its size is a product: where no label repeats
        there may be one of them in the example only."""
        units = self.graph.units_of_labels(value.axes[axis])
        return len(np.unique(units)) == len(units) and self.is_fixed(node, axis)

    def _scaled(self, given: fx.Node, numerator: int, denominator: int) -> fx.Node:
        divisor = int(np.gcd(numerator, denominator))
        times = self.new.call_function(operator.mul, (given, numerator // divisor))
        scaled: fx.Node = self.new.call_function(operator.floordiv, (times, denominator // divisor))
        scaled.meta = {"old": given.meta.get("old"), "number": numerator}
        return scaled

    def renumbered(self, node: fx.Node, index: Any, kept: Vector, size: int) -> Any:
        """An index tensor along a pruned axis: entries of removed channels dropped, the others renumbered. Positions of what the graph
        chooses are among what is left already."""
        if isinstance(index, fx.Node) and isinstance(value := index.meta.get("value"), Value) and value.picks is not None:
            return index
        actual = self.graph.actual(index.meta["old"]) if isinstance(index, fx.Node) else None
        if actual is None:
            raise UnsupportedError(
                f"{node.meta.get('where', node.name)}: channels are picked by an index that cannot be renumbered; pass its layer to ignore="
            )
        mask = is_mask(actual)
        new = actual.cpu()[kept] if mask else torch.from_numpy(left_of(node, actual.cpu().numpy() % size, kept)).to(actual.dtype)
        if self._is_sole_use(index) and not mask:  # a mask has labels of its own, which say what is cut
            self.renumber[str(index.target)] = new
            return index
        name = f"{self._prefix}_fxprune_index{len(self.constants)}"
        self.constants[name] = new.to(actual.device)
        made: fx.Node = self.new.get_attr(name)
        return made

    def original(self, node: fx.Node) -> Any:
        return self.skeleton.original_module(str(node.target))

    def actual_weight(self, node: Any) -> torch.Tensor | None:
        if not isinstance(node, fx.Node) or node.op != "get_attr" or str(node.target) not in self.skeleton.names:
            return None
        tensor = self.skeleton.real(str(node.target))
        return None if tensor.is_meta else tensor.detach()

    def set_values(self, name: str, values: torch.Tensor) -> None:
        self.renumber[name] = values

    def _is_sole_use(self, index: fx.Node) -> bool:
        """Whether an index is a buffer that one node of one graph reads: then the buffer itself can be renumbered."""
        if index.op != "get_attr" or index.target in self.graph.traced.constants:
            return False
        graphs = self.graph.traced.graphs.values()
        return sum(len(n.users) for g in graphs for n in g.nodes if n.op == "get_attr" and n.target == index.target) == 1

    # -- the rewrite --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @paused_collector()
    def run(self) -> Any:
        """The slim network: a ``SlimModule``, or where only parts could be traced a copy of the user's module with slim parts in it.

        Parts of a module that the graph calls as it is are ``SlimModule``s in it.
        """
        again, parts = self.norms in self.graph.templates, self.graph.traced.parts
        template = self._shared
        shared, numbers = self._shared_module() if again and not parts and self.graph.gated is None else (None, None)
        graphs = self._graphs() if shared is None else {}  # before the tree: index buffers are renumbered on the way
        tree = self._tree(template.copies)
        if self.lost:
            called = {str(node.target) for graph in graphs.values() for node in graph.nodes if node.op == "call_module"}
            drop(tree, {alias for name in self.lost for alias in self.skeleton.aliases[name]}, called)
        if shared is not None:
            return shared.sibling(tree, numbers)
        if not parts:
            return self.holding(SlimModule(tree, graphs))
        for path in parts:
            own = {mode: graphs[f"{path}:{mode}"] for mode in ("eval", "train") if f"{path}:{mode}" in graphs}
            for graph in own.values():
                for node in graph.nodes:
                    if node.op in ("call_module", "get_attr"):
                        node.target = self._inside(node, f"{path}.")
            old = tree.get_submodule(path)
            replace_module(tree, old, self.holding(SlimModule(old, own), f"{path}.").standing_for(type(old)))
        if self.graph.traced.in_parts:
            return tree
        return self.holding(SlimModule(tree, {mode: graphs[mode] for mode in self.graph.traced.of_root}))

    def _shared_module(self) -> tuple[SlimModule | None, list[int] | None]:
        """The module whose graphs this rewrite's network can share, and the numbers in their blanks; None where it needs its own."""
        template = self._shared
        keep_freed_memory()
        if template.constant:
            if template.module is None:
                template.module = self.holding(SlimModule(nn.Module(), self._graphs()))
            return template.module, None
        if template.blanks is None:
            template.blanks = Blanks(self)
        return template.blanks.filled(self)

    def holding(self, module: SlimModule, prefix: str = "") -> SlimModule:
        """``module`` with what the user's code holds in a mode of its own below ``prefix``, and what asks for its mode there."""
        held = {
            mode: {name.removeprefix(prefix): flag for name, flag in named.items() if name.startswith(prefix)}
            for mode, named in self.skeleton.held.items()
        }
        if any(held.values()):
            module.__dict__[MODES] = held
        if asking := self.graph.traced.with_modes(prefix.removesuffix(".")):
            module.__dict__[ASKING] = tuple(tuple(name.removeprefix(prefix).split(".")) for name in asking)
        return module

    def _inside(self, node: fx.Node, prefix: str) -> str:
        """The name that what a part's graph reads has within the part: it may be shared with other parts, and known by theirs."""
        name = str(node.target)
        if not name.startswith(prefix):
            names = self.skeleton.module_aliases(name) if node.op == "call_module" else self.skeleton.aliases[name]
            name = next(n for n in names if n.startswith(prefix))
        return name.removeprefix(prefix)

    @torch.no_grad()
    def tree(self, own_classes: bool = False) -> nn.Module:
        """The module tree alone, once the graphs are copied (index buffers are renumbered on the way); maybe all of the user's classes."""
        return self._tree(copies(self.skeleton.original, lambda _: True) if own_classes else self._shared.copies, own_classes)

    def _graphs(self) -> dict[str, fx.Graph]:
        return {mode: self.copy(mode, graph) for mode, graph in self.graph.traced.graphs.items()}

    def _template(self) -> Template:
        traced = self.graph.traced
        calls: dict[str, tuple[list[Value], list[Value]]] = {}
        for mode, graph in traced.graphs.items():
            for old in graph.nodes:
                name = str(old.target)
                if old.op == "call_module" and name not in calls:
                    inputs = values(map_arg((*old.args, *old.kwargs.values()), self.graph.values[mode].get))
                    calls[name] = (inputs, values(self.graph.values[mode][old]))
        sized: list[tuple[nn.Module, Value, Value, list[Vector]]] = []
        for name, (inputs, outputs) in calls.items():
            module = self.skeleton.original_module(name)
            if name not in traced.opaque and has_sizes(module):
                sized.append((module, inputs[0], outputs[0], [v for x in (*inputs, *outputs) for v in x.axes.values()]))
        lines = Lines(self.graph, [v for *_, vectors in sized for v in vectors])
        resized = tuple((module, x, y, tuple({lines.of_labels[id(v)] for v in vectors})) for module, x, y, vectors in sized)

        def keeps_class(path: str) -> bool:
            """Whether the graph calls a module, or it, or one around it, was not looked into. Of a network that was traced in parts all
            do: the code around the parts may ask for their attributes."""
            return traced.in_parts or path in calls or any(at_or_below(path, o) for o in traced.opaque)

        return Template(copies(self.skeleton.original, keeps_class), lines, resized, self._constant())

    def _constant(self) -> bool:
        """Whether the graphs come out the same for every policy: no literal and no read of a size meets channels that may go."""
        return not any(self.may_change(old, mode) for mode, graph in self.graph.traced.graphs.items() for old in graph.nodes)

    def may_change(self, old: fx.Node, mode: str) -> bool:
        """Whether there are policies for which an operation is another in the slim graph."""
        found = self.graph.values[mode]
        if self._asserts_channels(old, found):
            return True
        if self.exact and old in self.graph.statistics:
            return True
        reads = old.op == "call_method" and old.target == "size"
        rule = self._rule_of(old)
        if not reads and (rule is None or rule.rewrite is None or rule.always):
            return rule is not None and rule.always
        met = values((found.get(old), map_arg((old.args, old.kwargs), found.get)))
        picked = any(value.picks is not None and self.graph.may_lose(value.picks) for value in met)
        return picked or any(self.graph.may_lose(v) for value in met for v in value.axes.values())

    def only_arguments(self, old: fx.Node, mode: str) -> bool:
        """Whether it stays one operation of which nothing but the arguments is rewritten, by its rule."""
        rule = self._rule_of(old)
        if rule is None or rule.rewrite is None or rule.always or (old.op == "call_method" and old.target == "size"):
            return False
        return not self._asserts_channels(old, self.graph.values[mode]) and not (self.exact and old in self.graph.statistics)

    def rewrite_in(self, graph: fx.Graph, node: fx.Node, mode: str) -> None:
        """Have its rule rewrite a copied node where this policy asks for that. ``graph``: the node's."""
        self.new, old, values = graph, node.meta["old"], self.graph.values[mode]
        rule = self._rule_of(old)
        if rule is not None and rule.rewrite is not None and self._needs_rewrite(rule, old, values):
            with graph.inserting_before(node):
                self._rewrite(rule.rewrite, node)

    def note(self, node: fx.Node, old: fx.Node, mode: str) -> None:
        """Let a copied node say what rewrites ask of it."""
        node.meta = {"value": self.graph.values[mode].get(old), "old": old, "where": old.meta.get("where"), "owner": old.meta.get("owner")}
        if isinstance(old.meta.get("val"), int):
            node.meta["number"] = old.meta["val"]

    def copy(self, mode: str, graph: fx.Graph) -> fx.Graph:
        self.new = fx.Graph()
        part = mode.rpartition(":")[0]
        self._prefix = f"{part}." if part else ""
        values = self.graph.values[mode]
        made: dict[fx.Node, Any] = {}
        dead = self.dead.get(mode, set())
        for old in graph.nodes:
            if old in dead:
                continue
            if self._stands_alone(old, mode, dead, made):
                continue
            replaced = self._size_read(old, values, made)
            if replaced is not None:
                made[old] = replaced
                continue
            node = self.new.node_copy(old, made.__getitem__)
            made[old] = node
            self.note(node, old, mode)
            if self._asserts_channels(old, values):
                self.new.erase_node(node)
                continue
            if shared := self.shared_axes(old, values):
                module = self.skeleton.original_module(str(old.target)) if old.op == "call_module" else None
                made[old] = rewrite_exact(self, node, module, shared)
                if made[old] is not node and not node.users:
                    self.new.erase_node(node)
                made[old].meta.setdefault("value", values.get(old))
                continue
            self.rewrite_in(self.new, node, mode)
        self.copied.update((node, old) for old, node in made.items() if isinstance(node, fx.Node))
        return self.swept(self.new)

    @cached_property
    def dead(self) -> dict[str, set[fx.Node]]:
        """By graph, the nodes that only compute what experts add that went as modules."""
        gated = self.graph.gated
        gone = [label for label in gated.labels if self._all_gone(frozenset({label}))] if gated else []
        return gated.dead(gone) if gated and gone else {}

    @cached_property
    def lost(self) -> set[str]:
        """The tensors of experts that went as modules."""
        return self.graph.gated.lost(self.dead) if self.graph.gated and self.dead else set()

    def _stands_alone(self, old: fx.Node, mode: str, dead: set[fx.Node], made: dict[fx.Node, Any]) -> bool:
        """Whether a sum is what is left of it: one of its two operands added what went. A stack is made of what is left here, too."""
        sums = self.graph.gated.sums.get(mode, ()) if dead and self.graph.gated else ()
        if not any(one.node is old for one in sums):
            return False
        if any(one.node is old and one.place < 0 and self._all_gone(one.labels) for one in sums):
            made[old] = self._alone(old, old.args[0], made)
            return True
        if target_name(old) == "stack":
            node = self.new.node_copy(old, lambda n: made.get(n))
            held: Any = node.args[0] if node.args else node.kwargs["tensors"]
            others = [one for one in held if one is not None]
            node.args, node.kwargs = ((others, *node.args[1:]), node.kwargs) if node.args else ((), {**node.kwargs, "tensors": others})
            made[old] = node
            self.note(node, old, mode)
            return True
        left: Any = [one for one in old.args if one not in dead]
        if len(left) == len(old.args):
            return False
        made[old] = self._alone(old, left[0], made)
        return True

    def _alone(self, old: fx.Node, operand: Any, made: Mapping[fx.Node, Any]) -> Any:
        """The operand in place of a sum; a copy where one of them is written into later and the other would not be."""
        module = self.skeleton.module
        if written(old, module) is operand or not (is_rewritten_later(old, module) or is_rewritten_later(operand, module)):
            return made[operand]
        copied = self.new.call_method("clone", (made[operand],))
        copied.meta = dict(made[operand].meta)
        return copied

    def _all_gone(self, labels: frozenset[int]) -> bool:
        return not any(self._keep[self.graph.unit_of_label(label)] for label in labels)

    def swept(self, graph: fx.Graph) -> fx.Graph:
        """``graph`` without what nobody reads any more, and without what was noted for the rewrite."""
        self.new = graph
        self._sweep()
        for node in graph.nodes:
            node.meta = {key: node.meta[key] for key in ("where", "owner") if node.meta.get(key)}
        return graph

    def shared_axes(self, old: fx.Node, values: Mapping[fx.Node, Any]) -> list[int]:
        """The pruned axes of a node's first input whose statistic keeps the original's divisor."""
        axes = self.graph.statistics.get(old) if self.exact else None
        if not axes:
            return []
        source: Any = old.args[0] if old.args else old.kwargs["input"]
        return [axis for axis in sorted(axes) if self.kept(values[source], axis) is not None]

    def _rewrite(self, rewrite: registry.Rewrite, node: fx.Node) -> None:
        try:
            rewrite(self, node)
        except FxPruneError:
            raise
        except FAULTS as error:
            place = node.meta.get("where") or node.name
            raise UnsupportedError(
                f"{place}: the arguments of {target_name(node) or node.target} could not be changed "
                f"({type(error).__name__}: {first_line(error)}); pass its layer to ignore="
            ) from error

    def _needs_rewrite(self, rule: registry.Rule, old: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
        if rule.always:
            return not self._keep.all()
        return self.touched(values.get(old)) or self.touched(map_arg((old.args, old.kwargs), values.get))

    def _rule_of(self, old: fx.Node) -> registry.Rule | None:
        if old.op == "call_method":
            return registry.METHODS.get(str(old.target))
        if old.op == "call_module" and str(old.target) not in self.graph.traced.opaque:
            return registry.module_rule(self.skeleton.original_module(str(old.target)))
        return registry.function_rule(old.target) if old.op == "call_function" else None

    def _size_read(self, old: fx.Node, values: Mapping[fx.Node, Any], made: dict[fx.Node, Any]) -> Any:
        """The original size in place of a read of a pruned one, and numbers computed from such sizes."""
        if old.op == "call_method" and old.target == "size" and len(old.args) == 2:
            source: Any
            source, axis = old.args
            value = values[source]
            axis %= value.ndim
            kept = self.kept(value, axis)
            if kept is None:
                return None
            if self._static(source, value, axis):
                return value.shape[axis]
            read = self.new.node_copy(old, made.__getitem__)
            read.meta = {"old": old, "number": len(kept)}
            return self._scaled(read, value.shape[axis], len(kept))
        if old.op == "call_function" and old.target in _ARITHMETIC and old.all_input_nodes:
            args = map_arg(old.args, made.__getitem__)
            if all(isinstance(a, (int, float)) for a in args):
                return old.target(*args)  # type: ignore[operator]
        if old.op == "call_method" or old.target is getattr:  # of a number, which Python's own text (16.bit_length()) could not ask for it
            args = map_arg(old.args, made.__getitem__)
            if isinstance(args[0], (int, float)):
                found = getattr(args[0], str(old.target if old.op == "call_method" else args[1]))
                return found(*args[1:], **old.kwargs) if old.op == "call_method" else found
        return None

    def _asserts_channels(self, old: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
        """A check on a size that was answered from the original holds by construction, and is left out."""
        return old.op == "call_function" and getattr(old.target, "__name__", "") == "_assert" and not isinstance(old.args[0], fx.Node)

    def _sweep(self) -> None:
        for node in reversed(list(self.new.nodes)):
            counts = (node.target in _ARITHMETIC and "number" in node.meta) or (node.op == "call_method" and node.target == "size")
            if not node.users and (node.op == "get_attr" or counts):
                self.new.erase_node(node)
        for node in reversed(list(self.new.nodes)):
            old = node.meta.get("old")
            if not node.users and old is not None and old.op in ("call_function", "call_method") and old.users and _pure(old):
                self.new.erase_node(node)

    def check_class_can_stay(self) -> None:
        """Raise where the user's code, which stays as it is with ``keep_class``, would have to call other operations."""
        traced = self.graph.traced
        if self.lost:
            home = min(self.lost).rpartition(".")[0]
            raise UnsupportedError(
                f"keep_class cannot take experts out of a list of modules ({home!r} goes, and the code calls it); leave out keep_class, or "
                "leave these experts whole"
            )
        for mode, graph in traced.graphs.items():
            for node in graph.nodes:
                module: Any = self.skeleton.original_module(str(node.target)) if node.op == "call_module" else None
                rescaled = is_rms(module) and module.weight is not None
                if self.shared_axes(node, self.graph.values[mode]) and not rescaled:
                    raise UnsupportedError(
                        f"{node.meta.get('where', node.name)}: norms='exact' puts other operations in place of {op_name(node, traced)}, "
                        "which keep_class cannot do in the model's own code; use norms='plain', or leave out keep_class"
                    )

    # -- parameters and modules ---------------------------------------------------------------------------------------------

    def kept_dims(self, name: str) -> dict[int, torch.Tensor]:
        """Dimension -> LongTensor of kept indices, for the dimensions of a tensor that lose any; none of the first of one that goes."""
        if name in self.lost:
            return {0: torch.zeros(0, dtype=torch.long)} if self.skeleton.tensor(name).ndim else {}
        indices = self._indices
        return {dim: kept for dim, line in self._shared.lines.of_dims.get(name, ()) if (kept := indices[line]) is not None}

    def _sliced(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """A new tensor: the user's, without what went."""
        return cut(source, self.renumber.get(name), self.kept_dims(name))

    def _all_sliced(self) -> dict[int, Any]:
        """Id of each of the user's parameters and buffers -> the new tensor."""
        of_dims, indices, real = self._shared.lines.of_dims, self._indices, self.skeleton.real
        found: dict[int, Any] = {}
        for name in self.skeleton.names:
            source = real(name)
            dims = of_dims.get(name)
            if name in self.lost:
                found[id(source)] = None
                continue
            kept = indices[dims[0][1]] if dims and len(dims) == 1 else None
            # Three in four are vectors on the CPU, and a search makes thousands: this is what ``cut`` does with one.
            if kept is not None and source.ndim == 1 and source.is_cpu and source.layout is torch.strided and name not in self.renumber:
                found[id(source)] = like(source, source.index_select(0, kept))
            else:
                found[id(source)] = self._sliced(name, source)
        return found

    def _tree(self, modules: Copies, own_classes: bool = False) -> nn.Module:
        memo = self._all_sliced()
        added = {name: self._sliced(name, source) for name, source in self.graph.traced.constants.items()} | self.constants
        if own_classes:
            original = self.skeleton.original
            added = {n: t for n, t in added.items() if hasattr(original.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2])}
        tree = assemble(modules, memo, added)
        self._forget(memo, own_classes)
        kept = self._kept_lines
        for module, x, y, lines in self._shared.resized:
            if any(kept[line] is not None for line in lines):
                resize(self, memo[id(module)], x, y)
        return tree

    def _forget(self, memo: Mapping[int, Any], own_classes: bool) -> None:
        """What forward keeps for itself is as before its first call, as it is in the graph. State that is saved stays, unless forward
        itself registers it; so does that of parts whose code was not seen to do without."""
        started = self.skeleton.started
        if started is None:
            return
        originals = {id(twin): module for module, twin in self.skeleton.twins.items()}
        around = Surroundings(self.graph.traced)
        for twin, first in started.first:
            made = memo.get(id(originals.get(id(twin))))
            if not isinstance(made, nn.Module):
                continue
            inside = around.opaque(self.skeleton.module_names.get(twin, "")) is not None
            for name, value in first.items():
                state = made.__dict__ if name in made.__dict__ else made._buffers
                saved = state is made._buffers and name not in made._non_persistent_buffers_set
                if name not in state or (inside and (value is ABSENT or has_tensors(value))) or (saved and value is not ABSENT):
                    continue
                if state is made.__dict__ and not own_classes and not has_tensors(state[name]):
                    continue
                if own_classes and stands_in(value):  # the class reads what it has
                    continue
                if value is ABSENT and not (started.blank and own_classes):
                    del state[name]
                    made._non_persistent_buffers_set.discard(name)
                else:
                    forget(made, {name: value}, started.blank)


def _pure(node: fx.Node) -> bool:
    return not impure(node)
