"""Repair without training: a slim network repaired in closed form on calibration inputs, layer by layer.

"bias": what each layer's output lacks in the mean goes into its bias, or into the running mean of the BatchNorm behind it.
"lstsq": besides, the weights that are left are changed to give the original layer's responses, by ridge least squares (He 2017,
https://arxiv.org/abs/1707.06168, sec. 3.1; here for any graph). Layers are repaired in the order in which they run, each from what the
repaired network before it gives, so that later layers correct what earlier ones could not; where a layer's output is added to another
branch, what that branch lacks is corrected too. The statistics of BatchNorm follow. Where blocks were left out the original is the network
with them (``fxprune.repair.standing_in``).
"joint": after that all weights move together (``fxprune.repair.together``).

Both networks run once over the batches, side by side: all batches stand before a layer when it is repaired, and go on from there.
A part of the batches is not fitted. It decides, for each layer, whether it is fitted, given a constant, or left as sliced, and in the end
whether the whole is better than BatchNorm re-estimated alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.errors import EvaluationError, InputError
from fxprune.evaluation.accuracy import recalibrate_batchnorm
from fxprune.evaluation.batches import alone, inputs_of
from fxprune.evaluation.running import call, device_of, evaluating, to_device
from fxprune.passes.compat import tree_leaves
from fxprune.passes.coupling.blocks import Block
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.skeleton import below
from fxprune.passes.ir.slim_module import SlimModule
from fxprune.passes.labels.values import values
from fxprune.passes.rewriting.blocks import without_blocks
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.tracing.sizes import counted
from fxprune.passes.tracing.sizes.fixed_sizes import Modules
from fxprune.records import LayerRepair
from fxprune.repair.attention import Contraction, Products, by_head, change_queries, contractions, maker, picked
from fxprune.repair.clipping import FAINT, Rows
from fxprune.repair.distance import unlikeness
from fxprune.repair.fitting import Folds
from fxprune.repair.layers import Layer, Norm, Reading, key_of
from fxprune.repair.matrices import Places, choose, grouped, input_axis, input_rows, matrices, output_rows
from fxprune.repair.recurrent import Sequences, fit_recurrent
from fxprune.repair.registry import FITTING, REPAIRS, Repair, named, not_finite
from fxprune.repair.repeated import repair_repeated, repeated
from fxprune.repair.replay import Call, Playback, Room, calls_of_part, whole_calls
from fxprune.repair.splitting import JUDGE, Piece, pieces, samples
from fxprune.repair.standing_in import Aim, LeftOut
from fxprune.repair.together import move_together

ROOM = 512 * 2**20  # bytes of activations that are held in memory; more go to a file
CACHE = 256 * 2**20  # bytes of the original's responses that are kept between repairs
ROWS = 24  # rows for each feature that a layer fits, over all batches, where there is space
FEWEST = 8  # rows of a sample, where it has so many
AT_ONCE = 2**25  # numbers in the rows of one call

Progress = Callable[[int, int, str], None]
Responses = tuple[Places, Tensor, Tensor | None]
"""Where rows were taken, the original's responses there (rows, channels), and what they are added to."""


class Repairer:
    """Repairs slim networks of one analysed model, of those with all its blocks and without some, on one calibration set.

    ``batches``: (inputs, labels) or inputs alone. ``reference``: the same network with the weights whose responses are aimed at; those of
    ``graph`` itself, if left out. They are copied at the first repair, and the responses are kept between calls as far as they fit.
    ``progress``: called after each layer with how many are done, how many there are, and its name. ``thorough``: False takes half of the
    rows and fits nothing behind ReLUs, in half of the time; enough to compare many networks.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        batches: Iterable[Any],
        kind: Repair,
        reference: CouplingGraph | None = None,
        progress: Progress | None = None,
        thorough: bool = True,
    ) -> None:
        self.graph, self.given, self.reference, self.progress = graph, kind, reference or graph, progress
        self.thorough = thorough
        self.kind, self._method = named(kind)
        self.refits = self.kind in FITTING
        self.batches = list(batches)
        if self.kind != "none" and not self.batches:
            raise InputError(f'repair="{self.kind}" needs calibration data: pass calibration=[inputs, ...], the more batches the better')
        self.device = device_of(graph.model)
        self.layers: dict[str, LayerRepair] = {}
        self._inputs: dict[str, int] = {}  # weight -> the axis along which a layer reads with it
        self._cache = _Cache()
        self._norms: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # what the original's BatchNorms read: mean and variance
        self._original: nn.Module | None = None
        self._pieces: list[Piece] = []
        self._unshifted: list[str] = []  # layers of this repair that take no constant

    @torch.no_grad()
    def __call__(self, slim: nn.Module, slimmer: Slimmer) -> tuple[str, ...]:
        """Repair ``slim``, which ``slimmer`` made, in place. Returns how much was repaired and what could not be, in sentences; what
        was done to each layer is in ``layers``."""
        self.layers = {}
        said = self._method(self, slim, slimmer)
        found = not_finite(slim)
        before = not_finite(self.graph.model) if found else []
        if wrong := [name for name in found if name not in before]:
            raise EvaluationError(f"repair {self.kind!r} left {wrong[0]!r} with values that are not finite: {self._unfit()}")
        return said

    def _unfit(self) -> str:
        """Why nothing can be fitted to the calibration data, where values that are not finite came out."""
        for number, batch in enumerate(self.batches):
            found = [t for t in tree_leaves(inputs_of(batch, self.graph.inputs)) if isinstance(t, Tensor) and t.is_floating_point()]
            if not all(bool(torch.isfinite(t).all()) for t in found):
                return f"calibration batch {number} holds some"
        return "the network overflows on the calibration data; check its weights and how the inputs are scaled"

    def norms(self, slim: nn.Module, graph: CouplingGraph) -> tuple[str, ...]:
        """The repair "bn"."""
        done = recalibrate_batchnorm(slim, self.batches, self.graph.inputs)
        left = () if done else ("BatchNorm was left as it was: its statistics need batches of two samples or more",)
        return (*_called_norms(graph), *left)

    def by_layer(self, slim: nn.Module, slimmer: Slimmer) -> tuple[str, ...]:
        """The repairs "bias", "lstsq" and "joint"."""
        if not self.graph.traced.in_parts and not isinstance(slim, SlimModule):  # the user's class: its code is no graph to go along
            twin = Slimmer(slimmer.graph, slimmer.keep, slimmer.norms).run()
            _carry(slim, twin)
            said = self.by_layer(twin, slimmer)
            _carry(twin, slim)
            return said
        sliced = {name: t.clone() for name, t in slim.state_dict().items()}
        left = None if slimmer.graph is self.graph else LeftOut(self.graph, slimmer.graph.left_out)
        with evaluating(slim):
            outputs = None
            for part in [""] if self.graph.traced.of_root else self.graph.traced.inside():
                outputs = self._part(slim, part, slimmer, left)
            notes = [self._summary(), *self._bare(), *self._left(slimmer)]
            if self.refits:
                notes += self._judged(slim, sliced, outputs)
            if left is not None:
                notes += self._instead(slimmer.graph.left_out)
            if self.kind == "joint" and self.thorough:
                notes += [self._together(slim)]
        return tuple(notes)

    @torch.no_grad()
    def stood_in(self, blocks: Sequence[Block]) -> nn.Module:
        """The network without ``blocks``, all else kept, in which nothing is fitted but the layers that stand in for them."""
        slim = without_blocks(self.graph, blocks)
        reading, first = Reading(slim, slim.eval_graph), Reading(*self.original(""))
        aims = _aims(LeftOut(self.graph, blocks), first.graph)
        originals = {one.name: (number, one) for number, one in enumerate(first.layers())}
        with evaluating(slim), Room(ROOM) as room:
            run = _Run(self, "", Playback(slim, reading.graph, self._calls(slim, ""), room), self.playback("", room), aims)
            for one in reading.layers():
                if one.name in aims:
                    number, twin = originals[one.name]
                    run.layer(one, twin, number, None)
        return slim

    # -- what is run --------------------------------------------------------------------------------------------------------

    @property
    def pieces(self) -> list[Piece]:
        """The calibration inputs, by what they are for."""
        if not self._pieces:
            original = self._whole_original()
            inputs = [inputs_of(batch, self.graph.inputs) for batch in self.batches]
            self._pieces = pieces(inputs, lambda x: call(original, to_device(x, self.device)))
        return self._pieces

    def original(self, part: str) -> tuple[Any, fx.Graph]:
        """The original network, or a traced part of it, as a graph module, and its graph."""
        return _graph_of(self._whole_original(), part)

    def playback(self, part: str, room: Room) -> Playback:
        """What runs the original, or a part of it, on the pieces."""
        return self._playback(self._whole_original(), part, room)

    def _playback(self, root: nn.Module, part: str, room: Room) -> Playback:
        return Playback(*_graph_of(root, part), self._calls(root, part), room)

    def _whole_original(self) -> nn.Module:
        if self._original is None:
            self._original = _unpruned(self.reference)
        return self._original

    def _calls(self, root: nn.Module, part: str) -> Callable[[int], list[Call]]:
        def inputs(piece: int) -> Any:
            return to_device(self.pieces[piece].inputs, self.device)

        if not part:
            return whole_calls(inputs)
        # Code that was not traced may call a part on other rows in the slim network (the tokens that an expert gets), or not at all: a part
        # within it is fitted on what the original gives it.
        root = self._whole_original() if self.graph.traced.within(part) else root
        return calls_of_part(root, root.get_submodule(part), inputs)

    def _nested(self, part: str, graph: fx.Graph, slimmer: Slimmer) -> dict[fx.Node, list[str]]:
        """The nodes of the slim graph of ``part`` that call modules with parts in them, and those."""
        traced, prefix = slimmer.graph.traced, f"{part}." if part else ""
        found: dict[fx.Node, list[str]] = {}
        left = [one for one in traced.inside(part) if traced.within(one)]
        for node in graph.nodes:
            if node.op == "call_module" and f"{prefix}{node.target}" in traced.opaque:
                found[node] = [one for one in left if below(one, f"{prefix}{node.target}")]
                left = [one for one in left if one not in found[node]]
        return {node: parts for node, parts in found.items() if parts}

    def rows(self, layer: Layer, inputs: Any) -> int:
        """How many rows of ``layer`` to take from a call on ``inputs``: the more, the more features it has and the fewer samples."""
        features = matrices(layer.form, layer.weight).shape[2]
        total = sum(piece.samples for piece in self.pieces)
        each = max(FEWEST, -(-(ROWS if self.thorough else ROWS // 2) * features // max(1, total)))
        return max(1, min(each * samples(inputs), AT_ONCE // features))

    # -- one part -----------------------------------------------------------------------------------------------------------

    def _part(self, slim: nn.Module, part: str, slimmer: Slimmer, left: LeftOut | None) -> list[tuple[Any, Any]]:
        """Repair a part; returns what the original and the slim one give on the pieces that judge. ``left``: where blocks were left out."""
        module = _part(slim, part)
        reached = _Reached(slimmer, part, left)
        reading, first = Reading(module, module.eval_graph), Reading(*self.original(part))
        originals = {one.name: one for one in first.layers()}
        layers = {one.node: one for one in reading.layers() if one.name in reached.layers and one.name in originals}
        behind = {one.norm.node for one in layers.values() if one.norm is not None}
        twins = {key_of(norm.node): norm for norm in first.norms()}
        norms = {n.node: n for n in reading.norms() if n.node not in behind and key_of(n.node) in reached.norms and key_of(n.node) in twins}
        self._inputs.update({f"{part}.{name}" if part else name: input_axis(one.form) for name, one in originals.items()})
        twin_cells = {str(node.target): (node, module) for node, module in first.recurrent().items()}
        cells = reading.recurrent() if self.refits else {}
        cells = {n: m for n, m in cells.items() if str(n.target) in reached.recurrent and str(n.target) in twin_cells}
        here = contractions(reading.graph)
        there = [one for one in contractions(first.graph) if left is None or one.node.name not in left.gone]
        paired = zip(here, there, reached.products, strict=True) if len(here) == len(there) == len(reached.products) else ()
        products = {one.node: (one, twin, kept) for one, twin, kept in paired if kept is not None and self.refits}
        order = {name: i for i, name in enumerate(originals)}
        inner = self._nested(part, reading.graph, slimmer)
        self._repeated(slim, part, slimmer, reading)
        with Room(ROOM) as room:
            mine = Playback(module, reading.graph, self._calls(slim, part), room)
            run = _Run(self, part, mine, self.playback(part, room), _aims(left, first.graph))
            stops = [n for n in reading.graph.nodes if n in layers or n in norms or n in cells or n in products or n in inner]
            for done, node in enumerate(stops):
                if node in inner:
                    for each in inner[node]:
                        self._part(slim, each, slimmer, None)
                elif node in norms:
                    run.norm(norms[node], twins[key_of(node)], reached.norms[key_of(node)])
                elif node in products:
                    self.layers.update(run.products(*products[node], {one.node: one for one in reading.layers()}))
                elif node in cells:
                    name = str(node.target)
                    full = f"{part}.{name}" if part else name
                    kept = {p: slimmer.kept_dims(f"{full}.{p}") for p, _ in cells[node].named_parameters()}
                    recurrent = run.recurrent(node, cells[node], *twin_cells[name], kept)
                    if recurrent is not None:
                        self.layers[full] = recurrent
                else:
                    one = layers[node]
                    made = run.layer(one, originals[one.name], order[one.name], reached.layers[one.name])
                    self.layers[f"{part}.{one.path}" if part else one.path] = made
                if self.progress is not None:
                    self.progress(done + 1, len(stops), str(node))
            self._unshifted += [f"{part}.{one.path}" if part else one.path for one in layers.values() if not one.takes_shift]
            return [] if part else run.outputs()

    def _repeated(self, slim: nn.Module, part: str, slimmer: Slimmer, reading: Reading) -> None:
        """Repair the layers that are called several times; where blocks were left out, the target is then
        the network without the blocks, which makes the same calls."""
        if not reading.repeated():
            return
        mode, graph = f"{part}:eval" if part else "eval", slimmer.graph
        root = self._whole_original() if graph is self.graph else _unpruned(graph)
        first = Reading(*_graph_of(root, part))
        analysed = Reading(graph.traced.skeleton.original, graph.traced.graphs[mode])
        found = repeated(reading, first, analysed, graph.values[mode], slimmer)
        if found:
            with Room(ROOM) as room:
                made = repair_repeated(
                    found,
                    lambda: self._playback(root, part, room),
                    [piece.role for piece in self.pieces],
                    lambda layer, piece: self.rows(layer, self.pieces[piece].inputs),
                    self.refits,
                )
            self.layers.update({f"{part}.{name}" if part else name: done for name, done in made.items()})

    def _bare(self) -> list[str]:
        bare, self._unshifted = self._unshifted, []
        return [f"repair could add no constant to {_listed(bare)}: no bias, and no BatchNorm that reads nothing else"] if bare else []

    # -- what is said -------------------------------------------------------------------------------------------------------

    def _summary(self) -> str:
        count = {what: sum(one.done == what for one in self.layers.values()) for what in ("fitted", "shifted", "sliced")}
        total = len(self.layers)
        told = [f"{count['fitted']} fitted" if self.refits else "", f"{count['shifted']} given a constant alone"]
        told += [f"{count['sliced']} left as sliced, where that was best on inputs that were not fitted" if count["sliced"] else ""]
        return f"repair {self.kind!r} reached {total} layers: {', '.join(one for one in told if one)}"

    def _left(self, slimmer: Slimmer) -> list[str]:
        left = _left(slimmer, set(self.layers), self._inputs)
        why = "its weight is not used as a plain multiplication, or it works along another pruned axis, or it reads rows chosen by data"
        return [f"repair left {_listed(left)} as sliced: {why}"] if left else []

    def _judged(self, slim: nn.Module, sliced: dict[str, Tensor], outputs: list[tuple[Any, Any]] | None) -> list[str]:
        """Keep the repair where the outputs of the pieces that were not fitted are nearer to the original's than with ``bn`` alone; else
        that, or where it is worse than no repair, none."""
        judge = [piece for piece in self.pieces if piece.role == JUDGE]
        if not judge:
            return ["repair could not be judged on inputs that were not fitted: there is a single sample"]

        def run(network: nn.Module) -> list[Any]:
            return [call(network, to_device(piece.inputs, self.device)) for piece in judge]

        wanted, found = zip(*outputs, strict=True) if outputs else (run(self._whole_original()), run(slim))
        repaired = {name: t.clone() for name, t in slim.state_dict().items()}
        slim.load_state_dict(sliced)
        fit = alone([piece.inputs for piece in self.pieces if piece.role != JUDGE and piece.samples > 1])
        recalibrate_batchnorm(slim, fit or self.batches, self.graph.inputs)
        errors = {"lstsq": unlikeness(found, wanted), "bn": unlikeness(run(slim), wanted)}
        if errors["lstsq"] <= errors["bn"] or math.isnan(errors["bn"]):
            slim.load_state_dict(repaired)
            return ["repair could not be judged: there are outputs that are not finite"] if math.isnan(errors["bn"]) else []
        slim.load_state_dict(sliced)
        errors["none"] = unlikeness(run(slim), wanted)
        if errors["bn"] <= errors["none"]:
            recalibrate_batchnorm(slim, self.batches, self.graph.inputs)
        self.layers = {}
        best, what = ("bn", "BatchNorm re-estimated alone") if errors["bn"] <= errors["none"] else ("none", "what was sliced")
        return [
            f"repair fell back to {what}: on inputs that were not fitted the outputs are off by {errors['lstsq']:.3g} after least squares"
            f" and by {errors[best]:.3g} without; give more calibration data"
        ]

    def _together(self, slim: nn.Module) -> str:
        original = self._whole_original()

        def run(inputs: Any) -> Any:
            with torch.no_grad():
                return call(original, to_device(inputs, self.device))

        made = move_together(slim, run, self.pieces, self.device, self.progress)
        if isinstance(made, str):
            return f"repair moved no layers together: {made}"
        if not made.kept:
            return (
                "repair moved no layers together: on inputs that were not fitted the outputs came no nearer to the original's beyond chance"
            )
        return (
            f"repair moved all layers together, {made.rounds} rounds: on inputs that were not fitted the outputs are off by"
            f" {made.after:.3g} after it and by {made.before:.3g} before"
        )

    def _instead(self, gone: Sequence[Block]) -> list[str]:
        """Which layers stand in for the blocks that were left out."""
        said = []
        for block in gone:
            found = {path: one for path, one in self.layers.items() if block.name in one.stands_in}
            by = [f"{path} stands in (off by {one.before:.2f} without, {one.after:.2f} with)" for path, one in found.items()]
            said.append(f"{block.name}: {' and '.join(by) if by else 'nothing stands in'}")
        return [f"of the blocks that were left out, {'; '.join(said)}"]


def _called_norms(graph: CouplingGraph) -> tuple[str, ...]:
    """BatchNorms that are calls, as in an exported graph: their statistics are buffers that no module updates."""
    nodes = (n for g in graph.traced.graphs.values() for n in g.nodes if n.op == "call_function")
    found = [n.meta.get("owner") or n.name for n in nodes if getattr(n.target, "__name__", "") == "batch_norm"]
    if not found:
        return ()
    return (f"repair left the statistics of {_listed(sorted(set(found)))}: batch_norm is called as a function, only modules are repaired",)


def _unpruned(graph: CouplingGraph) -> Any:
    return Slimmer(graph, np.ones(int(graph.starts[-1]), dtype=bool)).run().eval()


def _graph_of(root: Any, part: str) -> tuple[Any, fx.Graph]:
    """A network that the rewrite made, or a traced part of it, and its graph."""
    module = _part(root, part)
    return module, module.graphs["eval"]


def _aims(left: LeftOut | None, original: fx.Graph) -> dict[str, Aim]:
    """What layers are fitted to that stand in for blocks, in the graph of the original."""
    if left is None:
        return {}
    twins = {node.name: node for node in original.nodes}
    return {
        name: replace(aim, end=twins[aim.end.name], node=twins[aim.node.name])
        for name, aim in left.aims.items()
        if aim.end.name in twins and aim.node.name in twins
    }


def _carry(source: nn.Module, target: nn.Module) -> None:
    """The parameters and buffers of ``source`` into those of the same names in ``target``."""
    held = {**dict(source.named_parameters(remove_duplicate=False)), **dict(source.named_buffers(remove_duplicate=False))}
    for name, tensor in (*target.named_parameters(remove_duplicate=False), *target.named_buffers(remove_duplicate=False)):
        tensor.copy_(held[name])


class _Cache:
    """The original's responses by piece and layer, kept between repairs for as many of the first pieces as fit."""

    def __init__(self) -> None:
        self._held: dict[int, dict[tuple[str, str], list[Responses]]] = {}
        self._bytes: dict[int, int] = {}
        self._first_without: int | None = None

    def get(self, piece: int, key: tuple[str, str]) -> list[Responses] | None:
        return self._held.get(piece, {}).get(key)

    def put(self, piece: int, key: tuple[str, str], found: list[Responses]) -> None:
        if self._first_without is not None and piece >= self._first_without:
            return
        self._held.setdefault(piece, {})[key] = found
        size = sum(t.nbytes for _, y, other in found for t in (y, other) if t is not None)
        self._bytes[piece] = self._bytes.get(piece, 0) + size
        while sum(self._bytes.values()) > CACHE:
            last = max(self._bytes)
            self._first_without = last
            del self._bytes[last], self._held[last]


class _Run:
    """The slim and the original network side by side over all pieces, layer by layer."""

    def __init__(self, repairer: Repairer, part: str, slim: Playback, original: Playback, aims: Mapping[str, Aim]) -> None:
        self.repairer, self.part, self.slim, self.original, self.aims = repairer, part, slim, original, aims
        self.roles = [piece.role for piece in repairer.pieces]
        self._everything: tuple[dict[fx.Node, Any], fx.Interpreter] | None = None
        self._current: tuple[str, dict[int, list[Responses]]] = "", {}  # the last layer's responses, by piece

    def layer(self, one: Layer, twin: Layer, number: int, kept: Any) -> LayerRepair:
        """Repair a layer, ``number`` in the original's order; ``kept``: its output channels that are left, or None."""
        refit = self.repairer.refits
        weights = matrices(one.form, one.weight).float()
        folds = Folds(refit, weights.shape[2])
        for role, x, p, r, _ in self._rows(one, twin, number, kept):
            folds.add(role, x, p, r)
        again = (lambda: self._rows(one, twin, number, kept)) if self.repairer.thorough else None
        made = folds.repair(one, weights, again)
        aim = self.aims.get(twin.name)
        return made if aim is None or made.done == "sliced" else replace(made, stands_in=aim.blocks)

    def _rows(self, one: Layer, twin: Layer, number: int, kept: Any) -> Iterator[Rows]:
        """Rows of a layer, piece by piece, and of what its output is added to."""
        weights, gain = matrices(one.form, one.weight).float(), one.gain().float()
        for piece, role in enumerate(self.roles):
            wanted = self._responses(piece, twin, number)
            now = self.slim.before(piece, one.node)
            for each, (places, y, other) in zip(now, wanted, strict=True):
                y, beside = _cut(y, kept), None
                if other is not None and one.other is not None:
                    own = output_rows(one.form, each[one.other], places)
                    y = y + torch.where(gain.abs() > FAINT, (_cut(other, kept) - own) / gain, 0.0)
                    beside = grouped(one.form, own)
                x = input_rows(one.form, one.weight, each[one.source], places)
                p = x @ weights.transpose(1, 2)
                if one.bias is not None and not one.apart:
                    p = p + one.bias.detach().float().unflatten(0, (len(p), 1, -1))
                yield role, x, p, grouped(one.form, y) - p, beside
            self.slim.leave(piece, now)

    def products(
        self, one: Contraction, twin: Contraction, kept: tuple[Any, Any], layers: Mapping[fx.Node, Layer]
    ) -> dict[str, LayerRepair]:
        """Bring the products of queries and keys to what they are in the original; ``kept``: what is left of the original's, by axis."""
        if len(one.queries.users) != 1:
            return {}
        if self._everything is None:
            self._everything = self.slim.everything(0)
        made = maker(one, layers, *self._everything)
        if made is None:
            return {}
        sums, width = Products(), 0
        for piece, role in enumerate(self.roles):
            now, then = self.slim.before(piece, one.node), self.original.before(piece, twin.node)
            for each, other in zip(now, then, strict=True):
                wanted = picked(other[twin.queries], kept[0]), picked(other[twin.keys], kept[1])
                rows = [by_head(each[one.queries]), by_head(each[one.keys], one.turned), by_head(wanted[0]), by_head(wanted[1], one.turned)]
                if len({len(x) for x in rows}) > 1 or rows[0].shape[-1] != made.rows.shape[-1]:
                    return {}
                sums.add(role, *rows)
                width = rows[0].shape[-1]
            self.slim.leave(piece, now)
            self.original.leave(piece, then)
        matrix, before, after = sums.matrix(width)
        if matrix is not None:
            change_queries(made, matrix)
            for piece in range(len(self.roles)):
                now = self.slim.before(piece, one.node)
                for each in now:
                    q = each[one.queries]
                    each[one.queries] = (q.reshape(q.shape[0], -1, *q.shape[-2:]) @ matrix.to(q)).reshape(q.shape)
                self.slim.leave(piece, now)
        return {f"{made.layer.path}:products": LayerRepair("sliced" if matrix is None else "fitted", None, before, after)}

    def recurrent(self, node: fx.Node, cell: Any, twin: fx.Node, original: Any, kept: Any) -> LayerRepair | None:
        """Repair a recurrent layer; None where its input is no plain tensor."""
        calls: list[Sequences] = []
        plain = True
        for piece, role in enumerate(self.roles):
            now, then = self.slim.before(piece, node), self.original.before(piece, twin)
            for each, other in zip(now, then, strict=True):
                (x, *state), more = self.slim.arguments(each, node)
                (y, *origin), others = self.original.arguments(other, twin)
                plain = plain and isinstance(x, Tensor) and isinstance(y, Tensor)
                calls.append(Sequences(role, x, y, *([*state, more.get("hx")][:1]), *([*origin, others.get("hx")][:1])))
            self.slim.leave(piece, now)
            self.original.leave(piece, then)
        return fit_recurrent(cell, original, kept, calls) if plain else None

    def norm(self, one: Norm, twin: Norm, kept: Any) -> None:
        """Move the statistics of a BatchNorm that no repaired layer feeds alone by what its input has moved."""
        known = self.repairer._norms
        key = (self.part, key_of(twin.node))
        if key not in known:
            known[key] = _channel_sums(self.original, twin.node, self.roles)
        sums = _channel_sums(self.slim, one.node, self.roles), known[key]
        (mean, var), (mean0, var0) = ((m.to(one.mean), v.to(one.var)) for m, v in sums)
        mean0, var0 = (t if kept is None else t[torch.from_numpy(kept).to(t.device)] for t in (mean0, var0))
        one.mean.add_(mean - mean0)
        one.var.mul_(torch.where(var0 > 0, var / var0.clamp_min(1e-30), 1.0).clamp(1e-4, 1e4))

    def outputs(self) -> list[tuple[Any, Any]]:
        """What the original and the slim network give on the pieces that judge."""
        return [(self.original.rest(piece)[0], self.slim.rest(piece)[0]) for piece, role in enumerate(self.roles) if role == JUDGE]

    def _responses(self, piece: int, twin: Layer, number: int) -> list[Responses]:
        aim = self.aims.get(twin.name)
        key = (self.part, twin.name if aim is None else f"{twin.name} at {aim.node}")
        cache = self.repairer._cache
        if self._current[0] != twin.name:
            self._current = twin.name, {}
        held = cache.get(piece, key) or self._current[1].get(piece)
        if held is not None:
            return held
        found: list[Responses] = []
        now = self.original.before(piece, twin.node)
        before = []
        for index, each in enumerate(now):
            inputs = each[twin.source]
            limit = self.repairer.rows(twin, self.repairer.pieces[piece].inputs)
            places = choose(twin.form, twin.weight, inputs, limit, seed=(piece * 1009 + index) * 100_003 + number)
            other = None if twin.other is None else each.get(twin.other)
            before.append((places, other))
        for (places, other), output in zip(before, self.original.through(now, twin.node), strict=True):
            same = isinstance(other, Tensor) and other.shape == output.shape
            rows = output_rows(twin.form, other, places) if same and isinstance(other, Tensor) else None
            found.append((places, output_rows(twin.form, output, places), rows))
        if aim is not None:
            found = self._aimed(twin, aim, now, found)
        self.original.leave(piece, now)
        cache.put(piece, key, found)
        self._current[1][piece] = found
        return found

    def _aimed(self, twin: Layer, aim: Aim, now: list[dict[fx.Node, Any]], found: list[Responses]) -> list[Responses]:
        """Responses with which what comes of them would be what it was once the blocks had added to it."""
        gain = twin.gain().float()

        def rows(node: fx.Node) -> list[Tensor]:
            given = zip(self.original.ahead(now, node), found, strict=True)
            return [output_rows(twin.form, tensor, places) for tensor, (places, _, _) in given]

        ends = [y for _, y, _ in found] if aim.end is twin.node else rows(aim.end)
        more = [b - a for a, b in zip(ends, rows(aim.node), strict=True)]
        added = [torch.where(gain.abs() > FAINT, one / gain, 0.0) for one in more]
        return [(places, y + one, other) for (places, y, other), one in zip(found, added, strict=True)]


def _channel_sums(play: Playback, node: fx.Node, roles: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and variance by channel of what a BatchNorm reads, over the pieces that are fitted."""
    rows, total, square = 0, torch.zeros(()), torch.zeros(())
    source: Any = node.args[0] if node.args else node.kwargs["input"]
    for piece, role in enumerate(roles):
        now = play.before(piece, node)
        for each in now if role != JUDGE else ():
            x = each[source].float()
            axes = [axis for axis in range(x.ndim) if axis != 1]
            rows += x.numel() // x.shape[1]
            total, square = total + x.sum(axes).cpu().double(), square + x.square().sum(axes).cpu().double()
        play.leave(piece, now)
    mean = total / max(1, rows)
    return mean, (square / max(1, rows) - mean.square()).clamp_min(0)


class _Reached:
    """What the removal has an effect on: layers and BatchNorms, each with the channels of its output that are left (None: all).

    Not those that removed channels reach along another axis, nor those that read rows which values pick (the tokens of an expert): their
    rows cannot be compared with the original's.
    """

    def __init__(self, slimmer: Slimmer, part: str, left: LeftOut | None) -> None:
        mode = f"{part}:eval" if part else "eval"
        env, traced = slimmer.graph.values[mode], slimmer.graph.traced
        self.layers: dict[str, Any] = {}
        self.norms: dict[str, Any] = {}
        self.recurrent: set[str] = set()
        self.products: list[tuple[Any, Any] | None] = []  # what is left of queries and keys, by axis, where their products lack dimensions
        nodes = traced.graphs[mode].nodes
        reading = Reading(traced.skeleton.original, traced.graphs[mode])
        layers = {one.node: one for one in reading.layers()}
        norms = {one.node for one in reading.norms()}
        by_values = partial(_reads_picked, module=traced.skeleton.module)
        self.products += [None if by_values(one.node) else _factors(one, env, slimmer) for one in contractions(traced.graphs[mode])]
        reached: set[fx.Node] = set()
        moved = left.moved if left is not None else set()
        for node in nodes:
            inputs = [one for one in node.all_input_nodes if one.op != "get_attr"]
            if key_of(node) in moved or any(one in reached or slimmer.touched(env.get(one)) for one in inputs):
                reached.add(node)
            output = next(iter(values(env.get(node))), None)
            if node.op == "call_module" and (node in reached or slimmer.touched(env.get(node))):
                self.recurrent.add(str(node.target).removeprefix(f"{part}." if part else ""))
            if node not in reached or output is None:
                continue
            if by_values(node):
                self.recurrent.discard(str(node.target).removeprefix(f"{part}." if part else ""))
                continue
            if node in layers:
                form = layers[node].form
                axis = output.ndim - 1 - form.space
                if all(slimmer.kept(output, other) is None for other in output.axes if other != axis):
                    self.layers[layers[node].name.removeprefix(f"{part}." if part else "")] = slimmer.kept(output, axis)
            elif node in norms and all(slimmer.kept(output, other) is None for other in output.axes if other != 1):
                self.norms[key_of(node, part)] = slimmer.kept(output, 1)


def _reads_picked(node: fx.Node, module: Modules) -> bool:
    """Whether values say how many rows ``node`` reads."""
    inputs = (one for one in node.all_input_nodes if one.op != "get_attr" and isinstance(one.meta.get("val"), Tensor))
    return any(counted.sized(one, module) for one in inputs)


def _factors(one: Contraction, env: Mapping[fx.Node, Any], slimmer: Slimmer) -> tuple[Any, Any] | None:
    """For queries and keys what is left along each axis but that of their products; None where none of its dimensions went."""
    found = []
    for node, turned in ((one.queries, False), (one.keys, one.turned)):
        value = next(iter(values(env.get(node))), None)
        if value is None or value.ndim < 3:
            return None
        axis = value.ndim - (2 if turned else 1)
        if slimmer.kept(value, axis) is None:
            return None
        found.append([None if i == axis else slimmer.kept(value, i) for i in range(value.ndim)])
    return found[0], found[1]


def _part(root: Any, part: str) -> Any:
    return root.get_submodule(part) if part else root


def _cut(rows: Tensor, kept: Any) -> Tensor:
    return rows if kept is None else rows.index_select(1, torch.from_numpy(kept).to(rows.device))


def _left(slimmer: Slimmer, repaired: set[str], axes: Mapping[str, int]) -> list[str]:
    """Owners of weights that lost inputs and were not repaired: cut along the axis of their inputs, or where unknown any but the first."""
    graph, skeleton = slimmer.graph, slimmer.graph.traced.skeleton
    cut = {name for name in skeleton.parameter_names if any(dim == axes.get(name, dim or -1) for dim in slimmer.kept_dims(name))}
    left = {name for name in cut if not {name, name.removesuffix(".weight"), name.rpartition(".")[0]} & repaired}
    owners = {name.rpartition(".")[0] or name for name in left}
    return sorted(
        owner for owner in owners if not isinstance(_module(graph, owner), (nn.Embedding, nn.EmbeddingBag))
    )  # they read no channels


def _module(graph: CouplingGraph, path: str) -> nn.Module | None:
    try:
        return graph.traced.skeleton.original.get_submodule(path)
    except AttributeError:  # a parameter of the root
        return None


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


REPAIRS["none"] = lambda repairer, slim, slimmer: ()
REPAIRS["bn"] = lambda repairer, slim, slimmer: repairer.norms(slim, slimmer.graph)
REPAIRS["bias"] = REPAIRS["lstsq"] = REPAIRS["joint"] = Repairer.by_layer
