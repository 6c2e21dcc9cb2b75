"""Labels to groups: which channels of which parameters go together, and the networkx graph that says why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxprune.passes.compat import ConvTransposeNd
from fxprune.passes.coupling.blocks import Block, find_blocks
from fxprune.passes.coupling.gates import Gated
from fxprune.passes.coupling.grouping import NORMS, partition
from fxprune.passes.coupling.untraced import pin_unseen, unseen
from fxprune.passes.coupling.walk import Walk
from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.passes.ir.traced import Surroundings
from fxprune.passes.labels.values import Value, Vector
from fxprune.passes.rules.functional_weights import output_dims
from fxprune.passes.rules.layer_specs import is_layer, produced_dim

if TYPE_CHECKING:
    import networkx as nx

SINGLE = Reason(ReasonKind.SINGLE_UNIT, "all its channels are tied into one unit")
Member = tuple[str, int, torch.Tensor]


@dataclass(frozen=True)
class Group:
    """Channels that are pruned by one sparsity.

    ``size``: units; removing a unit removes every index that belongs to it from every member.
    ``members``: (parameter or buffer name, dimension, LongTensor of the indices that belong to the group).
    ``prunable``, ``reason``: whether units may go, and if not, why. ``notes``: what pruning it changes besides removing channels
    (a statistic over channels); where there are any, the zeroing oracle is not defined for the group. ``undefined``: those of the notes for
    which that holds with ``norms="exact"`` as well. ``experts``: whether the units are experts, among which a router
    chooses. ``least``: the units that have to stay: as many as the choice takes, or as a variance over them needs. ``proved``: the norms
    with which ``verify`` covers the group.
    """

    name: str
    size: int
    prunable: bool
    reason: str
    notes: tuple[str, ...]
    undefined: tuple[str, ...]
    number: int = field(repr=False)
    graph: CouplingGraph = field(repr=False, compare=False)
    least: int = 1
    experts: bool = False
    proved: frozenset[str] = frozenset(NORMS)

    @property
    def kind(self) -> ReasonKind | None:
        """The kind of ``reason``, None where the group is prunable."""
        return self.reason.kind if isinstance(self.reason, Reason) else None

    @property
    def most(self) -> float:
        """The share that a policy may ask for: of experts as many stay as are chosen at a time, of others the planner keeps one."""
        return (self.size - self.least) / self.size if self.experts else 1.0

    @cached_property
    def members(self) -> tuple[Member, ...]:
        return self.graph.members_of(self.number)

    @cached_property
    def units(self) -> tuple[torch.Tensor, ...]:
        """For each member, the unit that each of its indices belongs to, 0 to ``size`` - 1 (aligned with ``members``)."""
        start = self.graph.starts[self.number]
        return tuple(torch.from_numpy(self.graph.unit_of[n, d][i.numpy()] - start) for n, d, i in self.members)


class CouplingGraph:
    """The channels of an analysed model: ``groups`` in a stable order, and ``graph``, a ``networkx.Graph``.

    Nodes of ``graph`` are (parameter or buffer name, dimension); edges carry ``op``, the operation that couples them.
    ``inputs`` and ``options`` are what a policy records. The analysed model is kept by reference: weights are read when it is pruned.

    Of the analysis the later stages read ``traced``; ``values``: mode -> node -> the labels of its result; ``statistics``: nodes with a
    statistic over channels -> the axes along which ``norms="exact"`` counts zeros; ``choices``: choices among channels, and softmaxes over
    them; ``gated``: experts that are modules of a list; ``layer_costs``: mode -> what its layers cost, and along which channels;
    ``unknown``: operations without a usable rule -> where.
    """

    def __init__(self, walk: Walk, inputs: Any, options: Mapping[str, Any]) -> None:
        self._walk, self.inputs, self.options = walk, inputs, dict(options)
        self.traced = walk.traced
        self.values = walk.env
        self.statistics = walk.statistics
        self.choices = tuple(walk.choices_among)
        self.gated: Gated | None = walk.gated
        self.layer_costs = walk.costs
        self.unknown = walk.unknown
        self.model = self.traced.skeleton.original
        self.notes = self.traced.notes
        self.blocks: tuple[Block, ...] = ()  # what can be left out, where ``analyze`` was asked for it
        self.left_out: tuple[Block, ...] = ()  # those of another graph whose network this is without them
        self.templates: dict[str, Any] = {}  # what the rewrites of this graph share, by norms; made by the first
        self.costs: Any = None  # its cost model (passes.cost), made when it is first asked for
        self.orders: dict[str, tuple[bytes, Vector]] = {}  # group -> scores that it was ranked by last, and its units in their order
        self._functional = output_dims(self.traced)
        pin_unseen(walk)
        self._cover_layers()
        self._build()

    # -- groups -------------------------------------------------------------------------------------------------------------

    def _cover_layers(self) -> None:
        """Layers the graph never reaches (unused, or inside a module that could not be traced) are locked, and say so."""
        walk, skeleton, around = self._walk, self.traced.skeleton, Surroundings(self.traced)
        for path, module in skeleton.original.named_modules():
            if not is_layer(module):
                continue
            why = unseen(around, path) or Reason(ReasonKind.UNUSED, "no operation reads it")
            for key, _ in module.named_parameters(recurse=False):
                name = walk.canonical(path, key)
                if name is None:
                    continue
                for dim, size in enumerate(skeleton.tensor(name).shape[:2]):
                    if size > 1 and (name, dim) not in walk.parameters:
                        weight = walk.canonical(path, "weight") or name
                        vector = walk.parameters.get((weight, 0)) if dim == 0 and not isinstance(module, ConvTransposeNd) else None
                        if vector is None or len(vector) != size:
                            vector = walk.labels.new(size)
                            walk.labels.pin(vector, why)
                        walk.parameters[name, dim] = vector  # a bias that nobody reads has the channels of its weight

    def _build(self) -> None:
        walk = self._walk
        self.keys = [key for key, vector in walk.parameters.items() if len(vector)]
        # Dimensions that share one vector of labels (a norm's weight, bias and statistics) are one line.
        vectors = [walk.parameters[key] for key in self.keys]
        lines = {id(vector): vector for vector in vectors}
        number = {line: i for i, line in enumerate(lines)}
        line_of_key = np.array([number[id(vector)] for vector in vectors], dtype=np.int64)
        of_layers = np.zeros(len(lines), dtype=bool)
        of_layers[line_of_key[np.array([self._is_layer(key) for key in self.keys], dtype=bool)]] = True
        made = partition(walk.labels, list(lines.values()), of_layers, walk.labels.pins, walk.labels.inexact, walk.weights)
        self.starts, self.group_of_unit, self._unit_of_label = made.starts, made.group_of_unit, made.unit_of_label
        self.unit_of = {key: made.units_of_line[line] for key, line in zip(self.keys, line_of_key.tolist(), strict=True)}
        self._group_keys = [np.flatnonzero(row[line_of_key]) for row in made.lines]
        sizes = np.diff(self.starts)
        names = self._names(len(sizes))
        lasting = [why for _, why in walk.labels.inexact if not why.exact]
        groups = []
        least: dict[int, int] = {}
        for choice in self.choices:
            along = len(np.unique(self._unit_of_label[choice.vector]))
            units = -(-choice.count * along // len(choice.vector))  # of experts in groups, one of each goes together
            for g in self.groups_along(choice.vector) if choice.count else ():
                least[g] = max(least.get(g, 1), units)
        for g in self.groups_along(np.array(sorted(self.gated.labels), dtype=np.int64)) if self.gated else ():
            least.setdefault(g, 1)
        fewest = dict(least)
        for vector, count in self._walk.fewest:
            along, groups_there = len(np.unique(self._unit_of_label[vector])), self.groups_along(vector)
            units = -(-count * along // len(vector)) if len(groups_there) < count else 1
            for g in groups_there:
                fewest[g] = max(fewest.get(g, 1), units)
        for g in np.flatnonzero(made.in_layer).tolist():
            reason = walk.labels.pins[made.reason[g] - 1][1] if made.reason[g] else SINGLE if sizes[g] == 1 else ""
            note = (walk.labels.inexact[made.note[g] - 1][1],) if made.note[g] else ()
            left = (lasting[made.undefined[g] - 1],) if made.undefined[g] else ()
            proved = frozenset(norms for norms in NORMS if not made.unproven[norms][g])
            groups.append(Group(names[g], int(sizes[g]), not reason, reason, note, left, g, self, fewest.get(g, 1), g in least, proved))
        self.groups: tuple[Group, ...] = tuple(groups)
        self.by_name = {group.name: group for group in groups}
        self.by_number = {group.number: group for group in groups}
        self.prunable_unit = np.isin(self.group_of_unit, [group.number for group in groups if group.prunable])

    def _is_layer(self, key: tuple[str, int]) -> bool:
        path = key[0].rpartition(".")[0]
        skeleton = self.traced.skeleton
        return key[0] in skeleton.parameter_names and is_layer(skeleton.original_module(path))

    def members_of(self, number: int) -> tuple[Member, ...]:
        low, high = self.starts[number], self.starts[number + 1]
        found = []
        for k in self._group_keys[number]:
            name, dim = self.keys[k]
            units = self.unit_of[name, dim]
            found.append((name, dim, torch.from_numpy(np.flatnonzero((units >= low) & (units < high)))))
        return tuple(found)

    # -- names --------------------------------------------------------------------------------------------------------------

    def _names(self, count: int) -> list[str]:
        names: list[str] = []
        used: dict[str, int] = {}
        for g in range(count):
            keys = [self.keys[k] for k in self._group_keys[g]]
            producer = next((k for k in keys if self._produces(k)), None)
            key = producer or (keys[0] if keys else ("", 0))
            base = key[0].rpartition(".")[0] or key[0]
            if producer is None:
                base += ":in"
            low, high = self.starts[g], self.starts[g + 1]
            units = self.unit_of.get(key, np.zeros(0, dtype=np.int64))
            inside = (units >= low) & (units < high)
            name = base if inside.all() else f"{base}[{_ranges(np.flatnonzero(inside))}]"
            used[name] = used.get(name, 0) + 1
            names.append(name if used[name] == 1 else f"{name}#{used[name]}")
        return names

    def _produces(self, key: tuple[str, int]) -> bool:
        name, dim = key
        skeleton = self.traced.skeleton
        if name in self.traced.constants:  # a tensor held as a plain attribute
            return False
        module = skeleton.original_module(name.rpartition(".")[0])
        made = produced_dim(module, name.rpartition(".")[2], skeleton.tensor(name).ndim)
        return dim == made if made is not None else dim in self._functional.get(name, ())

    # -- the networkx graph -------------------------------------------------------------------------------------------------

    @cached_property
    def graph(self) -> nx.Graph[Any]:
        import networkx as nx  # takes a sixth of what importing the rest of fxprune does, and few ask for the graph

        graph: nx.Graph[Any] = nx.Graph()
        op_of = {(t.name, t.dim): (t.op, t.node) for t in self._walk.ties}
        for name, dim in self.keys:
            graph.add_node((name, dim), size=len(self.unit_of[name, dim]), op=op_of.get((name, dim), ("", ""))[0])
        first_key: dict[int, tuple[str, int]] = {}
        for key in self.keys:
            units = self.unit_of[key]
            groups = np.unique(self.group_of_unit[units])
            for g in groups.tolist():
                if g in first_key and first_key[g] != key:
                    op, node = op_of.get(key, ("", ""))
                    graph.add_edge(first_key[g], key, op=op, node=node)
                first_key.setdefault(g, key)
        for meeting in self._walk.meetings:
            a, b = (self._source(label) for label in (meeting.a, meeting.b))
            if a is not None and b is not None and a != b:
                graph.add_edge(a, b, op=meeting.op, node=meeting.where)
        return graph

    @cached_property
    def _sources(self) -> tuple[Vector, list[tuple[str, int]]]:
        starts = np.array(sorted(self._walk.source), dtype=np.int64)
        return starts, [self._walk.source[int(s)] for s in starts]

    def _source(self, label: int) -> tuple[str, int] | None:
        starts, keys = self._sources
        slot = int(np.searchsorted(starts, label, side="right")) - 1
        if slot < 0:
            return None
        key = keys[slot]
        return key if key in self.unit_of and label < starts[slot] + len(self.unit_of[key]) else None

    @cached_property
    def all_blocks(self) -> tuple[Block, ...]:
        """The blocks of the network, whether ``analyze`` was asked for them or not."""
        return find_blocks(self._walk)

    def actual(self, node: Any) -> torch.Tensor | None:
        """The values of a node that depends on constants alone (a mask, a list of indices), None of any other."""
        return self._walk.real(node)

    # -- what the rewrite asks ----------------------------------------------------------------------------------------------

    @cached_property
    def dims_of(self) -> dict[str, list[tuple[int, Vector]]]:
        """Tensor name -> its dimensions that carry units, in order, each with the unit of every index."""
        found: dict[str, list[tuple[int, Vector]]] = {}
        for name, dim in sorted(self.unit_of):
            found.setdefault(name, []).append((dim, self.unit_of[name, dim]))
        return found

    def units_along(self, value: Value, axis: int) -> Vector:
        """The unit of every index along a labelled axis of a value; -1 where it belongs to none."""
        found: Vector = self._unit_of_label[value.axes[axis]]
        return found

    def expert_of(self, name: str) -> Vector | None:
        """The unit, shape (1,), of the expert in a list of modules that a tensor goes with; None where it goes with none."""
        label = self.gated.tensors.get(name) if self.gated is not None else None
        return None if label is None else self._unit_of_label[[label]]

    def unit_of_label(self, label: int) -> int:
        """The unit of a label, -1 where it belongs to none."""
        return int(self._unit_of_label[label])

    def groups_along(self, vector: Vector) -> list[int]:
        """The numbers of the groups that labels belong to."""
        units = self._unit_of_label[vector]
        found: list[int] = np.unique(self.group_of_unit[units[units >= 0]]).tolist()
        return found

    def units_of_labels(self, vector: Vector) -> Vector:
        found: Vector = self._unit_of_label[vector]
        return found

    def may_lose(self, vector: Vector) -> bool:
        """Whether any label of a vector belongs to a unit that a policy may remove."""
        units = self._unit_of_label[vector]
        return bool(self.prunable_unit[units[units >= 0]].any())

    def narrower_outputs(self) -> list[str]:
        """What the network returns beside the outputs that were asked for, where it may lose channels."""
        found = self._walk.narrower
        return [name for name, held in found.items() if any(self.may_lose(v) for value in held for v in value.axes.values())]

    def is_output(self, key: tuple[str, int]) -> bool:
        """Whether a parameter's dimension is the output channels of a convolution, linear, embedding or recurrent layer."""
        return self._produces(key)

    def exact(self, names: Iterable[str]) -> bool:
        """Whether the zeroing oracle is defined for all the named groups."""
        return not any(self.by_name[n].notes for n in names)


def _ranges(indices: Vector) -> str:
    """Indices as ranges: ``0:8,24:32``; evenly spaced ones as ``0:58:2``; more than six ranges as the first, the last and how many."""
    steps = np.diff(indices)
    if len(indices) > 2 and (steps == steps[0]).all() and steps[0] > 1:
        return f"{indices[0]}:{indices[-1] + 1}:{steps[0]}"
    breaks = np.flatnonzero(steps != 1)
    starts = indices[np.concatenate([[0], breaks + 1])]
    ends = indices[np.concatenate([breaks, [len(indices) - 1]])] + 1
    if len(starts) > 6:
        return f"{starts[0]}:{ends[0]},...,{starts[-1]}:{ends[-1]};{len(indices)}"
    return ",".join(f"{s}:{e}" for s, e in zip(starts.tolist(), ends.tolist(), strict=True))
