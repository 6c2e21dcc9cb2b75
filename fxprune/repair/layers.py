"""The layers of a graph that can be repaired: where a constant can be put, and which other branch their output is added to.

A layer is what multiplies one value of the graph with a parameter of its own, by what is computed and not by class: a module, or a call of
``F.conv2d``, ``F.linear``, ``torch.addmm``, ``x @ w`` and their kind on a parameter that nothing else reads.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.errors import FAULTS
from fxprune.evaluation.running import evaluating
from fxprune.passes.compat import BatchNormBase
from fxprune.repair.matrices import Form, convolution, form_of, transposed_convolution
from fxprune.repair.recurrent import repairable

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__")
_IDLE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)  # in evaluation
_FLIPS = ("t", "T", "mT", "transpose", "swapaxes", "swapdims")  # of a matrix
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_PRODUCTS = (torch.matmul, torch.mm, operator.matmul, torch.Tensor.matmul, "matmul", "mm", "__matmul__")
_ADDMM = (torch.addmm, "addmm")
_NORMS = (F.batch_norm, torch.batch_norm)
_CLIPS: tuple[tuple[tuple[Any, ...], tuple[float, float]], ...] = (
    ((F.relu, torch.relu, torch.relu_, "relu", "relu_", nn.ReLU), (0.0, float("inf"))),
    ((F.relu6, nn.ReLU6), (0.0, 6.0)),
)


def _convolve(input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1) -> None: ...


def _spread(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: Any = 1,
    dilation: Any = 1,
) -> None: ...


def _linear(input: Any, weight: Any, bias: Any = None) -> None: ...


def _product(input: Any, other: Any) -> None: ...


def _addmm(input: Any, mat1: Any, mat2: Any, beta: Any = 1, alpha: Any = 1) -> None: ...


def _functional_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> None: ...


def _torch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    cudnn_enabled: Any = True,
) -> None: ...


@dataclass(frozen=True)
class Norm:
    """A BatchNorm with running statistics, called once, as a module or as a function. ``node``: its call."""

    node: fx.Node
    mean: Tensor
    var: Tensor
    scale: Tensor | None
    constant: Tensor | None
    eps: float

    def gain(self) -> Tensor:
        """What one unit of its input comes to in its output, by channel."""
        found: Tensor = (self.var + self.eps).rsqrt()
        return found if self.scale is None else found * self.scale.detach()


@dataclass(frozen=True)
class Layer:
    """What multiplies ``source`` with a parameter of its own, called once.

    ``name``: the weight's qualified name below the graph's module. ``bias``: its own, or None; ``apart``: whether another node adds it.
    ``norm``: the BatchNorm that alone reads the output. ``other``: the node that its output, normalised, is added to, if that one runs
    first. ``end``: the node that gives what comes of it: the addition, or the BatchNorm, or what adds the bias, or ``node`` itself.
    ``clip``: between which values alone that is read, where a ReLU follows; None elsewhere.
    """

    name: str
    node: fx.Node
    source: fx.Node
    form: Form
    weight: Tensor
    bias: Tensor | None
    apart: bool
    norm: Norm | None
    other: fx.Node | None
    end: fx.Node
    clip: tuple[float, float] | None = None

    @property
    def path(self) -> str:
        """The name under which the user knows the layer."""
        return self.name.removesuffix(".weight")

    @property
    def takes_shift(self) -> bool:
        """Whether a constant can be added to the output: there is a bias, or a BatchNorm whose mean takes it."""
        return self.bias is not None or self.norm is not None

    def add_shift(self, shift: Tensor) -> None:
        """Add ``shift`` (channels) to the layer's output, or to the input of its BatchNorm."""
        with torch.no_grad():
            if self.bias is not None:
                self.bias.add_(shift.to(self.bias))
            elif self.norm is not None:
                self.norm.mean.sub_(shift.to(self.norm.mean))

    def gain(self) -> Tensor:
        """What one unit of the layer's output comes to where it is added to the other branch, by channel."""
        return torch.ones(()) if self.norm is None else self.norm.gain()

    def constant(self) -> Tensor:
        """What an output of 0 comes to there, by channel."""
        found = self.bias.detach() if self.apart and self.bias is not None else torch.zeros(())
        if self.norm is None:
            return found
        found = (found - self.norm.mean) * self.norm.gain()
        return found if self.norm.constant is None else found + self.norm.constant.detach()


class Reading:
    """A graph and the module whose parameters it reads, asked what its nodes compute."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        names = module.named_parameters(remove_duplicate=False)
        self._shared = Counter(id(p) for _, p in names)
        self._calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        self._uses: Counter[int] = Counter()
        for node in graph.nodes:
            if node.op == "get_attr" and (tensor := self._tensor(node)) is not None:
                self._uses[id(tensor)] += len(node.users)
            elif node.op == "call_module":
                for tensor in module.get_submodule(str(node.target)).parameters():
                    self._uses[id(tensor)] += 1

    def layers(self) -> list[Layer]:
        """The layers of the graph in its order, except those called more than once or with a weight that is not theirs alone."""
        found = []
        for node in self.graph.nodes:
            one = self._module(node) if node.op == "call_module" else self._call(node)
            if one is not None:
                found.append(one)
        return found

    def repeated(self) -> list[list[Layer]]:
        """The layers whose weight several calls read, each call multiplying with it: the calls of each, in the graph's order.

        A BatchNorm belongs to them where it is the one behind every call. No branch does: behind another call there is another.
        """
        calls: dict[int, list[Layer]] = {}
        for one in _Repeated(self.module, self.graph).layers():
            calls.setdefault(id(one.weight), []).append(one)
        return [self._alike(same) for same in calls.values() if all(self._uses[id(t)] == len(same) for t in _own_tensors(same[0]))]

    def _alike(self, calls: list[Layer]) -> list[Layer]:
        norms = {None if one.norm is None else str(one.norm.node.target) for one in calls}
        shared = len(norms) == 1 and self._calls[str(norms.pop())] == len(calls)
        return calls if shared else [replace(one, norm=None, end=one.node) for one in calls]

    def norms(self) -> list[Norm]:
        """The BatchNorms of the graph in its order, each called once."""
        return [norm for node in self.graph.nodes if (norm := self._norm(node)) is not None]

    def recurrent(self) -> dict[fx.Node, Any]:
        """The recurrent modules of the graph by their calls, each called once, with parameters of its own."""
        found = {}
        for node in self.graph.nodes:
            if node.op == "call_module" and self._calls[str(node.target)] == 1:
                module = self.module.get_submodule(str(node.target))
                if repairable(module) and all(self._alone(p) for p in module.parameters()):
                    found[node] = module
        return found

    def _tensor(self, node: Any) -> Tensor | None:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        owner, _, name = str(node.target).rpartition(".")
        found = getattr(self.module.get_submodule(owner), name, None)
        return found if isinstance(found, Tensor) else None

    def _own(self, node: Any) -> nn.Parameter | None:
        """The parameter that ``node`` gets, where nothing else reads it."""
        found = self._tensor(node)
        return found if isinstance(found, nn.Parameter) and self._alone(found) else None

    def _alone(self, tensor: Tensor) -> bool:
        return self._uses[id(tensor)] == 1 and self._shared[id(tensor)] <= 1

    def _module(self, node: fx.Node) -> Layer | None:
        path = str(node.target)
        module: Any = self.module.get_submodule(path)
        form = form_of(module)
        if form is None or module._parameters.get("weight") is None:  # else it is computed, by a parametrization
            return None
        if not all(self._alone(p) for p in module.parameters()):
            return None
        source = node.args[0] if node.args else node.kwargs.get("input")
        return self._layer(f"{path}.weight", node, source, form, module.weight, module.bias)

    def _call(self, node: fx.Node) -> Layer | None:
        if node.op not in ("call_function", "call_method"):
            return None
        for targets, signature, read in _CALLS:
            if node.target in targets:
                try:
                    given = inspect.signature(signature).bind(*node.args, **node.kwargs)
                except TypeError:
                    return None
                given.apply_defaults()
                return read(self, node, given.arguments)
        return None

    def _functional(self, node: fx.Node, given: dict[str, Any], form: Form | None, weight_node: Any) -> Layer | None:
        weight = self._own(weight_node)
        bias = None if given.get("bias") is None else self._own(given["bias"])
        if weight is None or form is None or (given.get("bias") is not None and bias is None):
            return None
        return self._layer(str(weight_node.target), node, given["input"], form, weight, bias)

    def _convolved(self, node: fx.Node, given: dict[str, Any]) -> Layer | None:
        weight = self._own(given["weight"])
        form = None if weight is None else convolution(weight, given["stride"], given["padding"], given["dilation"], given["groups"])
        return self._functional(node, given, form, given["weight"])

    def _spread(self, node: fx.Node, given: dict[str, Any]) -> Layer | None:
        weight = self._own(given["weight"])
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        form = None if weight is None else transposed_convolution(weight, *(given[name] for name in names))
        return self._functional(node, given, form, given["weight"])

    def _linear(self, node: fx.Node, given: dict[str, Any]) -> Layer | None:
        return self._multiplied(node, given["input"], given["weight"], given["bias"], stored=True)

    def _product(self, node: fx.Node, given: dict[str, Any]) -> Layer | None:
        return self._multiplied(node, given["input"], given["other"], None, stored=False)

    def _added(self, node: fx.Node, given: dict[str, Any]) -> Layer | None:
        if given["beta"] != 1 or given["alpha"] != 1:
            return None
        return self._multiplied(node, given["mat1"], given["mat2"], given["input"], stored=False)

    def _multiplied(self, node: fx.Node, source: Any, weight: Any, bias: Any, *, stored: bool) -> Layer | None:
        """``stored``: whether ``weight`` lies as outputs x features."""
        while isinstance(weight, fx.Node) and len(weight.users) == 1 and (inner := _flipped(weight)) is not None:
            weight, stored = inner, not stored
        found = self._own(weight)
        if found is None or found.ndim != 2:
            return None
        return self._functional(node, {"input": source, "bias": bias}, Form("linear" if stored else "matmul"), weight)

    def _layer(self, name: str, node: fx.Node, source: Any, form: Form, weight: Tensor, bias: Tensor | None) -> Layer | None:
        if not isinstance(source, fx.Node):
            return None
        end, apart = node, False
        if bias is None and (found := self._bias_behind(node, weight, form)) is not None:
            bias, end, apart = *found, True
        norm = None
        reader = _only_reader(end)
        if reader is not None and (norm := self._norm(reader)) is not None:
            end = reader
        other, added = self._added_to(end, node)
        return Layer(name, node, source, form, weight, bias, apart, norm, other, added or end, self._clip_behind(added or end))

    def _bias_behind(self, node: fx.Node, weight: Tensor, form: Form) -> tuple[Tensor, fx.Node] | None:
        """The parameter that alone is added to the output of a linear layer, and the node that adds it."""
        reader = _only_reader(node)
        if form.space or reader is None or reader.target not in _ADD or len(reader.args) != 2 or reader.kwargs:
            return None
        bias = next((self._own(one) for one in reader.args if one is not node), None)
        outputs = weight.shape[0 if form.kind == "linear" else 1]
        return (bias, reader) if bias is not None and bias.shape == (outputs,) else None

    def _norm(self, node: fx.Node) -> Norm | None:
        if node.op == "call_module" and self._calls[str(node.target)] == 1:
            return self._statistics(node)
        if node.op != "call_function" or node.target not in _NORMS:
            return None
        signature: Callable[..., None] = _functional_norm if node.target is F.batch_norm else _torch_norm
        try:
            given = inspect.signature(signature).bind(*node.args, **node.kwargs)
        except TypeError:
            return None
        given.apply_defaults()
        mean, var, scale, constant = (self._tensor(given.arguments[name]) for name in ("running_mean", "running_var", "weight", "bias"))
        eps = given.arguments["eps"]
        used = mean is None or var is None or self._uses[id(mean)] > 1 or self._uses[id(var)] > 1
        if used or given.arguments["training"] is not False or not isinstance(eps, float):
            return None
        assert mean is not None and var is not None
        return Norm(node, mean, var, scale, constant, eps)

    def _statistics(self, node: fx.Node) -> Norm | None:
        norm = self.module.get_submodule(str(node.target))
        if isinstance(norm, BatchNormBase) and norm.running_mean is not None and norm.running_var is not None:
            return Norm(node, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        return None

    def _added_to(self, end: fx.Node, node: fx.Node) -> tuple[fx.Node, fx.Node] | tuple[None, None]:
        """What ``end`` is added to, if that runs before ``node``, and the addition."""
        reader = _only_reader(end)
        while reader is not None and self._is_idle(reader):
            end, reader = reader, _only_reader(reader)
        if reader is None or reader.target not in _ADD or len(reader.args) != 2 or reader.kwargs:
            return None, None
        others = [one for one in reader.args if one is not end]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            return None, None
        return (others[0], reader) if self.place[others[0]] < self.place[node] else (None, None)

    def _clip_behind(self, end: fx.Node) -> tuple[float, float] | None:
        reader = _only_reader(end)
        while reader is not None and self._is_idle(reader):
            reader = _only_reader(reader)
        return None if reader is None else self._clip(reader)

    def _clip(self, node: fx.Node) -> tuple[float, float] | None:
        target = type(self.module.get_submodule(str(node.target))) if node.op == "call_module" else node.target
        return next((bounds for targets, bounds in _CLIPS if target in targets), None)

    def passes(self, node: fx.Node) -> bool:
        """Whether ``node`` gives what it reads, in evaluation, but for what a ReLU cuts off."""
        return self._is_idle(node) or self._clip(node) is not None

    def _is_idle(self, node: fx.Node) -> bool:
        return node.op == "call_module" and len(node.all_input_nodes) == 1 and _gives_back(self.module.get_submodule(str(node.target)))


class _Repeated(Reading):
    """The calls whose weight other calls read as well."""

    def _alone(self, tensor: Tensor) -> bool:
        return self._uses[id(tensor)] > 1

    def _layer(self, name: str, node: fx.Node, source: Any, form: Form, weight: Tensor, bias: Tensor | None) -> Layer | None:
        if not isinstance(source, fx.Node):
            return None
        reader = _only_reader(node)
        norm = self._statistics(reader) if reader is not None and reader.op == "call_module" else None
        return Layer(name, node, source, form, weight, bias, False, norm, None, node if norm is None else norm.node)


def _gives_back(module: nn.Module) -> bool:
    """Whether a module gives in evaluation what it reads, as dropout does, and what drops whole branches in training."""
    if isinstance(module, _IDLE) or any(True for _ in (*module.parameters(), *module.buffers())):
        return isinstance(module, _IDLE)
    probe = torch.tensor([-1e30, -5.0, -0.3, 0.0, 0.3, 5.0, 1e3, 1e30]).reshape(2, 1, 2, 2)
    given = probe.clone()
    try:
        with evaluating(module):
            return module(given) is given and torch.equal(given, probe)
    except FAULTS:
        return False


def _own_tensors(layer: Layer) -> list[Tensor]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


_CALLS: tuple[tuple[tuple[Any, ...], Callable[..., None], Callable[..., Layer | None]], ...] = (
    (_CONVOLUTIONS, _convolve, Reading._convolved),
    (_TRANSPOSED, _spread, Reading._spread),
    ((F.linear,), _linear, Reading._linear),
    (_PRODUCTS, _product, Reading._product),
    (_ADDMM, _addmm, Reading._added),
)


def key_of(node: fx.Node, part: str = "") -> str:
    """A key for a node that is the same in every graph: what it calls, or its first tensor, named below ``part``; "" without either."""
    place = node.target if node.op == "call_module" else next((n.target for n in node.all_input_nodes if n.op == "get_attr"), "")
    return str(place).removeprefix(f"{part}." if part else "")


def layers_of(module: nn.Module, graph: fx.Graph) -> list[Layer]:
    """The layers of ``graph`` that can be repaired, in its order."""
    return Reading(module, graph).layers()


def _flipped(node: fx.Node) -> Any:
    """The matrix whose transpose ``node`` is, or None."""
    if node.op == "call_method" or (node.op == "call_function" and node.target is not getattr):
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        axes = node.args[1:]
        if name in _FLIPS and not node.kwargs and (not axes or sorted(a % 2 if isinstance(a, int) else -1 for a in axes) == [0, 1]):
            return node.args[0]
        if name == "permute" and not node.kwargs:
            order: Any = axes[0] if len(axes) == 1 else axes
            flips = isinstance(order, (tuple, list)) and [a % 2 if isinstance(a, int) else -1 for a in order] == [1, 0]
            return node.args[0] if flips else None
        return None
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("T", "mT"):
        return node.args[0]
    return None


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
