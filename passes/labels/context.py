"""The label algebra as a rule sees it: the verbs that a rule may use while one node is interpreted."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.passes.ir.constants import evaluate
from fxprune.passes.ir.nodes import op_name, target_name
from fxprune.passes.ir.notes import Note, NoteKind
from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.passes.ir.traced import TracedModel
from fxprune.passes.ir.writes import is_rewritten, is_rewritten_later, memory
from fxprune.passes.labels.choices import Choice, Gate, Sum
from fxprune.passes.labels.ledger import Cost, Meeting
from fxprune.passes.labels.parameters import ParameterLabels
from fxprune.passes.labels.rectangles import rectangle
from fxprune.passes.labels.values import Value, Vector, lift


class LabelContext(ParameterLabels):
    """What a rule may ask and do: ``rule(ctx, node, *values) -> Value``.

    Axes of new channels are ``fresh``; what meets is united by ``unite``, ``combine`` or ``pointwise``; what must stay is pinned, with the
    reason; operations that only move elements are run on the labels themselves by ``move``; ``make`` builds the result.
    ``parameters[(name, dim)]`` are the labels of that dimension of a parameter or buffer; ``env[mode][node]`` is what each node gave.
    """

    def __init__(
        self,
        traced: TracedModel,
        attention: str = "auto",
        fixed: Iterable[tuple[str, int]] = (),
        forced: dict[str, str] | None = None,
        channel_dims: Callable[[nn.Module, int], int] = lambda _, ndim: ndim,
    ) -> None:
        super().__init__(traced, fixed, channel_dims)
        self.attention, self.forced = attention, dict(forced or {})
        self.meetings: list[Meeting] = []
        self.costs: dict[str, list[Cost]] = {}
        self.env: dict[str, dict[fx.Node, Any]] = {}
        self.unknown: dict[str, str] = {}
        self.choices: dict[str, Vector] = {}
        self.whole: set[str] = set()  # grouped convolutions that lose whole groups, where positions within them were possible
        self.statistics: dict[fx.Node, set[int]] = {}  # axes of the first input along which norms="exact" counts zeros
        self.clashes: list[tuple[Vector, Vector]] = []
        self.choices_among: list[Choice] = []  # top-k over channels, and the softmaxes that the oracle masks
        self.fewest: list[tuple[Vector, int]] = []  # labels of an axis, and how many have to stay there
        self.gates: list[Gate] = []  # the share of one expert, where it is read alone
        self.gated: Any = None  # the experts that are modules (``coupling.gates.Gated``), once the walk is done
        self.sums: list[Sum] = []  # what an expert adds, where it adds it
        self.followed: list[Vector] = []  # the labels whose positions the current node follows
        self.sized: dict[str, list[tuple[Value, int]]] = {}
        self._real: dict[Any, Any] = {}
        self.mode = ""
        self.given: list[Value] = []
        """The Values that the current node was given, in the order of its arguments, without ``out``."""

    # -- helpers for rules --------------------------------------------------------------------------------------------------

    def fresh(self, key: str, size: int, soft: bool = False) -> Vector:
        """New labels for an axis that the current node makes. ``soft`` ones yield where they meet a fixed size."""
        return self.labels.new(size, soft)

    def is_soft(self, vector: Vector) -> bool:
        """Whether all labels were made by an expansion or a factory and have met no other kind."""
        return self.labels.yields(vector)

    def pin(self, vector: Vector | None, detail: str, kind: ReasonKind | None = None, because: Reason | None = None) -> None:
        """Keep these labels. ``detail``: why, without the place; ``because``: the ``why`` of a value that the reason rests on."""
        if vector is not None and len(vector):
            self.labels.pin(vector, self.reason(detail, kind, because))

    def pin_all(self, value: Value, detail: str, kind: ReasonKind | None = None) -> None:
        """``pin`` along every axis of a value."""
        for vector in value.axes.values():
            self.pin(vector, detail, kind)

    def reason(self, detail: str, kind: ReasonKind | None = None, because: Reason | None = None) -> Reason:
        """A reason at the current node."""
        kind = kind or (ReasonKind.OPERATION if because is None else ReasonKind.FIXED_SIZE)
        if self.node is None or self.node.op == "output":
            return Reason(kind, detail, because=because)
        return Reason(kind, detail, operation=self.op_name(), where=self.where(), because=because)

    def inexact(self, vector: Vector | None, detail: str) -> None:
        """The zeroing oracle is not defined for these labels; pruning them is allowed and changes a statistic."""
        if vector is not None:
            self.labels.inexact.append((vector, Reason(ReasonKind.STATISTIC, detail, operation=self.op_name())))

    def statistic(self, node: fx.Node, x: Value, axis: int, detail: str, softmax: bool = False) -> None:
        """The current node computes a statistic over the channels along ``axis`` of its first input, in which their order does not count.

        Pruning changes it, unless ``norms="exact"`` counts what is gone as zeros; that is what the zeroed original does where removed
        slices of ``x`` hold zeros, and where it is known how many they are. ``softmax``: it is one; with plain norms what is gone has no
        share of it.
        """
        if axis not in x.axes:
            return
        exact = axis in x.zero and self._share_is_known(node, x, axis)
        if softmax:
            self.masked_softmax(node, axis, x.axes[axis], detail, frozenset({"plain"}), exact)
        else:
            self.labels.inexact.append((x.axes[axis], Reason(ReasonKind.STATISTIC, detail, operation=self.op_name(), exact=exact)))
        if exact:
            self.statistics.setdefault(node, set()).add(axis)

    def at_least(self, vector: Vector, count: int) -> None:
        """What the current node computes along ``vector`` is nothing for fewer than ``count`` channels."""
        self.fewest.append((vector, count))

    def _share_is_known(self, node: fx.Node, x: Value, axis: int) -> bool:
        """Whether it is known how many positions go along ``axis`` of the node's first input, whatever size the input has: the size is
        always the same, or each channel has an equal share of it. A map beside what was pooled from it is neither."""
        _, shares = np.unique(self.labels.find(x.axes[axis]), return_counts=True)
        source: Any = node.args[0] if node.args else node.kwargs["input"]
        if len(np.unique(shares)) == 1 or node.op == "call_module" or self.is_fixed(source, axis):
            return True
        tried = self.other_shapes(node)
        return bool(tried) and all(shapes[source][axis] == x.shape[axis] for shapes in tried or ())

    def choose(self, node: fx.Node, axis: int, vector: Vector, count: int) -> None:
        """The current node chooses ``count`` of the channels along ``axis`` of its first input. Fewer channels leave it fewer to choose
        from, as the original has where those that went count as minus infinity; that is what the oracle compares with."""
        self.choices_among.append(Choice(self.mode, node, axis, vector, count))

    def masked_softmax(self, node: fx.Node, axis: int, vector: Vector, detail: str, norms: frozenset[str], exact: bool = False) -> None:
        """The current node is a softmax over channels: with ``norms`` those that went count as minus infinity."""
        self.choices_among.append(Choice(self.mode, node, axis, vector, 0, norms))
        reason = Reason(ReasonKind.STATISTIC, detail, operation=self.op_name(), exact=exact, masked=norms)
        self.labels.inexact.append((vector, reason))

    def follow(self, picks: Vector | None, vector: Vector | None) -> bool:
        """Positions among the channels ``picks`` pick from those of ``vector``, one for one, so the two go together. False where
        they cannot; then what is chosen among stays, since nothing follows."""
        if picks is None or vector is None or len(vector) != len(picks):
            return False
        self.unite(vector, picks)
        self.followed.append(picks)
        return True

    def note(self, kind: NoteKind, detail: str) -> None:
        """Note something at the current node that a user should know, once."""
        made = Note(kind, detail, self.where())
        if made not in self.traced.notes:
            self.traced.notes = (*self.traced.notes, made)

    def unite(self, a: Vector, b: Vector) -> None:
        if a is b:
            return
        first, second = int(self.labels.find(a[:1])[0]), int(self.labels.find(b[:1])[0])
        if first != second:
            self.meetings.append(Meeting(int(a[0]), int(b[0]), self.op_name(), self.where()))
        self.labels.unite(a, b)

    def cost(self, layer: str, macs: int, *along: Vector | None) -> None:
        call = self.traced.parts.get(self.mode.rpartition(":")[0])
        macs = macs if call is None else round(macs * call.times)
        self.costs[self.mode].append(
            Cost(layer, macs, tuple(v for v in along if v is not None), self.node.name if self.node is not None else "")
        )

    def owner(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else str(node.meta.get("owner") or node.name)

    def make(self, node: fx.Node, axes: dict[int, Vector], zero: Iterable[int] = (), why: str = "", index: int | None = None) -> Value:
        """The Value of the node's result (or of its ``index``-th result), with labels ``axes``."""
        meta = node.meta["val"] if index is None else node.meta["val"][index]
        shape = tuple(meta.shape)
        for axis, vector in axes.items():
            if shape[axis] == 1:  # it belongs to no axis any more, so the tensor as a whole must stay
                self.pin(vector, "one channel fills a whole tensor")
        axes = {a: v for a, v in axes.items() if shape[a] > 1}
        return Value(shape, axes, frozenset(a for a in zero if a in axes), self.origin(why))

    def origin(self, why: str = "") -> Reason:
        """Why the axes without labels of what the current node gives have a fixed size: ``why``, or that the node made it."""
        if isinstance(why, Reason):
            return why
        return Reason(ReasonKind.COMPUTED, why or f"it comes from {self.op_name()}")

    def opaque(self, node: fx.Node, inputs: Sequence[Value], reason: str = "", kind: ReasonKind | None = None) -> Any:
        """No rule: pin everything that goes in; what comes out has fixed sizes."""
        name = op_name(node, self.traced)
        if not reason:
            self.unknown.setdefault(name, self.where())
            kind = ReasonKind.NO_RULE
        for value in inputs:
            self.pin_all(value, reason or f"{name} has no rule", kind)
        return lift(node.meta.get("val"), Reason(ReasonKind.COMPUTED, f"it comes from {name}"))

    def combine(self, shape: Sequence[int], values: Sequence[Value]) -> tuple[dict[int, Vector], dict[int, list[Value]]]:
        """Broadcast ``values`` against each other: labels united index by index where they meet.

        Along an axis where one operand carries labels and another has a full extent without any, the labels are pinned.
        Returns the labels by axis of the result, and for each axis the operands that span it.
        """
        axes: dict[int, Vector] = {}
        spans: dict[int, list[Value]] = {}
        n = len(shape)
        for axis in range(n):
            if shape[axis] == 1:
                continue
            spanning = [v for v in values if axis - n + v.ndim >= 0 and v.shape[axis - n + v.ndim] != 1]
            with_labels = [(v, v.axes[axis - n + v.ndim]) for v in spanning if axis - n + v.ndim in v.axes]
            if not with_labels:
                continue
            spans[axis] = spanning
            bare = next((v for v in spanning if axis - n + v.ndim not in v.axes), None)
            if bare is not None:
                for _, vector in with_labels:
                    self.clash(vector, bare)
                    self.pin(vector, "it meets a tensor of fixed size", because=bare.why)
                continue
            first = next((vector for _, vector in with_labels if not self.is_soft(vector)), with_labels[0][1])
            for _, vector in with_labels:
                self.unite(first, vector)
            axes[axis] = first
        return axes, spans

    def clash(self, vector: Vector, other: Value) -> None:
        """Labels meet a fixed axis of a tensor that carries labels elsewhere: two attention tensors may have chosen different axes."""
        if self.is_soft(np.unique(vector)):
            return  # made by an expansion: it yields, no choice was made
        alone = [vector] if self.attention == "auto" else []  # a tensor without channels fixes one axis, the other may be free
        for mine in other.axes.values() or alone:
            self.clashes.append((vector, mine))

    def pointwise(self, node: fx.Node, *operands: Any, zero: str = "none") -> Any:
        """Element-wise on any number of tensors and numbers.

        ``zero``: what is known of the result where inputs are zero: "one" (zero if any input is, as a product), "all" (zero if
        all inputs are, as a sum; a nonzero number counts as an input), "first" (zero where the first is), "none".
        """
        values = [v for v in operands if isinstance(v, Value)]
        meta = node.meta["val"]
        if not isinstance(meta, torch.Tensor):
            return self.opaque(node, values)
        axes, spans = self.combine(tuple(meta.shape), values)
        zeros = set()
        for axis in axes:
            flags = (
                [axis - meta.ndim + v.ndim in v.zero for v in values if v in spans[axis]] if len(values) > 1 else [axis in values[0].zero]
            )
            whole = len(flags) == len(values) and all(o == 0 for o in operands if isinstance(o, (int, float)) and not isinstance(o, bool))
            if zero == "one" and any(flags) or zero == "all" and whole and all(flags):
                zeros.add(axis)
            elif zero == "first" and values and axis - meta.ndim + values[0].ndim in values[0].zero:
                zeros.add(axis)
        return self.make(node, axes, zeros, self._why_of(values, meta.ndim))

    def _why_of(self, values: Sequence[Value], ndim: int) -> str:
        """That of the first operand of full rank. What is computed from an activation is no parameter, though one of the operands is."""
        activations = [v for v in values if v.why.kind is not ReasonKind.PARAMETER] or list(values)
        return next((v.why for v in activations if v.ndim == ndim), activations[0].why if activations else "")

    def through(self, node: fx.Node, x: Value, mixed: Sequence[int] = (), zero: bool = True, index: int | None = None) -> Value:
        """Same axes out as in; the axes ``mixed`` are mixed by the operation, so labels there are pinned."""
        held = {a % x.ndim for a in mixed}
        for axis in held & set(x.axes):
            self.pin(x.axes[axis], "its channels are mixed with each other")
        axes = {a: v for a, v in x.axes.items() if a not in held}
        return self.make(node, axes, x.zero if zero else (), x.why, index)

    def move(self, node: fx.Node, x: Value, run: Callable[[torch.Tensor], Any], fill: str = "") -> Any:
        """A data movement: ``run`` is applied to the labels themselves, one axis at a time.

        ``run`` maps a tensor of x's shape to what the operation gives on it (a tensor or a tuple).
        """
        metas = node.meta["val"]
        single = isinstance(metas, torch.Tensor)
        outs = [metas] if single else list(metas)
        axes: list[dict[int, Vector]] = [{} for _ in outs]
        zeros: list[set[int]] = [set() for _ in outs]
        for axis, vector in x.axes.items():
            shape = [1] * x.ndim
            shape[axis] = len(vector)
            full = torch.from_numpy(self.labels.find(vector)).view(shape).expand(x.shape)
            results = [run(full)] if single else list(run(full))
            for i, result in enumerate(results):
                placed = self.rectangle(node, result)
                if placed is None:
                    self._unseen(vector, full, result)
                    continue
                where, found = placed
                if where in axes[i]:
                    found = self.same_axis(axes[i][where], found)
                axes[i][where] = found
                if axis in x.zero:
                    zeros[i].add(where)
        made = [self.make(node, axes[i], zeros[i], x.why, None if single else i) for i in range(len(outs))]
        return made[0] if single else tuple(made)

    def _unseen(self, vector: Vector, full: torch.Tensor, made: torch.Tensor) -> None:
        """A tensor that has channels and no elements (a detector found nothing on the example) does not show where its channels go."""
        copied = full.untyped_storage().data_ptr() != made.untyped_storage().data_ptr()
        if not full.numel() or not made.numel() and copied and len(vector) in made.shape:
            self.pin(vector, "the example leaves no elements beside them, so where they go does not show")

    def region(self, node: fx.Node, x: Value, run: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Value, dict[int, int]]:
        """The part of ``x`` that ``run`` picks, and for each of its labelled axes that of ``x``; one channel alone is pinned."""
        axes, back = {}, {}
        for axis, vector in x.axes.items():
            along = [1] * x.ndim
            along[axis] = len(vector)
            full = torch.from_numpy(self.labels.find(vector)).view(along).expand(x.shape)
            picked = run(full)
            placed = self.rectangle(node, picked)
            if placed is not None:
                axes[placed[0]], back[placed[0]] = placed[1], axis
            else:
                self._unseen(vector, full, picked)
        return Value(tuple(run(torch.zeros(()).expand(x.shape)).shape), axes, frozenset(), x.why), back

    def rectangle(self, node: fx.Node, labels: torch.Tensor) -> tuple[int, Vector] | None:
        """Bring a label tensor down to one axis: (axis, labels), or None where one label fills the whole tensor, which is pinned then."""
        key = f"{self.mode}:{node.name}"
        found = rectangle(labels, node, self.forced.get(key, self.attention))
        if found.united is not None:
            self.labels.unite(*found.united)
        if found.chosen:
            self.choices[key] = np.unique(labels.numpy())
        if found.axis is not None:
            return found.axis, found.labels
        if len(found.labels):  # it belongs to no axis any more, so the tensor as a whole must stay, be it a single number
            self.pin(found.labels, "one channel fills a whole tensor")
        return None

    def same_axis(self, a: Vector, b: Vector) -> Vector:
        """Two sets of labels came to lie on one axis. An index goes if either of its labels does, which two sparsities cannot both
        decide: those that an expansion made yield, of others those with fewer units stay."""
        few, many = sorted((a, b), key=lambda v: (not self.is_soft(np.unique(v)), self.labels.units(v)))
        if np.isin(np.unique(few), np.unique(many)).any():  # as in a Gram matrix: an index is a pair of them
            self.pin(few, "pairs of its channels lie on one axis")
        else:
            self.pin(few, "it is folded into one axis with other channels", ReasonKind.FOLDED)
        return many

    def is_fixed(self, node: Any, axis: int) -> bool:
        """Whether a node's tensor has one size along ``axis`` whatever the input; False where that is not plain to see."""
        return False

    def is_size_of(self, size: fx.Node, node: fx.Node, axis: int) -> bool:
        """Whether a number is the size of a node's tensor along ``axis``, be it read of that tensor or of one that gave it its size."""
        return target_name(size) == "size" and size.args[0] is node and bool(size.args[1] % node.meta["val"].ndim == axis)

    def other_shapes(self, node: fx.Node) -> Sequence[Mapping[fx.Node, Sequence[int]]] | None:
        """The shapes of the graph's tensors at every other size of the inputs that was tried and that it takes; None where none was."""
        return None

    def is_number(self, size: Any) -> bool:
        """Whether a number is the same for every input: a literal, or computed of channel counts and sizes that are fixed."""
        todo, seen = [size], set()
        while todo:
            node = todo.pop()
            if not isinstance(node, fx.Node) or node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                return False
            if node.op == "call_method" and node.target == "size" and len(node.args) == 2:
                if not self._has_fixed(node.args[0], node.args[1]):
                    return False
                continue
            if node.target is operator.getitem and (one := _listed(*node.args)) is not None:
                todo.append(one)  # ``torch.tensor(y.shape)[1]``
                continue
            if isinstance(node.meta.get("val"), torch.Tensor) and node.op != "get_attr":
                return False
            todo.extend(node.all_input_nodes)
        return True

    def _has_fixed(self, source: Any, axis: Any) -> bool:
        value = self.env[self.mode].get(source)
        if isinstance(value, Value) and axis % value.ndim in value.axes:
            vector = value.axes[axis % value.ndim]
            return self.labels.units(vector) == len(vector) or self.is_fixed(source, axis)
        return self.is_fixed(source, axis)

    def counts_channels(self, size: Any) -> bool:
        """Whether a number is read of channels, and of nothing that the input decides."""
        todo = [size]
        while todo:
            node = todo.pop()
            if isinstance(node, fx.Node) and node.op == "call_method" and node.target == "size" and len(node.args) == 2:
                source, axis = node.args[0], node.args[1]
                value = self.env[self.mode].get(source)  # type: ignore[arg-type]
                if isinstance(value, Value) and axis % value.ndim in value.axes:  # type: ignore[operator]
                    return self.is_number(size)
            elif isinstance(node, fx.Node):
                todo.extend(node.all_input_nodes)
        return False

    def stays_view(self, node: fx.Node) -> bool:
        """Whether ``node`` has to share memory with what it is a part of: one of them is written into later."""
        return is_rewritten_later(node, self.traced.skeleton.module)

    def overwritten(self, target: Any, zero: Iterable[int]) -> None:
        """Something is written into ``target``: only along ``zero`` removed slices still hold zeros, in all that hold the same memory."""
        env, left = self.env[self.mode], frozenset(zero)
        if not isinstance(before := env.get(target), Value) or before.zero <= left:
            return
        meta = target.meta["val"]
        for node, value in env.items():
            if isinstance(value, Value) and value.zero and memory(node) == memory(target):
                same = node.meta["val"].shape == meta.shape and node.meta["val"].stride() == meta.stride()
                env[node] = Value(value.shape, value.axes, value.zero & left if same else frozenset(), value.why)

    # -- constants ----------------------------------------------------------------------------------------------------------

    def real(self, node: Any) -> torch.Tensor | None:
        """The actual tensor of a node that depends on constants and buffers alone (an index table), or None."""
        found = evaluate(node, self._named, self._real) if isinstance(node, fx.Node) else None
        return found if isinstance(found, torch.Tensor) else None

    def _named(self, name: str) -> torch.Tensor | None:
        if name in self.traced.constants:
            return self.traced.constants[name]
        tensor = self.traced.skeleton.real(name)
        return tensor if tensor.device.type != "meta" else None


def _listed(tensor: Any, index: Any) -> Any:
    """The number at ``index`` of a tensor that is made of listed numbers and never written into; None elsewhere."""
    if not isinstance(tensor, fx.Node) or target_name(tensor) not in ("tensor", "as_tensor", "asarray") or is_rewritten(tensor):
        return None
    given: Any = tensor.args[0] if tensor.args else None
    fits = isinstance(given, (tuple, list)) and type(index) is int and -len(given) <= index < len(given)
    return given[index] if fits else None
