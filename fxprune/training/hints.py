"""Hints: places inside student and teacher that are compared, feature by feature or by where they are active."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune import example_inputs as forms
from fxprune.attached import record_of
from fxprune.errors import InputError, kind_of
from fxprune.evaluation.running import call
from fxprune.files.rebuilding import units_kept
from fxprune.passes.compat import tree_leaves
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.outputs import as_listed
from fxprune.passes.ir.slim_module import SlimModule
from fxprune.passes.pipeline import analysed
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.records import PruningRecord

KINDS = ("features", "attention")
MATCHES = ("select", "adapter")


@dataclass(frozen=True)
class Hint:
    """Two places that are compared, and how.

    ``student``: a node of the slim module's graph (``[node.name for node in slim.graph.nodes]``) or the path of a layer;
    ``teacher``: likewise, by default the same name, since the slim graph keeps the original's. ``weight``: of this term in the loss.
    ``kind``: "features": the mean squared difference (FitNets, Romero 2015, https://arxiv.org/abs/1412.6550, without their separate
    stage); "attention": of each tensor the map ``m = sum over channels of x**2``, flattened and scaled to length 1;
    the term is ``|m_student - m_teacher|**2``, the mean over the batch (Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928, eq. 2
    with p = 2; theirs is not squared).
    ``match``, for features of different widths: "select" compares the channels of the teacher that the student kept, by its pruning
    record; "adapter" trains a linear map (a 1x1 convolution) from the student's channels to the teacher's, dropped afterwards.
    ``axis``: that of the channels in the maps of "attention": 1 for images, -1 for tokens.
    """

    student: str
    teacher: str | None = None
    weight: float = 1.0
    kind: str = "features"
    match: str = "select"
    axis: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.match not in MATCHES:
            raise InputError(
                f"hint {self.student!r} has kind {self.kind!r} and match {self.match!r}; "
                f"kind is one of {', '.join(KINDS)}, match one of {', '.join(MATCHES)}"
            )
        if not self.weight > 0:
            raise InputError(f"hint {self.student!r} has weight {self.weight}; it must be above 0")

    @property
    def place(self) -> str:
        """The name in the teacher."""
        return self.student if self.teacher is None else self.teacher


class Hints:
    """The hints of one distillation: the two networks made to show the places, and the losses between them."""

    def __init__(self, hints: Sequence[Hint], student: nn.Module, teacher: nn.Module) -> None:
        self.hints = tuple(hints)
        self.student = Tapped(student, [hint.student for hint in self.hints], "student")
        analysis = None
        if any(hint.kind == "features" and hint.match == "select" for hint in self.hints) or not _are_layers(teacher, self.hints):
            analysis = _analysed(student, teacher)
        shown = teacher
        if analysis is not None and not _are_layers(teacher, self.hints):
            keep_all = np.ones(int(analysis.starts[-1]), dtype=bool)
            shown = Slimmer(analysis, keep_all).run().eval()  # computes what the teacher does, and has nodes
        self.teacher = Tapped(shown, [hint.place for hint in self.hints], "teacher")
        self.kept: list[dict[int, Tensor]] = [{} for _ in self.hints]
        if analysis is not None:
            self.kept = _kept(analysis, record_of(student), [hint.place for hint in self.hints])  # type: ignore[arg-type]
        self.adapters = nn.ModuleList()

    def learner(self, first: Callable[[], Any]) -> nn.Module:
        """The student, showing its places, with the adapters beside it; ``first`` gives inputs to measure their widths by."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            inputs = first()
            modes = [(module, module.training) for module in self.student.modules()]
            try:
                ours = self.student.eval()(inputs)[1]
            finally:
                for module, training in modes:
                    module.train(training)
            theirs = self.teacher(inputs)[1]
        # Once, rather than from main memory at every step.
        self.kept = [{axis: one.to(b.device) for axis, one in kept.items()} for kept, b in zip(self.kept, theirs, strict=True)]
        axes = []
        for hint, kept, a, b in zip(self.hints, self.kept, ours, theirs, strict=True):
            wanted = hint.kind == "features" and hint.match == "adapter"
            axis = _only_difference(hint, a, b) if wanted else 0
            axes.append(axis)
            self.adapters.append(nn.Linear(a.shape[axis], b.shape[axis], bias=False).to(a.device) if wanted else nn.Identity())
            if not wanted:
                self._one(hint, kept, a, b)  # what does not fit is refused before anything is trained
        return _Hinted(self.student, self.adapters, axes)

    def ask(self, inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """The teacher's output, and its places."""
        found: tuple[Any, tuple[Tensor, ...]] = self.teacher(inputs)
        return found

    def loss(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        each = (self._one(hint, kept, a, b) for hint, kept, a, b in zip(self.hints, self.kept, ours, theirs, strict=True))
        return torch.stack(list(each)).sum()

    def _one(self, hint: Hint, kept: dict[int, Tensor], ours: Tensor, theirs: Tensor) -> Tensor:
        ours, theirs = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (ours, theirs))
        if hint.kind == "attention":
            if min(ours.ndim, theirs.ndim) < 3:
                raise InputError(f"hint {hint.student!r} has no positions beside its channels for a map of attention; name another place")
            ours, theirs = (F.normalize(one.square().sum(hint.axis).flatten(1), dim=1) for one in (ours, theirs))
            _check_shapes(hint, ours, theirs, "maps")
            return hint.weight * (ours - theirs).square().sum(1).mean()
        if hint.match == "select" and ours.shape != theirs.shape:
            for axis, indices in kept.items():
                theirs = theirs.index_select(axis, indices)
        _check_shapes(hint, ours, theirs, "features")
        return hint.weight * F.mse_loss(ours, theirs)


class Tapped(nn.Module):
    """A network that returns, beside its output, what it computed at some places: nodes of its graph, or layers by their paths."""

    def __init__(self, model: nn.Module, places: Sequence[str], what: str) -> None:
        super().__init__()
        self.model, self.places = model, tuple(places)
        layers = dict(model.named_modules())
        graphs = model.graphs if isinstance(model, SlimModule) else {}
        self.taps = {mode: _tap(model, graph, self.places, what) for mode, graph in graphs.items()}
        for place in () if graphs else self.places:
            if place not in layers:
                raise InputError(f"hint {place!r} is no layer of the {what}; name one by its path, or prune it so that its graph has nodes")

    def forward(self, inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        if self.taps:
            mode = "train" if self.model.training and "train" in self.taps else "eval"
            output, shown = call(self.taps[mode], inputs)
            return output, tuple(_tensor(place, value) for place, value in zip(self.places, shown, strict=True))
        shown = {}
        layers = dict(self.model.named_modules())

        def keep(place: str) -> Callable[..., None]:
            return lambda module, args, output: shown.__setitem__(place, output)

        handles = [layers[place].register_forward_hook(keep(place)) for place in dict.fromkeys(self.places)]
        try:
            output = call(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        silent = [place for place in self.places if place not in shown]
        if silent:
            raise InputError(f"hint {silent[0]!r} was not called; name a layer that runs")
        return output, tuple(_tensor(place, shown[place]) for place in self.places)


class _Hinted(nn.Module):
    """A tapped student whose places have gone through their adapters."""

    def __init__(self, student: Tapped, adapters: nn.ModuleList, axes: Sequence[int]) -> None:
        super().__init__()
        self.student, self.adapters, self.axes = student, adapters, tuple(axes)

    def forward(self, inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        output, shown = self.student(inputs)
        triples = zip(self.adapters, self.axes, shown, strict=True)
        return output, tuple(adapter(one.movedim(axis, -1)).movedim(-1, axis) if axis else one for adapter, axis, one in triples)


def _tap(model: nn.Module, graph: fx.Graph, places: Sequence[str], what: str) -> fx.GraphModule:
    """A graph module on the model's own layers and parameters that returns the places beside the output."""
    nodes = [_node(graph, place, what) for place in places]
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = made.graph_copy(graph, copies)
    made.output((output, tuple(copies[node] for node in nodes)))
    return fx.GraphModule(model, made)


def _node(graph: fx.Graph, place: str, what: str) -> fx.Node:
    named: list[fx.Node] = [node for node in graph.nodes if node.name == place and node.op not in ("output", "placeholder")]
    called: list[fx.Node] = [node for node in graph.nodes if node.op == "call_module" and node.target == place]
    if named or len(called) == 1:
        return (named or called)[0]
    if called:
        names = ", ".join(node.name for node in called)
        raise InputError(f"hint {place!r} is called {len(called)} times in the {what}; name one of its nodes: {names}")
    within = [node.name for node in graph.nodes if node.name.startswith(f"{place.replace('.', '_')}_")]
    advice = f"the last node within it is {within[-1]!r}" if within else "see [node.name for node in slim.graph.nodes]"
    raise InputError(f"hint {place!r} is no node of the {what}'s graph; {advice}")


def _tensor(place: str, value: Any) -> Tensor:
    found = next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim > 1), None)
    if found is None:
        raise InputError(f"hint {place!r} is {kind_of(value)} without a tensor of features")
    return found


def _are_layers(teacher: nn.Module, hints: Sequence[Hint]) -> bool:
    layers = dict(teacher.named_modules())
    return all(hint.place in layers for hint in hints)


def _analysed(student: nn.Module, teacher: nn.Module) -> CouplingGraph | None:
    """The teacher's coupling graph, where the student is a slim module of it."""
    record = record_of(student)
    if record is None or record.policy.inputs is None:
        return None
    example = forms.build(record.policy.inputs, device="meta")
    options = record.policy.options
    norms, outputs = str(options.get("norms", "plain")), as_listed(options.get("outputs"))
    graph = analysed(teacher, example, (), str(options.get("attention", "auto")), norms=norms, outputs=outputs)
    return graph


def _kept(graph: CouplingGraph, record: PruningRecord, places: Sequence[str]) -> list[dict[int, Tensor]]:
    """For each place of the teacher: axis -> positions that the student kept."""
    names = {alias: name for name, aliases in graph.traced.skeleton.aliases.items() for alias in aliases}
    slimmer = Slimmer(graph, units_kept(graph, record.kept, names))
    if "eval" not in graph.traced.graphs:
        return [{} for _ in places]
    values = graph.values["eval"]
    found = []
    for place in places:
        value: Any = values[_node(graph.traced.graphs["eval"], place, "teacher")]
        axes = {axis: slimmer.kept(value, axis) for axis in getattr(value, "axes", {})}
        found.append({axis: torch.from_numpy(kept) for axis, kept in axes.items() if kept is not None})
    return found


def _only_difference(hint: Hint, ours: Tensor, theirs: Tensor) -> int:
    """The axis that an adapter maps: the one in which the shapes differ, else that of the channels."""
    if ours.ndim == theirs.ndim:
        different = [axis for axis in range(1, ours.ndim) if ours.shape[axis] != theirs.shape[axis]]
        if len(different) <= 1:
            return different[0] if different else hint.axis % ours.ndim
    raise InputError(f"hint {hint.student!r}: shapes {list(ours.shape)} and {list(theirs.shape)} differ in more than their channels")


def _check_shapes(hint: Hint, ours: Tensor, theirs: Tensor, what: str) -> None:
    if ours.shape != theirs.shape:
        raise InputError(
            f"hint {hint.student!r}: the {what} have shapes {list(ours.shape)} in the student and {list(theirs.shape)} in the teacher; "
            + ('use match="adapter"' if what == "features" else "name places of the same resolution")
        )
