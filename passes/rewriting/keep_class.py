"""A slim network that keeps the user's class: a copy of the model with slim tensors, whose own ``forward`` and other methods run.

Numbers in the user's code follow the channels where they are read of a tensor, left to be inferred (``-1``), or held by an attribute,
which is then set. That they do is not assumed: the copy is traced in turn, and every operation has to do what the slim graph does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import TraceError, UnsupportedError
from fxprune.example_inputs import build
from fxprune.passes.ir.notes import Note, NoteKind
from fxprune.passes.ir.skeleton import at_or_below, below
from fxprune.passes.ir.traced import Surroundings, TracedModel
from fxprune.passes.labels.values import Vector
from fxprune.passes.rewriting import attributes
from fxprune.passes.rewriting.agreement import Agreement, Difference
from fxprune.passes.rewriting.attributes import Attributes, Slot
from fxprune.passes.rewriting.expert_counts import expert_counts
from fxprune.passes.rewriting.literal_changes import Literal, attention_widths, even_parts, literals, read_sizes
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.rules import is_known, registry
from fxprune.passes.tracing.modes import add_traced, trace

_INSTEAD = "leave keep_class out for a graph module, or pass the layer to ignore="
_TRIALS = 24  # combinations of attributes that are traced before the first is given up


def uneven(slimmer: Slimmer) -> list[list[Vector]]:
    """What the class can only keep if as much is left of one as of the others: halves of a ``chunk``, axes that one attribute sizes.

    Each entry holds the labels of axes that had one size; those that still have are left out.
    """
    if slimmer.graph.traced.in_parts:
        return []
    ties = []
    found: list[Literal] = []
    for mode, graph in slimmer.graph.traced.graphs.items():
        ties += [*even_parts(slimmer, mode, graph), *read_sizes(slimmer, mode, graph), *attention_widths(slimmer, mode, graph)]
        found += literals(slimmer, mode, graph, slimmer.copy(mode, graph))
    known = Attributes(slimmer.skeleton.original, [one for one in found if not one.implied])
    for of in known.values(next(known.choices(1))).values():
        along = [one.along for one, _ in of]
        if all(vector is not None and len(vector) == of[0][0].old for vector in along):
            ties.append(along)  # type: ignore[arg-type]
    return [tie for tie in ties if len({_left(slimmer, vector) for vector in tie}) > 1]


def _left(slimmer: Slimmer, vector: Vector) -> int:
    kept = slimmer.kept_of(vector)
    return len(vector) if kept is None else len(kept)


def kept_class(slimmer: Slimmer) -> nn.Module:
    """The slim network of ``slimmer`` as an instance of the model's class, with modules of the user's classes all through.

    What is set of their attributes is added to ``slimmer.settings``; plain numbers that the computation does not read stay those of the
    original. Raises ``UnsupportedError`` naming the node and line where a number stands in the way.
    """
    traced, original = slimmer.graph.traced, slimmer.skeleton.original
    kind = type(original).__name__
    if isinstance(original, fx.GraphModule):
        raise UnsupportedError(f"keep_class: this model is a {kind} already and has no class of its own to keep; leave keep_class out")
    if traced.in_parts:
        raise UnsupportedError(f"keep_class: only parts of {kind} could be traced; it keeps its class without, and {_INSTEAD}")
    rewritten = {mode: slimmer.copy(mode, graph) for mode, graph in traced.graphs.items()}
    if slimmer.constants:
        raise UnsupportedError(f"keep_class: forward picks channels by an index that no buffer holds, so {kind} cannot stay; {_INSTEAD}")
    for name in sorted(traced.constants):
        if slimmer.kept_dims(name) and not _is_attribute(original, name):
            raise UnsupportedError(f"keep_class: forward makes a tensor ({name}) that loses channels, so {kind} cannot stay; {_INSTEAD}")
    made = slimmer.tree(own_classes=True)
    _unshare(original, made)
    found = [one for mode, graph in traced.graphs.items() for one in literals(slimmer, mode, graph, rewritten[mode])]
    known = Attributes(original, found)
    first: UnsupportedError | None = None
    for choice in known.choices(_TRIALS):
        slots = known.values(choice)
        setting = _Setting(original, made, {slot: _value(of) for slot, of in slots.items()})
        error = _disagreement(slimmer, rewritten, made, setting, known, choice)
        if error is None:
            _refuse_read(traced, made, setting)
            slimmer.settings = (*setting.notes(), *_counted(slimmer, rewritten, made, known, choice))
            return made
        setting.undo()
        first = first or error
    raise first or AssertionError("there is always one choice")


def _counted(
    slimmer: Slimmer, rewritten: Mapping[str, fx.Graph], made: nn.Module, known: Attributes, choice: Mapping[Any, Any]
) -> tuple[Note, ...]:
    """Attributes that say how many experts there are say how many are left, whether the traced code reads them or not; as long as it
    computes the same."""
    values = expert_counts(slimmer, made)
    if not values:
        return ()
    setting = _Setting(slimmer.skeleton.original, made, values)
    try:
        error = _disagreement(slimmer, rewritten, made, setting, known, choice)
        if error is None:
            _refuse_read(slimmer.graph.traced, made, setting)
            return setting.notes()
    except UnsupportedError:
        pass  # code that was not traced names it: it stays
    setting.undo()
    return ()


def _value(of: Sequence[tuple[Literal, int]]) -> int:
    """What an attribute has to be; where its uses differ, the check that follows says so."""
    return next((value for one, value in sorted(of, key=lambda one: one[0].implied) if one.old != one.new), of[0][1])


class _Setting:
    """Attributes of a kept class set to new values, and what they were."""

    def __init__(self, original: nn.Module, made: nn.Module, values: Mapping[Slot, int]) -> None:
        self.originals = dict(original.named_modules(remove_duplicate=False))
        self.modules = dict(made.named_modules(remove_duplicate=False))
        self.before: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self.done: dict[Slot, tuple[int, int]] = {}
        self.set(values)

    def set(self, values: Mapping[Slot, int], own: bool = False) -> None:
        """Objects that modules share (a ``config``) are changed for all, and copied where these need different values, or with ``own``."""
        shared: dict[tuple[int, Any], dict[int, list[Slot]]] = defaultdict(lambda: defaultdict(list))
        for slot, value in values.items():
            shared[id(self.holder(slot)), slot.keys[-1]][value].append(slot)
        for of in shared.values():
            for value, slots in sorted(of.items()):
                for slot in slots:
                    if value == attributes.value_of(self.modules[slot.path], slot.keys):
                        continue
                    module = self.modules[slot.path]
                    self.before.setdefault(id(module), (module, dict(module.__dict__)))
                    self.done[slot] = (attributes.value_of(module, slot.keys), value)
                    if (
                        own or len(of) > 1 or self.holder(slot) is self.holder(slot, self.originals)
                    ):  # some objects cannot be copied in depth
                        attributes.unshare(module, slot.keys)
                    attributes.write(module, slot.keys, value)

    def holder(self, slot: Slot, modules: Mapping[str, nn.Module] | None = None) -> Any:
        held: Any = (modules or self.modules)[slot.path]
        for key in slot.keys[:-1]:
            held = attributes.read(held, key)
        return held

    def undo(self) -> None:
        for slot, (old, _) in self.done.items():
            attributes.write(self.modules[slot.path], slot.keys, old)
        for module, state in self.before.values():
            module.__dict__.clear()
            module.__dict__.update(state)

    def notes(self) -> tuple[Note, ...]:
        """One sentence for each attribute of a class."""
        by: dict[tuple[str, str], list[tuple[Slot, int, int]]] = defaultdict(list)
        for slot, (old, new) in self.done.items():
            by[type(self.modules[slot.path]).__name__, str(Slot("", slot.keys))].append((slot, old, new))
        notes = []
        for (kind, key), of in by.items():
            changes = sorted({f"{old} -> {new}" for _, old, new in of})
            where = ", ".join(sorted(slot.path or "the model" for slot, *_ in of)[:3]) + (f" and {len(of) - 3} more" if len(of) > 3 else "")
            notes.append(Note(NoteKind.ATTRIBUTE, f"keep_class set {kind}.{key} ({', '.join(changes)}) in {where}"))
        return tuple(notes)


def _disagreement(
    slimmer: Slimmer,
    rewritten: Mapping[str, fx.Graph],
    made: nn.Module,
    setting: _Setting,
    known: Attributes,
    choice: Mapping[Any, Any],
) -> UnsupportedError | None:
    """Why the kept class does not compute what the slim graph does, or None. Sizes that its code only checks are set on the way."""
    kind = type(slimmer.skeleton.original).__name__
    traced = slimmer.graph.traced
    tried: set[str] = set()
    while True:
        try:
            again = _trace_again(slimmer, made)
            break
        except TraceError as error:
            path = getattr(error, "module", "")
            more = {} if path in tried else _sizes_of(slimmer, made, path, setting)
            if not more:
                unmet = next((one for one in _unanswered(known, choice)), None)
                if unmet is not None:
                    return _literal_error(kind, unmet)
                return UnsupportedError(f"with fewer channels {kind} does not run: {error}; {_INSTEAD}")
            tried.add(path)
            setting.set(more, own=True)
    for mode, graph in traced.graphs.items():
        if mode not in again.graphs:
            return UnsupportedError(f"with fewer channels {kind} takes another path in {mode} mode; {_INSTEAD}")
        different = Agreement(slimmer, mode, graph, rewritten[mode], again.graphs[mode]).difference()
        if different is not None:
            return _error(kind, different, known, choice)
    return None


def _trace_again(slimmer: Slimmer, made: nn.Module) -> TracedModel:
    traced, has_rule = slimmer.graph.traced, registry.FUNCTIONS.__contains__
    again = trace(made, build(slimmer.graph.inputs, device="meta"), is_known, has_rule, traced.opaque)
    for path, call in traced.parts.items():  # their interfaces are what they were
        add_traced(again, path, (call.args, call.kwargs), is_known, has_rule, call.device, strict=True)
    return again


def _sizes_of(slimmer: Slimmer, made: nn.Module, path: str, setting: _Setting) -> dict[Slot, int]:
    """New values for the integers that the module at ``path`` holds and its code reads, where its parameters say them: every dimension of
    that size has become one other size."""
    module = setting.modules.get(path)
    if module is None:
        return {}
    old = slimmer.skeleton.original_module(path)
    became: dict[int, set[int]] = defaultdict(set)
    for a, b in zip(old.parameters(), module.parameters(), strict=True):
        for before, after in zip(a.shape, b.shape, strict=True):
            became[before].add(after)
    kind: Any = type(module)
    names = attributes.names_of_class(kind)
    found = {}
    for keys, value in attributes.integers(module):
        name = next(k for k in reversed(keys) if isinstance(k, str))
        sizes = became.get(value, set())
        slot = Slot(path, keys)
        if slot not in setting.done and name in names and len(sizes) == 1 and value not in sizes:
            found[slot] = next(iter(sizes))
    return found


def _refuse_read(traced: TracedModel, made: nn.Module, setting: _Setting) -> None:
    """Raise where an attribute was set that code which is not traced may read too: nobody saw what it does with the number."""
    around = Surroundings(traced)
    running = {path: module for path, module in made.named_modules(remove_duplicate=False) if around.opaque(path) is not None}
    for slot, (old, new) in setting.done.items():
        reach = [o for o in traced.opaque if below(slot.path, o) or len(slot.keys) > 1]  # in a part of it, or in a shared object
        for path, module in running.items():
            if any(at_or_below(path, o) for o in reach) and slot.keys[-1] in attributes.names_reached(module):
                reader, kind = f"{path!r} ({type(module).__name__})", type(made).__name__
                raise UnsupportedError(
                    f"keep_class: {slot} becomes {new} from {old}, and code of {reader}, which could not be traced, names "
                    f"{slot.keys[-1]!r} too, so {kind} cannot stay; {_INSTEAD}"
                )


def _unanswered(known: Attributes, choice: Mapping[Any, Any]) -> Iterable[Literal]:
    return (one for site, of in known.sites.items() if site not in choice for one in of if one.old != one.new and not one.implied)


def _literal_error(kind: str, literal: Literal) -> UnsupportedError:
    what = f"{literal.where}: {literal.operation} holds the number {literal.old}, which becomes {literal.new} with the channels that stay"
    if literal.site[0].__module__.startswith("torch.nn."):
        layer = literal.site[0].__name__
        return UnsupportedError(f"{what}, and torch's {layer} has no attribute for it, so {kind} cannot stay; {_INSTEAD}")
    return UnsupportedError(
        f"{what}, so {kind} cannot stay; make it an attribute that {literal.site[0].__name__} reads there (self.width = {literal.old}), "
        f"write -1, or read it of a tensor's shape; or {_INSTEAD}"
    )


def _error(kind: str, different: Difference, known: Attributes, choice: Mapping[Any, Any]) -> UnsupportedError:
    node = different.node
    where = "forward" if node is None else _place(node)
    if node is not None:
        line = str(node.meta.get("where"))
        unmet = next((one for one in _unanswered(known, choice) if one.where == line), None)
        if unmet is not None:
            return _literal_error(kind, unmet)
    if different.path:
        return UnsupportedError(f"{where} depends on a number of channels, so {kind} cannot stay; {_INSTEAD}")
    numbers = "" if different.wanted is None else f" ({different.found} where the slim graph has {different.wanted})"
    return UnsupportedError(f"{where} holds a number that changes with the channels{numbers}, so {kind} cannot stay; {_INSTEAD}")


def _place(node: fx.Node) -> str:
    what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{node.meta.get('where') or 'forward'}: {what} (node {node.name})"


def _is_attribute(model: nn.Module, name: str) -> bool:
    path, _, key = name.rpartition(".")
    return isinstance(model.get_submodule(path).__dict__.get(key), torch.Tensor)


def _unshare(original: nn.Module, made: nn.Module) -> None:
    """Copies of the tensors that the user's modules hold as plain attributes and the graph does not read."""
    theirs = {id(value) for module in original.modules() for value in module.__dict__.values() if isinstance(value, torch.Tensor)}
    for module in made.modules():
        for key, value in module.__dict__.items():
            if isinstance(value, torch.Tensor) and id(value) in theirs:
                module.__dict__[key] = value.detach().clone()
