"""What is known of each type of layer, said once: which parameters hold output and input channels, which attributes hold sizes.

The facts of torch's own layers stand beside their rules (``rules.computing``, ``rules.moving``); ``register_layer`` opens the table to
users. Everything that asks about a layer's type asks ``spec_of``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxprune.errors import InputError
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import MODULES, Rule

Dims = int | tuple[int, ...]


@dataclass(frozen=True)
class LayerSpec:
    """Everything that fxprune knows of one type of layer.

    Args:
        outputs: Parameter -> its dimension (or dimensions) of output channels, ``{"weight": 0, "bias": 0}``; a function of the module where
            that depends on its options. Parameters left out have them along dimension 0.
        inputs: Parameter -> its dimension of input channels, ``{"weight": 1}``. Only the rule made from ``axis`` reads it.
        produces: Whether the outputs are new channels, which groups are named after; a norm passes on those that it is given.
        sizes: Attribute -> (parameter, dimension): the size that the attribute repeats, ``{"out_features": ("weight", 0)}``.
        resize: ``resize(slim, module, x, y)`` sets whatever else depends on the sizes, from the ``Value`` of the (first) input and output.
        without_parameters: ``(module, x, y) -> [(Value, axis), ...]``: the axes of input and output whose size an attribute holds although
            no parameter of the module has that size, so that the module can have one size only wherever it is called.
        axis: The channel axis of input and output, for a layer that treats everything beside it alike. With it no rule is needed: input
            channels are tied to ``inputs``, output channels are those of ``outputs``. Without it, add a rule by ``register_op``.
        channel_dims: How many leading dimensions of ``weight`` may carry channels; None for all (a kernel's width is never pruned).
        shape: ``shape(module, args) -> result`` on meta tensors, by arithmetic; None where the module has to be run. Only for speed.
        has_channels: Whether the layer has channels of its own; False for one that only moves elements around.
        function: ``torch.nn.functional`` name of the same operation, for questions about which sizes are fixed; empty where there is none.
    """

    outputs: Mapping[str, Dims] | Callable[[Any], Mapping[str, Dims]] = field(default_factory=dict)
    inputs: Mapping[str, int] = field(default_factory=dict)
    produces: bool = True
    sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    resize: Callable[[Rewriter, Any, Value, Value], None] | None = None
    without_parameters: Callable[[Any, Value, Value], list[tuple[Value, int]]] | None = None
    axis: int | None = None
    channel_dims: int | None = None
    shape: Callable[[Any, tuple[Any, ...]], Any] | None = None
    function: str | Callable[[Any], str] = ""
    has_channels: bool = True
    """False for a module that keeps sizes without being a layer (``nn.Unflatten``): its parameters need no group."""

    @property
    def has_sizes(self) -> bool:
        """Whether a module of the type holds sizes in attributes."""
        return bool(self.sizes) or self.resize is not None


SPECS: dict[type, LayerSpec] = {}


def register_layer(cls: type[nn.Module], spec: LayerSpec | None = None, **facts: Any) -> None:
    """Say what fxprune has to know of a layer class of your own; subclasses that do not say otherwise inherit it.

    The tracer keeps a registered layer whole: it is sliced, its sizes are set, groups are named after it, and the slim network runs it.

    Args:
        cls: The class, a subclass of ``torch.nn.Module``.
        spec: What is known of it. The fields of ``LayerSpec`` may also be given by name.
        **facts: Fields of ``LayerSpec``, where no ``spec`` is given.

    Raises:
        InputError: ``cls`` is no module class, a field does not exist, or there is neither ``axis`` nor a rule of ``register_op``.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InputError(f"register_layer takes a subclass of torch.nn.Module, not {cls!r}")
    known = LayerSpec.__dataclass_fields__
    if wrong := sorted(facts.keys() - known.keys()):
        raise InputError(f"register_layer({cls.__name__}): LayerSpec has no field {wrong[0]!r}; it has {', '.join(known)}")
    if spec is not None and facts:
        raise InputError(f"register_layer({cls.__name__}): give a LayerSpec or its fields, not both")
    found = LayerSpec(**facts) if spec is None else spec
    if found.axis is None and MODULES.get(cls) is None:
        raise InputError(
            f"register_layer({cls.__name__}): say axis= (the channel axis of input and output), "
            f"or add a rule first: @register_op({cls.__name__})"
        )
    if found.axis is not None and MODULES.get(cls) is None:
        MODULES[cls] = Rule(_plain_rule(found))
    SPECS[cls] = found


def layers(*types: type, **facts: Any) -> None:
    """The facts of torch's own layers, beside their rules."""
    SPECS.update(dict.fromkeys(types, LayerSpec(**facts)))


def spec_of(module: nn.Module) -> LayerSpec | None:
    """What is known of a module's type: that of its class or of the first base that has any."""
    for cls in type(module).__mro__:
        if (spec := SPECS.get(cls)) is not None:
            return spec
    return NORMALISED if hasattr(module, "normalized_shape") else None


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer: every channel of its parameters has to be in a group."""
    spec = spec_of(module)
    return spec is not None and spec.has_channels


def outputs_of(module: nn.Module, key: str, ndim: int) -> tuple[int, ...] | None:
    """The dimensions of the module's parameter ``key`` that are output channels; None where the module is no layer."""
    spec = spec_of(module)
    if spec is None or not spec.has_channels:
        return None
    if ndim < 2:
        return (0,)
    outputs = spec.outputs(module) if callable(spec.outputs) else spec.outputs
    dims = outputs.get(key, 0)
    return dims if isinstance(dims, tuple) else (dims,)


def produced_dim(module: nn.Module, key: str, ndim: int) -> int | None:
    """The dimension of the module's parameter ``key`` that holds channels which the layer makes, -1 for none; None where the module makes
    no channels, so that its parameters may be the weights of functions."""
    spec, outputs = spec_of(module), outputs_of(module, key, ndim)
    if spec is None or outputs is None or not spec.produces:
        return None
    return outputs[0] if ndim > 1 else -1


def channel_dims(module: nn.Module, ndim: int) -> int:
    """How many leading dimensions of a weight of ``ndim`` dimensions (or of a mask of its form) may carry channels."""
    spec = spec_of(module)
    weight = getattr(module, "kernel_size", ())
    return spec.channel_dims if spec is not None and spec.channel_dims is not None and ndim == len(weight) + 2 else ndim


def has_sizes(module: nn.Module) -> bool:
    """Whether ``resize`` has anything to do."""
    spec = spec_of(module)
    return spec is not None and spec.has_sizes


def resize(slim: Rewriter, module: Any, x: Value, y: Value) -> None:
    """Set ``module``'s sizes from what is left of its parameters, its input ``x`` and its output ``y``."""
    spec = spec_of(module)
    if spec is None:
        return
    for attribute, (parameter, dim) in spec.sizes.items():
        tensor = getattr(module, parameter, None)
        if tensor is not None:
            set_size(module, attribute, tensor.shape[dim])
    if spec.resize is not None:
        spec.resize(slim, module, x, y)


def set_size(module: nn.Module, attribute: str, size: Any) -> None:
    """Set an attribute that repeats a size; past ``nn.Module.__setattr__``, which takes long, where it is a plain one."""
    if attribute in module.__dict__:
        module.__dict__[attribute] = size
    else:
        setattr(module, attribute, size)


def called_again(ctx: LabelContext, node: fx.Node, module: nn.Module, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
    """A module that keeps sizes without having parameters of them can be given one size only, wherever it is called."""
    spec = spec_of(module)
    asks = spec.without_parameters if spec is not None and inputs and outputs and not any(True for _ in module.parameters()) else None
    found = asks(module, inputs[0], outputs[0]) if asks is not None else []
    before = ctx.sized.setdefault(str(node.target), found)
    for (value, axis), (first, place) in zip(found, before, strict=True):
        a, b = value.axes.get(axis), first.axes.get(place)
        if a is not None and b is not None:
            ctx.unite(a, b)
        elif a is not None or b is not None:
            why = (value if a is None else first).why
            ctx.pin(a if b is None else b, f"{str(node.target)!r} is called on channels of fixed size as well", because=why)


def _plain_rule(spec: LayerSpec) -> Callable[..., Any]:
    """The rule of a layer that reads channels along ``spec.axis`` and gives new ones there, alike at every other position."""

    def rule(ctx: LabelContext, node: fx.Node, module: nn.Module, input: Value, *others: Any, **named: Any) -> Any:
        assert spec.axis is not None
        axis = spec.axis % input.ndim
        arriving = input.axes.get(axis)
        for key, dim in spec.inputs.items():
            weight = ctx.weight(node, key)
            if weight is None:
                continue
            if arriving is None:
                ctx.pin(weight.axes.get(dim), "the layer reads channels of fixed size", because=input.why)
            elif dim in weight.axes:
                ctx.unite(weight.axes[dim], arriving)
            else:
                ctx.pin(arriving, "it meets a weight of fixed size", because=weight.why)
        made = None if spec.produces else arriving
        for key, _ in module.named_parameters(recurse=False):
            weight = ctx.weight(node, key)
            dims = outputs_of(module, key, 0 if weight is None else weight.ndim) or ()
            for vector in [] if weight is None else [weight.axes[d] for d in dims if d in weight.axes]:
                made = vector if made is None else made
                ctx.unite(made, vector)
        axes = {a: v for a, v in input.axes.items() if a != axis}
        return ctx.make(node, axes if made is None else {**axes, axis: made})

    return rule


def _normalised_axes(module: Any, x: Value) -> range:
    return range(x.ndim - len(module.normalized_shape), x.ndim)


def _resize_normalised(slim: Rewriter, module: Any, x: Value, y: Value) -> None:
    set_size(module, "normalized_shape", tuple(slim.count(x, a) for a in _normalised_axes(module, x)))


# Any module with a ``normalized_shape``: libraries have norms of their own that keep it as torch's do.
NORMALISED = LayerSpec(
    produces=False,
    resize=_resize_normalised,
    without_parameters=lambda module, x, y: [(x, a) for a in _normalised_axes(module, x)],
    has_channels=False,
)
