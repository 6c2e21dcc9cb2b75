"""Submodules traced by themselves, each with its interface pinned, where the code around them cannot be: that of the root, or of a module
in it. They are the largest that can be.

What a submodule is called with is seen by running a copy of the model once on the example inputs. A submodule is taken only if nothing
outside it calls into it or reads what it holds, since what is inside will change shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import InputError, TraceError, first_line
from fxprune.example_inputs import Json, build, describe
from fxprune.passes.ir.notes import Note, NoteKind
from fxprune.passes.ir.skeleton import Skeleton
from fxprune.passes.ir.traced import PartCall, TracedModel
from fxprune.passes.tracing.modes import add_traced
from fxprune.passes.tracing.watching import Watched, watched

_LEAST = 2  # matrices: with its interface pinned a module with fewer has nothing that could go


def trace_parts(
    model: nn.Module,
    example_inputs: Any,
    is_known: Callable[[nn.Module], bool],
    has_rule: Callable[[Any], bool],
    cause: TraceError,
    refused: Mapping[str, str],
    recorded: Mapping[str, Json] | None = None,
) -> TracedModel:
    """Trace the largest traceable submodules of ``model``. ``example_inputs`` must hold values: the model is run on them.

    ``refused``: what is to be no part within a module that cannot be traced -> why. ``recorded``: the parts of an earlier analysis
    (``calls_of``), which are taken again; the model is not run. Raises the root's error, ``cause``, with another road
    to try, where no submodule can be traced.
    """
    try:
        seen = watched(model, example_inputs) if recorded is None else _recorded(recorded)
    except InputError:
        raise
    except Exception as error:  # the user's model, on the user's inputs
        raise InputError(f"the model itself fails on the example inputs: {first_line(error)} ({cause})") from error
    traced = TracedModel(Skeleton(model, is_known), {}, {})
    _Search(traced, seen, is_known, has_rule, refused).below("")
    road = _road(model, example_inputs)
    if not traced.parts:
        raise TraceError(f"{cause}{road}") from cause
    parts = ", ".join(traced.inside())
    text = f"the root could not be traced ({cause}); pruned are its parts {parts}, with their inputs and outputs kept{road}"
    traced.notes = (Note(NoteKind.PARTS, text), *traced.notes)
    return traced


def add_parts(
    traced: TracedModel,
    values: Any,
    is_known: Callable[[nn.Module], bool],
    has_rule: Callable[[Any], bool],
    refused: Mapping[str, str],
    recorded: Mapping[str, Json] | None = None,
) -> None:
    """Trace the largest traceable submodules of each module that a traced model calls as it is, and add them as its parts.

    ``values``: example inputs that hold values, since the model is run on them; None where there can be none. ``refused``: what is to be no
    part -> why. ``recorded``: the parts of an earlier analysis (``calls_of``), which are taken again; the model is not run.
    """
    model = traced.skeleton.original
    opaque = [path for path in sorted(traced.opaque) if _has_children(traced.skeleton.module_or_none(path))]
    if not opaque:
        return
    try:
        if recorded is not None:
            seen: Watched | None = _recorded(recorded)
        else:
            seen = None if values is None else watched(model, values)
        why = "what is in it is not seen without values"
    except Exception as error:  # noqa: BLE001 - the user's model, on the user's inputs, or a copy of it that cannot be made
        seen, why = None, f"a copy of the model cannot be run to see what is called in it ({first_line(error)})"
    if seen is None:
        children = [(path, name) for path in opaque for name, _ in traced.skeleton.original_module(path).named_children()]
        traced.no_parts.update({f"{path}.{name}": why for path, name in children})
        return
    search = _Search(traced, seen, is_known, has_rule, refused)
    for path in opaque:
        search.below(path)


def calls_of(traced: TracedModel) -> dict[str, Json] | None:
    """The parts of a traced model as JSON: what each is called with on the example, and how often. None where nothing could be
    one, or where JSON cannot say it."""
    try:
        found = {path: {"call": describe((call.args, call.kwargs)), "times": call.times} for path, call in traced.parts.items()}
    except InputError:
        return None
    return found if found or traced.no_parts else None  # none: they are not looked for again, where there may be no values to judge them by


def _recorded(calls: Mapping[str, Json]) -> Watched:
    found = Watched()
    for path, one in calls.items():
        if not isinstance(one, dict) or "call" not in one:
            raise InputError(f"the recorded parts are malformed: {path!r} has no call")
        args, kwargs = build(one["call"], device="meta")
        found.calls[path] = PartCall(args, kwargs, None, float(one.get("times", 1.0)))
    return found


class _Search:
    """Takes submodules as parts, from the outside in. No module is looked at twice."""

    def __init__(
        self,
        traced: TracedModel,
        seen: Watched,
        is_known: Callable[[nn.Module], bool],
        has_rule: Callable[[Any], bool],
        refused: Mapping[str, str],
    ) -> None:
        self.traced, self.seen, self.is_known, self.has_rule, self.refused = traced, seen, is_known, has_rule, refused
        self.met: set[nn.Module] = set()

    def below(self, path: str) -> None:
        """Look for parts among the submodules of the module at ``path``, and in what they cannot trace themselves."""
        todo = self._children(path)
        while todo:
            name, module = todo.pop()
            if module in self.met or not any(True for _ in module.parameters()):
                continue
            self.met.add(module)
            before = set(self.traced.opaque)
            if self._taken(name, module, nested=bool(path)):
                for inner in self.traced.opaque.keys() - before:
                    if _has_children(self.traced.skeleton.module_or_none(inner)):
                        self.below(inner)
            else:
                todo += self._children(name)

    def _children(self, path: str) -> list[tuple[str, nn.Module]]:
        module = self.traced.skeleton.original_module(path)
        return [(f"{path}.{name}" if path else name, child) for name, child in reversed(list(module.named_children()))]

    def _taken(self, path: str, module: nn.Module, nested: bool) -> bool:
        if self.is_known(module) or nested and sum(p.ndim > 1 for p in module.parameters()) < _LEAST:
            return False
        call = self.seen.calls.get(path)
        why = self.refused.get(path) or self.seen.unfit(path, module)
        if not why and nested and call is not None:  # a policy has to say what it was found with
            try:
                describe((call.args, call.kwargs))
            except InputError as error:
                why = f"what it is called with cannot be recorded ({first_line(error)})"
        if not why and call is not None:
            history = self.traced.skeleton.started if nested and not self.traced.in_parts else None
            try:
                add_traced(self.traced, path, (call.args, call.kwargs), self.is_known, self.has_rule, call.device, history=history)
                self.traced.parts[path] = call
                return True
            except TraceError as error:  # its children may still be traced
                why = f"alone it cannot be traced either: {error}"
        self.traced.no_parts[path] = why
        return False


def _has_children(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, torch.jit.ScriptModule) and bool(module._modules)


def _road(model: nn.Module, example: Any) -> str:
    """What else to try: torch.export follows code that a symbolic trace cannot."""
    if isinstance(model, fx.GraphModule):
        return ""
    inputs = "(), example" if isinstance(example, Mapping) else "example" if isinstance(example, (tuple, list)) else "(example,)"
    return f"; torch.export may take it whole: fxprune.compress(torch.export.export(model, {inputs}).module(), ...)"
