"""The labels of parameters: made when an operation first asks for them, or taken from the tensor that the parameter meets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import torch
from torch import fx, nn

from fxprune.passes.ir.nodes import is_computed_with, op_name
from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.passes.ir.traced import TracedModel
from fxprune.passes.ir.writes import is_rewritten
from fxprune.passes.labels.ledger import Tie
from fxprune.passes.labels.values import Labels, Value, Vector


class ParameterLabels:
    """What a walk knows of parameters, buffers and constants.

    ``parameters[(name, dim)]`` are the labels of that dimension; ``source`` says which dimension a first label was made for; ``ties``
    where a dimension was first read; ``weights`` the labels of whatever is used as a layer's weight.
    """

    def __init__(
        self, traced: TracedModel, fixed: Iterable[tuple[str, int]], channel_dims: Callable[[nn.Module, int], int] = lambda _, ndim: ndim
    ) -> None:
        self.traced = traced
        self._channel_dims = channel_dims
        self.fixed = frozenset(fixed)
        self.labels = Labels()
        self.parameters: dict[tuple[str, int], Vector] = {}
        self.source: dict[int, tuple[str, int]] = {}
        self.ties: list[Tie] = []
        self.weights: list[Vector] = []
        self.node: fx.Node | None = None

    def attribute(self, name: str) -> Value:
        """The Value of a parameter, buffer or constant: labels of its own along every axis longer than one."""
        tensor = self.traced.constants.get(name)
        if tensor is None:
            tensor = self.traced.skeleton.tensor(name)
        shape = tuple(tensor.shape)
        floating = tensor.is_floating_point()
        computed = floating or tensor.is_complex() or tensor.dtype == torch.bool or name in self._computed  # an index has positions
        width = self._channels_end(name, len(shape)) if computed else 0
        axes = {d: self.parameter(name, d, n) for d, n in enumerate(shape[:width]) if n > 1}
        # A removed slice of a parameter is one of zeros; of a literal, or of what forward writes into, it is not.
        zeroed = floating and name not in self.traced.constants and name not in self._written
        return Value(shape, axes, frozenset(axes) if zeroed else frozenset(), _from(name))

    @cached_property
    def _written(self) -> frozenset[str]:
        """The tensors that an evaluation writes into: from the second call on they hold what it wrote."""
        graphs = [graph for mode, graph in self.traced.graphs.items() if not mode.endswith("train")]
        return frozenset(str(n.target) for graph in graphs for n in graph.nodes if n.op == "get_attr" and is_rewritten(n))

    @cached_property
    def _computed(self) -> frozenset[str]:
        """The integer tensors that are computed with, wherever they are read: their entries belong to channels, and are no positions."""
        reads: dict[str, bool] = {}
        for graph in self.traced.graphs.values():
            for node in graph.nodes:
                if node.op == "get_attr" and not node.meta["val"].is_floating_point():
                    reads[str(node.target)] = reads.get(str(node.target), True) and is_computed_with(node)
        return frozenset(name for name, computed in reads.items() if computed)

    def _channels_end(self, name: str, ndim: int) -> int:
        """How many leading dimensions of a tensor may carry channels, by the layers that hold it."""
        ends = []
        for alias in self.traced.skeleton.aliases.get(name, ()):
            owner = self.traced.skeleton.original_module(alias.rpartition(".")[0].partition(".parametrizations.")[0])
            ends.append(self._channel_dims(owner, ndim))
        return min(ends, default=ndim)

    def parameter(self, name: str, dim: int, size: int) -> Vector:
        """The labels of dimension ``dim`` of a parameter; made the first time it is asked for."""
        key = (name, dim)
        if key not in self.parameters:
            vector = self.labels.new(size)
            self.parameters[key] = vector
            self.source[int(vector[0])] = key
            self.ties.append(Tie(name, dim, self.node.name if self.node else "", self.op_name()))
            self._pin_fixed(key, vector)
        return self.parameters[key]

    def _pin_fixed(self, key: tuple[str, int], vector: Vector) -> None:
        if key in self.fixed:
            self.labels.pin(vector, Reason(ReasonKind.IGNORED, "the user asked to leave it alone (ignore)"))
        if key[0] in self.traced.read:
            self.labels.pin(vector, Reason(ReasonKind.PYTHON, f"Python code reads the values of {key[0]!r}", name=key[0]))

    def bind(self, node: fx.Node, key: str, dim: int, vector: Vector | None) -> None:
        """A tensor of the called module is read along ``vector``: where it has no labels yet it takes these, which saves uniting them."""
        name = self.canonical(str(node.target), key) if vector is not None else None
        if name is not None and vector is not None and self.traced.skeleton.tensor(name).shape[dim] == len(vector):
            self.tie(name, dim, vector)

    def tie(self, name: str, dim: int, vector: Vector) -> None:
        """Dimension ``dim`` of parameter ``name`` is read along ``vector``: the two go together."""
        key = (name, dim)
        if key not in self.parameters:
            self.parameters[key] = vector
            self.ties.append(Tie(name, dim, self.node.name if self.node else "", self.op_name()))
            self._pin_fixed(key, vector)
            return
        self.labels.unite(self.parameters[key], vector)

    def canonical(self, module: str, key: str) -> str | None:
        """The first name of the tensor ``key`` of a module, or None where the module has none."""
        skeleton = self.traced.skeleton
        tensor = getattr(skeleton.module(module), key, None)
        return skeleton.tensor_names.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None

    def weight(self, node: fx.Node, key: str) -> Value | None:
        """The Value of a tensor of the module that ``node`` calls."""
        name = self.canonical(str(node.target), key)
        return None if name is None else self.attribute(name)

    def weight_dims(self, node: fx.Node, key: str, dims: Sequence[int]) -> Value | None:
        """Like ``weight``, with labels along ``dims`` alone (a kernel's width carries no channels)."""
        name = self.canonical(str(node.target), key)
        if name is None:
            return None
        shape = tuple(self.traced.skeleton.tensor(name).shape)
        axes = {d: self.parameter(name, d, shape[d]) for d in dims if shape[d] > 1}
        return Value(shape, axes, frozenset(axes), _from(name))

    def read_as_weight(self, value: Value | None) -> None:
        """A tensor is used as a layer's weight: its channels are a layer's channels, whoever holds the parameter."""
        if value is not None:
            self.weights.extend(vector for axis, vector in value.axes.items() if axis < 2)

    def is_weight(self, value: Value) -> bool:
        """Whether a value is a parameter, or one that was only moved."""
        return value.why.kind is ReasonKind.PARAMETER and value.why.name in self.traced.skeleton.parameter_names

    def op_name(self) -> str:
        return op_name(self.node, self.traced) if self.node is not None else ""

    def where(self) -> str:
        return str(self.node.meta.get("where", "")) if self.node is not None else ""


def _from(name: str) -> Reason:
    return Reason(ReasonKind.PARAMETER, f"it comes from {name!r}", name=name)
