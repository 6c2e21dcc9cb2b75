"""Module and example inputs to one or two ``torch.fx`` graphs whose nodes know their concrete values.

What is traced is a structural copy of the user's model on the meta device (``passes.ir.skeleton``): the model itself is not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.errors import InputError, TraceError
from fxprune.example_inputs import call_form
from fxprune.passes.ir.dead_code import eliminate
from fxprune.passes.ir.nested import tensors
from fxprune.passes.ir.notes import Note, NoteKind
from fxprune.passes.ir.skeleton import Skeleton, Snapshot
from fxprune.passes.ir.traced import TracedModel
from fxprune.passes.tracing.decompositions import contract_as_it_is
from fxprune.passes.tracing.guard.comparison import Comparison, Difference, another, on_meta
from fxprune.passes.tracing.guard.plain_code import is_plain
from fxprune.passes.tracing.module_state import hold_modes, keep_state, lost, written_back
from fxprune.passes.tracing.proxies import ShapeProxy
from fxprune.passes.tracing.side_effects.gradients import detach
from fxprune.passes.tracing.side_effects.history import GUESSED, KEPT, KNOWN, History, past, worse
from fxprune.passes.tracing.side_effects.isolation import remove_left
from fxprune.passes.tracing.sizes import fixed_sizes as extents
from fxprune.passes.tracing.tracer import ShapeTracer, is_skipped


def trace(
    model: nn.Module,
    example_inputs: Any,
    is_known: Callable[[nn.Module], bool],
    has_rule: Callable[[Any], bool] = lambda _: False,
    whole: Mapping[str, str] | None = None,
    check: bool = True,
    level: str | None = None,
) -> TracedModel:
    """Trace ``model`` in evaluation mode and, where the traced code reads ``self.training``, in training mode as well.

    ``is_known(module)`` says whether a module is kept whole as one node; ``has_rule(function)`` whether a wrapped function is. A submodule
    that cannot be traced is kept whole; where ``whole`` (path -> why) is given, those are and no others. ``check``: compare the graphs with
    the model on the example, unless its code is such that a trace cannot get it wrong. ``level``: how much of what
    forward keeps is taken for a cache, where that was found out before (``history``). Raises ``TraceError`` with the line of the user's
    source where tracing of the root stopped, or where the graph first differs from the model.
    """
    skeleton = Skeleton(model, is_known)
    hold_modes(skeleton)
    found = TracedModel(skeleton, {}, {}, opaque=dict(whole or {}))
    example = call_form(example_inputs)
    level = level or (KNOWN if on_meta(model, example) else GUESSED)  # what is guessed has to be compared
    add_traced(found, "", example, is_known, has_rule, strict=whole is not None, level=level)
    if skeleton.past is None:
        return found
    reach = skeleton.past[-1].reach

    def difference(of: TracedModel, mode: str = "eval", on: Any = example, writing: bool = False) -> Difference | None:
        others = skeleton.other_modes(mode == "train")
        return Comparison(model, of.graphs[mode], of.constants, on, reach, mode == "train", others).difference(writing)

    while skeleton.has_history:
        # What an earlier call left may be of the example itself: what is computed anew then is the same, and another input's is not.
        if difference(found, writing=True) is None and ((other := difference(found, on=another(example))) is None or other.chooses):
            return found
        # What forward keeps is more than a cache: what it computes depends on it.
        level = worse(skeleton.started.level)
        found = TracedModel(skeleton, {}, {}, opaque=dict(whole or {}))
        add_traced(found, "", example, is_known, has_rule, strict=whole is not None, level=level)
        if level != KEPT:
            continue
        text = "what forward computes depends on its earlier calls; the slim module starts from what they left"
        found.notes += (Note(NoteKind.STATE, text),)
        break
    if not check or whole is not None or not skeleton.has_history and is_plain(skeleton.twins, reach):
        return found
    if on_meta(model, ((), {})):
        text = "the weights have no values (meta device), so the traced graph was not compared with the model"
        found.notes += (Note(NoteKind.LOST, text),)
        return found
    for mode in found.graphs:
        wrong = difference(found, mode)
        if wrong is not None and mode == "eval" and not wrong.chooses:
            raise TraceError(f"{wrong}: it was not traced as it runs")
        if wrong is not None:
            text = f"in {'training' if mode == 'train' else 'evaluation'} mode the slim module may compute something else: {wrong}"
            found.notes += (Note(NoteKind.MODE, text),)
    return found


def add_traced(
    traced: TracedModel,
    path: str,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    is_known: Callable[[nn.Module], bool],
    has_rule: Callable[[Any], bool],
    device: torch.device | None = None,
    strict: bool = False,
    level: str = KNOWN,
    history: History | None = None,
) -> None:
    """Trace the module at ``path`` and add its graphs, "eval" and where it differs "train", under ``path:`` for a part of the model.

    ``device``: where the inputs are, if the example only stands for them. ``strict``: what cannot be traced raises; the error's ``module``
    is the path of the module whose code was at work. ``level``: how much of what forward keeps is taken for a cache. ``history``: where to
    start from, if what is around the module was traced already.
    """
    skeleton = traced.skeleton
    device = device or next((t.device for t in tensors(example) if t.device.type != "meta"), torch.device("cpu"))
    blocked: dict[str, str] = {}
    changing: set[str] = set()
    prefix = f"{path}:" if path else ""

    def attempt(training: bool, history: History, blocked: dict[str, str]) -> tuple[ShapeTracer, fx.Graph]:
        outward = _Outward(skeleton, path)
        while True:
            tracer = ShapeTracer(skeleton, is_known, {*traced.opaque, *blocked}, device, has_rule, path)
            tracer.changing |= changing
            try:
                graph = _one(tracer, example, training, history)
                if frozen := tracer.frozen(graph) - changing:  # traced again, with what is read of them as a part of the graph
                    changing.update(frozen)
                    continue
                return tracer, graph
            except TraceError as error:
                if frozen := tracer.frozen(tracer.__dict__.get("graph")) - changing:
                    changing.update(frozen)
                    continue
                at_work = _at_work(error)
                culprit = at_work[-1] if at_work else ""
                if training and not error.needs_training and outward.next(at_work, str(error)):
                    continue
                if strict:
                    error.module = culprit
                    raise
                if not culprit or culprit in blocked:
                    first = blocked.get(tracer.failed)  # why it was kept whole says more than how running it failed
                    raise (error if first is None else TraceError(first)) from error.__cause__
                blocked[culprit] = str(error)

    def without_history(training: bool) -> tuple[ShapeTracer, fx.Graph]:
        """From before the first call where that can be traced as well as from what earlier calls left: with nothing more kept whole."""
        settled = dict(skeleton.as_in_evaluation)
        found: list[tuple[History, dict[str, str], dict[str, str], tuple[ShapeTracer, fx.Graph]]] = []
        for history in histories:
            tried, skeleton.as_in_evaluation = dict(blocked), dict(settled)
            try:
                made = attempt(training, history, tried)
            except TraceError:
                if history is histories[-1] and not found:
                    skeleton.as_in_evaluation = settled
                    raise
                continue
            found.append((history, tried, skeleton.as_in_evaluation, made))
            if tried.keys() == blocked.keys():
                break
        fewest = min(len(tried) for _, tried, _, _ in found)
        history, tried, skeleton.as_in_evaluation, made = next(one for one in found if len(one[1]) == fewest)
        blocked.update(tried)
        histories[:] = [history]
        skeleton.started = history
        return made

    def again(frozen: set[str]) -> tuple[fx.Graph, ShapeTracer] | None:
        """Evaluation traced with values of these read at each call; None where that cannot be done: a note says that they stay."""
        before = set(changing)
        changing.update(frozen)
        try:
            made, graph = without_history(training=False)
            return graph, made
        except TraceError:
            changing.intersection_update(before)
            return None

    histories = past(skeleton, level) if history is None else [history]
    skeleton.training_was_read = False
    tracer, graph = without_history(training=False)
    graphs, notes, constants = {"eval": graph}, dict(tracer.notes), dict(tracer.constants)
    traced.read |= tracer.read
    if skeleton.training_was_read:
        before = set(skeleton.as_in_evaluation)
        skeleton.taken = frozenset(constants)  # the graphs of both modes find their constants in one module
        try:
            second, graph = without_history(training=True)
            if frozen := second.writes & tracer.read - tracer.changing:  # evaluation reads what training writes
                graphs["eval"], tracer = again(frozen) or (graphs["eval"], tracer)
                notes, constants = dict(tracer.notes), {**constants, **tracer.constants}
            notes.update(second.notes)  # of equal graphs too: of two that are drawn at random, training may have got evaluation's
            if not _same(graphs["eval"], graph):
                graphs["train"] = graph
                traced.read |= second.read
                constants.update(second.constants)
        except TraceError as error:
            text = f"training mode could not be traced, the slim module computes as in evaluation mode there: {error}"
            notes[Note(NoteKind.MODE, text)] = None
        finally:
            skeleton.taken = frozenset()
        for name, why in skeleton.as_in_evaluation.items():
            if name not in before:
                own = name or "the network"
                text = f"in training {own} itself computes as in evaluation, since its code there could not be traced: {why}"
                notes[Note(NoteKind.MODE, text)] = None
    notes.update(dict.fromkeys(lost(skeleton, path)))
    traced.graphs.update({prefix + mode: g for mode, g in graphs.items()})
    traced.constants.update(constants)
    traced.opaque.update(blocked)
    traced.notes = tuple(dict.fromkeys((*traced.notes, *notes)))


def _at_work(error: BaseException | None) -> tuple[str, ...]:
    """The modules and functions that were traced into where the error began, outermost first; none for the root's own code."""
    while error is not None:
        if found := getattr(error, "traced_within", ()):
            return tuple(found)
        error = error.__cause__
    return ()


class _Outward:
    """Which module's own code is next to be traced in training as it runs in evaluation, where that in training cannot be traced."""

    def __init__(self, skeleton: Skeleton, path: str) -> None:
        self.skeleton, self.path = skeleton, path
        self.innermost: str | None = None
        self.tried: str | None = None
        self.left: list[str] = []

    def next(self, at_work: tuple[str, ...], why: str) -> bool:
        """Whether there is one more to try, which the skeleton then holds in evaluation: the innermost of those at work or, where that was
        no help, the next around it. A module without children that has buffers is kept whole instead: training may be what fills them."""
        held = self.skeleton.as_in_evaluation
        chain = [*(name for name in reversed(at_work) if self.skeleton.module_or_none(name) is not None), self.path]
        if chain[0] != self.innermost:
            self.innermost = chain[0]
            module = self.skeleton.module(chain[0])
            whole = bool(module._buffers) and not module._modules
            self.left = [] if whole else [name for name in chain if name not in held]
        elif self.tried is not None:
            del held[self.tried]
        self.tried = self.left.pop(0) if self.left else None
        if self.tried is not None:
            held[self.tried] = why
        return self.tried is not None


def _one(tracer: ShapeTracer, example: Any, training: bool, history: History) -> fx.Graph:
    tracer.skeleton.set_training(training)
    tracer.graph_is_training = training
    original = tracer.skeleton.snapshot()
    plain = [(t, t.clone()) for t in tracer.skeleton.plain_tensors()]
    try:
        history.forget()
        graph = _recorded(tracer, example, history, None if history.first else original)
    except (TraceError, InputError):
        raise
    except Exception as error:  # the user's forward may raise anything when it meets a proxy
        raise TraceError(f"{_where(error)}: {type(tracer.skeleton.original).__name__} could not be traced: {_said(error)}") from error
    finally:
        tracer.skeleton.restore(original)
        written_back(tracer, plain)
    for place in remove_left(tracer.made):
        tracer.note(NoteKind.STATE, f"forward kept what it computed while it was traced in {place}, which was rid of it")
    for node in graph.find_nodes(op="placeholder"):
        node.meta["val"] = node.meta.pop("given", node.meta["val"])
    detach(tracer, graph)
    contract_as_it_is(graph)
    eliminate(graph)
    extents.forget(graph)
    return graph


def _recorded(tracer: ShapeTracer, example: Any, history: History, before: Snapshot | None = None) -> fx.Graph:
    before = before or tracer.skeleton.snapshot()
    graph = tracer.run(example, history.isolated)
    keep_state(tracer, graph, before)
    return graph


def _where(error: BaseException) -> str:
    frame, found = error.__traceback__, "<unknown>"
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not is_skipped(file):
            found = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found


def _said(error: Exception) -> str:
    """What an error of the user's code says, with what is the matter where code met a proxy in place of a tensor."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, TypeError) and first.startswith("descriptor '") and ShapeProxy.__name__ in first:
        name = first.split("'")[1]
        return f"torch.Tensor.{name}(x, ...) is a call that a trace cannot follow; write x.{name}(...)"
    frame = error.__traceback__
    while frame is not None:
        code, names = frame.tb_frame.f_code, frame.tb_frame.f_locals
        if code.co_filename == functools.__file__ and ("dispatch" in code.co_names or "dispatch" in names):
            why = "functools.singledispatch chooses by the class of an argument, which a trace cannot follow: call the function meant"
            return f"{first} ({why})"
        frame = frame.tb_next
    return first


def _same(a: fx.Graph, b: fx.Graph) -> bool:
    first, second = list(a.nodes), list(b.nodes)
    if len(first) != len(second):
        return False
    number = {n: i for i, n in enumerate(first)} | {n: i for i, n in enumerate(second)}

    def shape(node: fx.Node) -> Any:
        return node.op, node.target, repr(map_arg((node.args, node.kwargs), lambda n: number[n]))

    return all(shape(x) == shape(y) for x, y in zip(first, second, strict=True))
