"""Repair without training: a slim network mended in closed form on calibration inputs, layer by layer.

"bias": what each layer's output lacks in the mean goes into its bias, or into the running mean of the BatchNorm behind it.
"lstsq": besides, the weights that are left are fitted anew to the original layer's responses by ridge least squares (He 2017,
https://arxiv.org/abs/1707.06168, sec. 3.1; here for any graph). Layers are mended in the order in which they run, each from what the
mended network before it gives, so that later layers correct what earlier ones could not; where a layer's output is added to another
branch, what that branch lacks is corrected too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.errors import InputError
from fxprune.evaluation.accuracy import device_of, evaluating, recalibrate_batchnorm, to_device
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.labels.values import values
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.repair.layers import Consumer, consumers
from fxprune.repair.least_squares import Moments
from fxprune.repair.matrices import LAYERS, Places, choose, grouped, input_rows, matrices, output_rows, set_matrices
from fxprune.repair.replay import Call, Playback, calls_of_part, whole_calls

REPAIRS = ("none", "bn", "bias", "lstsq")
ROWS = 32  # rows a layer takes from each calibration sample: places of a convolution's output, or tokens
WIDEST = 8192  # features beyond which a layer's least squares would not fit into ordinary memory
ROOM = 256 * 2**20  # bytes of activations, and again of responses, that are kept rather than computed again
FAINT = 1e-3  # a channel that its BatchNorm scales by less than this corrects no other branch

Wanted = tuple[Places, Tensor, Tensor | None]
"""Where rows were taken, the original's responses there (rows, channels), and what they are added to."""


def checked(kind: str) -> str:
    """``kind`` if it is a repair; raises ``InputError`` that lists them if not."""
    if kind not in REPAIRS:
        raise InputError(f"repair is {kind!r}; choose one of {', '.join(REPAIRS)}")
    return kind


class Repairer:
    """Mends slim networks of one analysed model on one calibration set.

    ``batches``: (inputs, labels) or inputs alone. ``reference``: the same network with the weights whose responses are aimed at; those of
    ``graph`` itself, if left out. They are copied at the first repair, and the responses are kept between calls as far as they fit.
    """

    def __init__(self, graph: CouplingGraph, batches: Iterable[Any], kind: str, reference: CouplingGraph | None = None) -> None:
        self.graph, self.kind, self.reference = graph, checked(kind), reference or graph
        self.batches = list(batches)
        if kind != "none" and not self.batches:
            raise InputError(f'repair="{kind}" needs calibration data: pass calibration=[inputs, ...], the more batches the better')
        self.device = device_of(graph.model)
        self._responses: dict[str, _Responses] = {}
        self._original: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, slim: nn.Module, slimmer: Slimmer) -> tuple[str, ...]:
        """Mend ``slim``, which ``slimmer`` made, in place. Returns what could not be mended, in sentences."""
        if self.kind == "none":
            return ()
        if self.kind == "bn":
            recalibrate_batchnorm(slim, self.batches)
            return self._called_norms()
        notes: list[str] = []
        mended: set[str] = set()
        with evaluating(slim):
            for part in self.graph.walk.traced.parts or [""]:
                chosen = self._mend(slim, part, slimmer)
                mended.update(f"{part}.{one.path}" if part else one.path for one in chosen)
                notes += self._notes(chosen)
        left = _left(self.graph, slimmer, mended)
        if left:
            why = "no layer called once with a weight of its own, or working across channels"
            notes.append(f"repair left {_listed(left)} as sliced: {why}")
        return tuple(notes)

    def _called_norms(self) -> tuple[str, ...]:
        """BatchNorms that are calls, as in an exported graph: their statistics are buffers that no module updates."""
        nodes = (n for g in self.graph.walk.traced.graphs.values() for n in g.nodes if n.op == "call_function")
        found = [n.meta.get("owner") or n.name for n in nodes if getattr(n.target, "__name__", "") == "batch_norm"]
        if not found:
            return ()
        return (
            f"repair left the statistics of {_listed(sorted(set(found)))}: batch_norm is called as a function, only modules are mended",
        )

    def _inputs(self, batch: int) -> Any:
        given = self.batches[batch]
        pair = isinstance(given, (tuple, list)) and len(given) == 2  # (inputs, labels), as ``importance`` takes them
        return to_device(given[0] if pair else given, self.device)

    def _calls(self, root: nn.Module, part: str) -> Callable[[int], list[Call]]:
        return calls_of_part(root, root.get_submodule(part), self._inputs) if part else whole_calls(self._inputs)

    def original(self, part: str, room: int) -> tuple[Any, Playback]:
        """The original network, or a traced part of it, as a graph module, and what runs it on the batches."""
        if self._original is None:
            everything = np.ones(int(self.reference.starts[-1]), dtype=bool)
            self._original = Slimmer(self.reference, everything).run().eval()
        module = _part(self._original, part)
        return module, Playback(module, module.graphs["eval"], self._calls(self._original, part), room)

    def _responses_of(self, part: str) -> _Responses:
        if part not in self._responses:
            module, playback = self.original(part, ROOM)
            self._responses[part] = _Responses(module, playback.calls)
        return self._responses[part]

    def _mend(self, slim: nn.Module, part: str, slimmer: Slimmer) -> list[Consumer]:
        module = _part(slim, part)
        graph = module.eval_graph
        old = _touched(self.graph, slimmer, part)
        chosen = [one for one in consumers(module, graph) if one.path in old]
        play = Playback(module, graph, self._calls(slim, part), ROOM)
        for one in chosen:
            self._fit(one, play, self._responses_of(part), old[one.path])
        return chosen

    def _fit(self, one: Consumer, play: Playback, responses: _Responses, kept: Any) -> None:
        weights = matrices(one.module)
        refit = self.kind == "lstsq" and weights.shape[2] <= WIDEST
        moments = Moments()
        for batch in range(len(self.batches)):
            for values_now, wanted in zip(play.before(batch, one.node), responses.of(batch), strict=True):
                places, y, other = wanted[one.path]
                if other is not None and one.other is not None:
                    gain = one.gain().float()
                    lack = _cut(other, kept) - output_rows(one.module, values_now[one.other], places)
                    y = _cut(y, kept) + torch.where(gain.abs() > FAINT, lack / gain, 0.0)
                else:
                    y = _cut(y, kept)
                moments.add(input_rows(one.module, values_now[one.source], places), grouped(one.module, y), products=refit)
        if refit:
            weights = moments.fitted(weights, centred=one.takes_shift)
            set_matrices(one.module, weights)
        if one.takes_shift:
            one.add_shift(moments.shift(weights))

    def _notes(self, chosen: Sequence[Consumer]) -> list[str]:
        notes = []
        bare = [one.path for one in chosen if not one.takes_shift]
        if bare:
            notes.append(f"repair could add no constant to {_listed(bare)}: no bias, and no BatchNorm that reads nothing else")
        wide = [one.path for one in chosen if matrices(one.module).shape[2] > WIDEST]
        if self.kind == "lstsq" and wide:
            notes.append(f"repair fitted only the means of {_listed(wide)}: more than {WIDEST} features")
        return notes


class _Responses:
    """What the original's layers give on every batch, at places drawn for it; kept as far as it fits into ``ROOM``, else computed anew."""

    def __init__(self, module: Any, calls: Callable[[int], list[Call]]) -> None:
        self.module, self.calls = module, calls
        self.graph = module.graphs["eval"]
        self.consumers = {one.node: (i, one) for i, one in enumerate(consumers(module, self.graph))}
        self._held: dict[int, list[dict[str, Wanted]]] = {}
        self._bytes = 0

    def of(self, batch: int) -> list[dict[str, Wanted]]:
        """Layer -> rows, one mapping for each call of the module that the batch makes."""
        if batch in self._held:
            return self._held[batch]
        found = [self._recorded(batch, number, call) for number, call in enumerate(self.calls(batch))]
        size = sum(t.nbytes for one in found for _, y, other in one.values() for t in (y, other) if t is not None)
        if self._bytes + size <= ROOM:
            self._held[batch], self._bytes = found, self._bytes + size
        return found

    def _recorded(self, batch: int, number: int, call: Call) -> dict[str, Wanted]:
        found: dict[str, Wanted] = {}
        play = Playback(self.module, self.graph, lambda _: [call], ROOM)
        for node, (i, one) in self.consumers.items():
            values_now = play.before(0, play.after(node))[0]
            output = values_now[node]
            places = choose(one.module, output, rows_wanted(call), seed=(batch * 1009 + number) * 100_003 + i)
            other = None if one.other is None else values_now.get(one.other)
            same = isinstance(other, Tensor) and other.shape == output.shape
            rows = output_rows(one.module, other, places) if same and isinstance(other, Tensor) else None
            found[one.path] = (places, output_rows(one.module, output, places), rows)
        return found


def _part(root: Any, part: str) -> Any:
    return root.get_submodule(part) if part else root


def rows_wanted(batch: Any) -> int:
    """Rows to take from a layer for a batch, or the inputs of a call: ``ROWS`` a sample."""
    first = next((t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim), None)
    return ROWS if first is None else ROWS * max(1, first.shape[0])


def _cut(rows: Tensor, kept: Any) -> Tensor:
    return rows if kept is None else rows.index_select(1, torch.from_numpy(kept).to(rows.device))


def _left(graph: CouplingGraph, slimmer: Slimmer, mended: set[str]) -> list[str]:
    """What lost inputs and was not mended: owners of weights of two dimensions or more that were cut along another one than the first."""
    skeleton = graph.walk.traced.skeleton
    cut = {name for name in skeleton.parameter_names if any(dim > 0 for dim in slimmer.kept_dims(name))}
    return sorted({name.rpartition(".")[0] or name for name in cut} - mended)


def _touched(graph: CouplingGraph, slimmer: Slimmer, part: str) -> dict[str, Any]:
    """The layers that what was removed has an effect on, by path, with the output channels that are left (None: all).

    Not those that removed channels reach along another axis: their rows cannot be compared with the original's.
    """
    mode = f"{part}:eval" if part else "eval"
    env = graph.walk.env[mode]
    reached: set[fx.Node] = set()
    found: dict[str, Any] = {}
    for node in graph.walk.traced.graphs[mode].nodes:
        inputs = node.all_input_nodes
        if any(one in reached or slimmer.touched(env.get(one)) for one in inputs):
            reached.add(node)
        if node in reached and node.op == "call_module":
            output = next(iter(values(env[node])), None)
            layer = graph.walk.traced.skeleton.module(str(node.target))
            weight = getattr(layer, "weight", None)
            if output is None or not isinstance(layer, LAYERS) or not isinstance(weight, Tensor):
                continue
            axis = output.ndim - 1 if isinstance(layer, nn.Linear) else output.ndim - weight.ndim + 1
            if all(slimmer.kept(output, other) is None for other in output.axes if other != axis):
                found[str(node.target).removeprefix(f"{part}." if part else "")] = slimmer.kept(output, axis)
    return found


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
