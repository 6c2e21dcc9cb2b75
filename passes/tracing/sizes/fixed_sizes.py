"""Whether a size is the same for every input: a literal, or a layer's number of channels. What else code branches on is reported.

Rules for what networks do between a layer and a question about its channels; an operation without one says nothing plain.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxprune.passes.ir.nodes import is_read, target_name
from fxprune.passes.rules.layer_specs import spec_of
from fxprune.passes.tracing.sizes.axis_origin import arguments, listed, number, picked, places

Modules = Callable[[str], nn.Module]
_VIEWS = frozenset({"view", "reshape", "_unsafe_view"})
# Whatever the example says: sizes that an index has, or that are asked for.
_ASKED = frozenset(
    {
        *("gather", "index_select", "take_along_dim", "repeat", "tile", "expand_as", "broadcast_to", "view_as", "narrow"),
        *("movedim", "moveaxis", "rot90"),
    }
)
_HOMES = frozenset({"torch", "_operator", "builtins"})
_CONVOLUTION = re.compile(r"conv([123])d")
_SPATIAL = re.compile(r"[a-z_]*pool([123])d|upsample|interpolate|grid_sample")


def is_fixed(node: Any, axis: int, module: Modules) -> bool:
    """Whether the tensor of ``node`` has one size along ``axis`` whatever the input is; False where that is not plain to see."""
    if not isinstance(node, fx.Node):
        return False

    def of_axes(found: fx.Node) -> tuple[bool, ...]:
        value = found.meta.get("val")
        return tuple(_is_fixed(found, value, a, module) for a in range(value.ndim if isinstance(value, torch.Tensor) else 0))

    known: tuple[bool, ...] = from_inputs_on(node, "fixed", of_axes)
    return -len(known) <= axis < len(known) and known[axis]


def from_inputs_on(node: fx.Node, key: str, find: Callable[[fx.Node], Any]) -> Any:
    """What ``find`` says of a node once it is known of all that it is computed from, kept in their ``meta``: a network is deeper than
    Python may recurse."""
    todo = [node]
    while key not in node.meta:
        missing = [n for n in todo[-1].all_input_nodes if key not in n.meta]
        if not missing:
            found = todo.pop()
            found.meta[key] = find(found)
        todo += missing
    return node.meta[key]


def forget(graph: fx.Graph) -> None:
    """What was found while a graph was recorded is found anew: the layers that read an input were not all known."""
    for node in graph.nodes:
        if "rows" not in node.meta:
            node.meta.pop("fixed", None)


def _is_fixed(node: fx.Node, value: Any, axis: int, module: Modules) -> bool:
    if node.op == "get_attr":
        return True
    if node.op == "placeholder":
        return any(user.op == "call_module" and _takes(module(str(user.target)), user, value.ndim) == axis for user in node.users)
    layer = module(str(node.target)) if node.op == "call_module" else None
    name = _name(node, layer)
    source = node.args[0] if node.args else None
    if name in _MADE:
        return _made(node, name, axis)
    if name in ("cat", "concat", "stack"):
        return _joined(node, value.ndim, axis, name == "stack", module)
    if name == "einsum" and isinstance(source, str):
        return _summed(source, node.args[1:], value.shape[axis], axis, module)
    if not isinstance(source, fx.Node):
        return name in ("tensor", "as_tensor", "asarray") or _met(node, value, axis, module)  # as long as the list that stands there
    before, given = source.meta.get("val"), listed(node.args[1:])
    if name == "getitem" and isinstance(before, (tuple, list)):
        return _part(source, value.ndim, axis, node.args[1], module)
    if not isinstance(before, torch.Tensor):
        return False
    (weight,) = arguments(node.args[1:2], node, weight=None)
    if name in ("linear", "embedding") and axis == value.ndim - 1:
        return layer is not None or is_fixed(weight, 0 if name == "linear" else 1, module)
    if (found := _CONVOLUTION.fullmatch(name)) is not None and axis >= (channel := value.ndim - int(found[1]) - 1):
        return axis == channel and (layer is not None or is_fixed(weight, 0, module))
    if (found := _SPATIAL.fullmatch(name)) is not None and axis >= (space := value.ndim - int(found[1] or value.ndim - 2)):
        return "adaptive" in name and _pooled(node, layer, axis - space, module)
    if found is not None or name in ("linear", "conv1d", "conv2d", "conv3d"):
        return is_fixed(source, axis, module)
    if name in _VIEWS:
        return len(given) == value.ndim and _viewed(source, before.ndim, given, axis, module)
    if name == "unflatten":
        return _unflattened(node, layer, source, before.ndim, axis, module)
    if name == "expand":
        size = given[axis] if len(given) == value.ndim else None
        return is_fixed(source, axis - value.ndim, module) if size == -1 else size is not None and _is_number(size, module)
    if name in ("matmul", "bmm", "mm"):
        ndim = min(n.meta["val"].ndim for n in node.all_input_nodes)
        other = node.all_input_nodes[-1]
        return (
            ndim > 1
            and axis >= value.ndim - 2
            and (is_fixed(source, -2, module) if axis == value.ndim - 2 else is_fixed(other, -1, module))
        )
    if name == "tensordot" and node.kwargs.get("dims") == 1:
        other, kept = node.all_input_nodes[-1], before.ndim - 1
        return is_fixed(source, axis, module) if axis < kept else is_fixed(other, axis - kept + 1, module)
    if name in _ASKED or name.startswith("new_"):
        return False
    if name == "getitem":
        taken = picked(node.args[1], before.ndim, axis)
        return taken is not None and all(is_fixed(source, place, module) for place in taken)
    if isinstance(layer, nn.Flatten):
        given = [layer.start_dim, layer.end_dim]
    made_of = places(node, name, before.ndim, value.ndim, axis, given)
    return _met(node, value, axis, module) if made_of is None else all(is_fixed(source, place, module) for place in made_of)


_MADE = frozenset({"tril_indices", "triu_indices", "linspace", "logspace"})


def _made(node: fx.Node, name: str, axis: int) -> bool:
    """Of what is made by numbers alone: pairs of indices, and as many steps as the code says."""
    if name.endswith("_indices"):
        return axis == 0
    _, _, steps = arguments(node.args, node, start=None, end=None, steps=None)
    return type(steps) is int


def _takes(layer: nn.Module, user: fx.Node, ndim: int) -> int | None:
    """The axis of its input along which a layer takes one size alone: other inputs fail there."""
    if user.args[:1] != tuple(user.all_input_nodes[:1]):
        return None
    if isinstance(layer, nn.Linear):
        return ndim - 1
    return 1 if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and ndim == int(_name(user, layer)[4]) + 2 else None


def _name(node: fx.Node, layer: nn.Module | None) -> str:
    """The function of torch that a node calls, or that its layer stands for; empty for what others call by the same name."""
    if layer is None:
        home = getattr(node.target, "__module__", None) or "torch"
        return target_name(node) if node.op == "call_method" or home.partition(".")[0] in _HOMES else ""
    spec = spec_of(layer)
    if spec is not None and spec.function:
        return str(spec.function(layer)) if callable(spec.function) else spec.function
    base = nn.Flatten if isinstance(layer, nn.Flatten) else type(layer)
    return base.__name__.lower() if base.__module__.startswith("torch.nn.") else ""


def _part(source: fx.Node, ndim: int, axis: int, index: Any, module: Modules) -> bool:
    """Of one of several results."""
    if source.op == "call_module":
        return index == 0 and axis == ndim - 1 and isinstance(module(str(source.target)), (nn.LSTM, nn.GRU, nn.RNN))
    name, whole = target_name(source), source.args[0] if source.args else None
    value = whole.meta.get("val") if isinstance(whole, fx.Node) else None
    if not isinstance(value, torch.Tensor) or name not in ("unbind", "split", "chunk"):
        return False
    if name == "unbind":
        (dim,) = arguments(source.args[1:], source, dim=0)
        return is_fixed(whole, axis + (axis >= number(dim) % value.ndim), module)
    size = source.args[1] if len(source.args) > 1 else None
    dim = number(*arguments(source.args[2:], source, dim=0)) % value.ndim
    if axis == dim and isinstance(size, (tuple, list)):
        return _is_number(size[index], module)
    return is_fixed(whole, axis, module) and (axis != dim or (size is not None and _is_number(size, module)))


def _joined(node: fx.Node, ndim: int, axis: int, stacked: bool, module: Modules) -> bool:
    (parts,) = arguments(node.args[:1], node, tensors=())
    dim = number(*arguments(node.args[1:2], node, dim=0)) % ndim
    if isinstance(parts, fx.Node):
        return False
    if axis == dim:
        return stacked or all(is_fixed(p, axis, module) for p in parts)
    return any(is_fixed(p, axis - (stacked and axis > dim), module) for p in parts)


def _summed(equation: str, operands: Sequence[Any], size: int, axis: int, module: Modules) -> bool:
    given, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        return False
    terms = zip(given.split(","), listed(tuple(operands)), strict=True)
    found = [is_fixed(x, term.index(result[axis]), module) for term, x in terms if result[axis] in term]
    return all(found) if size == 1 else any(found)


def _pooled(node: fx.Node, layer: Any, axis: int, module: Modules) -> bool:
    size = getattr(layer, "output_size", None) if layer is not None else arguments(node.args[1:2], node, output_size=None)[0]
    size = size[axis] if isinstance(size, (tuple, list)) else size
    return size is not None and _is_number(size, module)


def _viewed(source: fx.Node, before: int, given: list[Any], axis: int, module: Modules) -> bool:
    if given[axis] != -1:
        return _is_number(given[axis], module)
    # Sizes that are read of the first axes stand for these; what is left must be literals here and fixed there.
    same = 0
    while same < min(axis, before) and _reads(given[same], same):
        same += 1
    return all(is_fixed(source, a, module) for a in range(same, before)) and all(_is_number(s, module) for s in given[same:])


def _unflattened(node: fx.Node, layer: Any, source: fx.Node, before: int, axis: int, module: Modules) -> bool:
    dim, sizes = (layer.dim, layer.unflattened_size) if layer is not None else arguments(node.args[1:], node, dim=0, sizes=())
    dim = number(dim) % before
    if not dim <= axis < dim + len(sizes):
        return is_fixed(source, axis if axis < dim else axis - len(sizes) + 1, module)
    if sizes[axis - dim] != -1:
        return _is_number(sizes[axis - dim], module)
    return is_fixed(source, dim, module) and all(_is_number(s, module) for s in sizes)


def _reads(size: Any, axis: int) -> bool:
    return isinstance(size, fx.Node) and size.op == "call_method" and size.target == "size" and bool(size.args[1] == axis)


def _met(node: fx.Node, value: torch.Tensor, axis: int, module: Modules) -> bool:
    """Tensors meet element by element: the size is that of any of them, but an axis of one may be longer with other inputs."""
    met = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    shapes = [n.meta["val"].shape for n in met]
    if not any(s == value.shape for s in shapes):
        return False
    spanning = [
        (n, axis - value.ndim)
        for n, s in zip(met, shapes, strict=True)
        if len(s) >= value.ndim - axis and s[axis - value.ndim] == value.shape[axis]
    ]
    found = [is_fixed(n, a, module) for n, a in spanning]
    return all(found) if value.shape[axis] == 1 else any(found)


def _is_number(size: Any, module: Modules) -> bool:
    return not isinstance(size, fx.Node) or depends(size, module) is None


def depends(node: fx.Node, module: Modules) -> fx.Node | None:
    """The size that the input decides, or the number that is one, from which ``node`` was computed, or None."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        found = todo.pop()
        if found in seen:
            continue
        seen.add(found)
        if _is_given(found) or is_read(found):
            return found
        if found.op == "call_method" and found.target == "size":
            source, axis = found.args
            if not is_fixed(source, axis, module):  # type: ignore[arg-type]
                return found
            continue
        if found.op == "call_method" and found.target == "stride":
            source = found.all_input_nodes[0]
            if not all(is_fixed(source, axis, module) for axis in range(1, source.meta["val"].ndim)):
                return found
            continue
        todo.extend(found.all_input_nodes)
    return None


def _is_given(node: fx.Node) -> bool:
    """Whether a number is an input, or stands in one."""
    within = node.target is operator.getitem and not isinstance(node.args[0].meta["val"], torch.Tensor)  # type: ignore[union-attr]
    return (node.op == "placeholder" or within) and isinstance(node.meta.get("val"), (int, float, str))


def _shares(size: Any, source: fx.Node, dim: int) -> int | None:
    """Into how many equal parts a split cuts its axis whose size is said as a part of that of the axis (``c // 2``); None of another."""
    if not isinstance(size, fx.Node) or size.target is not operator.floordiv or type(size.args[1]) is not int:
        return None
    whole: Any = size.args[0]
    if not isinstance(whole, fx.Node) or whole.target != "size" or whole.args[0] is not source:
        return None
    ndim = source.meta["val"].ndim
    return size.args[1] if whole.args[1] % ndim == dim % ndim else None


def loop(node: fx.Node, module: Modules, unpacked: bool = False) -> int | None:
    """How many parts ``node`` gives, a tensor or a tuple of parts of one, where the input decides that; None where it does not.

    ``unpacked``: the code has a name for each part, and so takes as many and no other number.
    """
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return None if is_fixed(node, 0, module) else int(value.shape[0])
    name = target_name(node)
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    given = listed(node.args[1:])
    if source is None or name not in ("unbind", "split", "chunk"):
        return None
    if name == "chunk":
        asked, dim = arguments(node.args[1:], node, chunks=1, dim=0)
        return None if len(value) == number(asked) or is_fixed(source, number(dim), module) else len(value)  # type: ignore[arg-type]
    if name == "split" and (len(node.args) < 2 or isinstance(node.args[1], (tuple, list))):
        return None  # the sizes of the parts are listed
    dim = node.kwargs.get("dim", given[0] if name == "unbind" and given else given[1] if len(given) > 1 else 0)
    if unpacked and name == "split" and _shares(node.args[1], source, int(dim)) == len(value):  # type: ignore[arg-type]
        return None  # with a rest there would be one more, which the code has no name for
    return None if is_fixed(source, int(dim), module) else len(value)  # type: ignore[arg-type]
