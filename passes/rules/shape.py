"""Data movement: run literally on labels; the sizes, splits, slices and indices that name channels are recomputed from what is kept."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.passes.rules.registry import functions, modules, named
from fxprune.passes.rules.values import Value, Vector, values

if TYPE_CHECKING:
    from fxprune.passes.labels import Walk


def _call(node: fx.Node, x: Value, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The node's own operation as a function of its first tensor."""

    def run(labels: torch.Tensor) -> Any:
        try:
            if node.op == "call_method":
                return getattr(labels, str(node.target))(*args, **kwargs)
            return node.target(labels, *args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, NotImplementedError) as error:
            if "not implemented for" not in str(error):
                raise
            done = node.target(labels.double(), *args, **kwargs)  # type: ignore[operator]
            return done.long()

    return run


def _moved(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    return walk.move(node, input, _call(node, input, args, kwargs))


# -- operations whose arguments never name a channel --------------------------------------------------------------------------


@named(
    "permute", "transpose", "swapaxes", "swapdims", "t", "movedim", "moveaxis", "flatten", "ravel", "unsqueeze", "unbind", "flip", "fliplr",
    "flipud", "rot90", "pixel_shuffle", "pixel_unshuffle", "adjoint", "diagonal", "unfold_copy",
)  # fmt: skip
def move(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    return _moved(walk, node, input, *args, **kwargs)


@functions(getattr)
def attribute(walk: Walk, node: fx.Node, input: Any, name: str) -> Any:
    if isinstance(input, tuple):  # x.max(1).values: a named result of an operation that gives several
        source = node.args[0].meta["val"]  # type: ignore[union-attr]
        return next(v for v, meta in zip(input, source, strict=True) if meta is getattr(source, name))
    if not isinstance(node.meta["val"], torch.Tensor):
        return node.meta["val"]
    if name in ("T", "mT", "H", "mH"):
        return walk.move(node, input, lambda labels: getattr(labels, name))
    if name in ("data", "real"):
        return walk.make(node, input.axes, input.zero, input.why)
    return walk.opaque(node, [input], f"its attribute {name!r} is read")


@modules(nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle)
def move_module(walk: Walk, node: fx.Node, module: nn.Module, input: Value) -> Any:
    return walk.move(node, input, lambda labels: module.forward(labels))


def _shuffled(slim: Any, node: fx.Node) -> None:
    """Any channels may have gone, so what is left no longer falls into groups of equal width: it is picked by its order."""
    x = slim.value(node.args[0])
    kept = slim.kept(x, 1)
    if kept is not None:
        order = np.arange(x.shape[1]).reshape(slim.number(slim.argument(node, 1, "groups")), -1).T.reshape(-1)
        chosen = np.searchsorted(kept, order[np.isin(order, kept)]).tolist()
        node.target, node.args, node.kwargs = operator.getitem, (node.args[0], (slice(None), chosen)), {}


named("channel_shuffle", "native_channel_shuffle", rewrite=_shuffled, inplace=False)(move)


def _squeezed(slim: Any, node: fx.Node) -> None:
    """``squeeze()`` drops every axis of size one: a channel axis left with one channel must stay."""
    x = slim.value(node.args[0])
    if len(node.args) + len(node.kwargs) == 1:
        slim.set_argument(node, 1, "dim", tuple(a for a, n in enumerate(x.shape) if n == 1))


named("squeeze", rewrite=_squeezed)(move)


def _unfold(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    return _moved(walk, node, input, *args, **kwargs)


@functions(F.unfold)
def unfold(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    """Windows of ``input`` (N, C, H, W) as columns (N, C * window, positions); padding holds no channel, so it takes its neighbour's."""
    kernel = args[0] if args else kwargs["kernel_size"]
    return _columns(walk, node, input, math.prod(kernel) if isinstance(kernel, (tuple, list)) else kernel**2)


@modules(nn.Unfold)
def unfold_module(walk: Walk, node: fx.Node, module: Any, input: Value) -> Any:
    kernel = module.kernel_size
    return _columns(walk, node, input, math.prod(kernel) if isinstance(kernel, (tuple, list)) else kernel**2)


def _columns(walk: Walk, node: fx.Node, x: Value, window: int) -> Any:
    channel = x.ndim - 3
    for axis in (x.ndim - 2, x.ndim - 1):
        walk.pin(x.axes.get(axis), "it is unfolded along it")
    axes = {a: v for a, v in x.axes.items() if a < channel}
    if channel in x.axes:
        axes[channel] = np.repeat(x.axes[channel], window)
    return walk.make(node, axes, x.zero, x.why)


@functions(F.fold)
def fold(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    return _folded(walk, node, input)


@modules(nn.Fold)
def fold_module(walk: Walk, node: fx.Node, module: nn.Module, input: Value) -> Any:
    return _folded(walk, node, input)


def _folded(walk: Walk, node: fx.Node, x: Value) -> Any:
    """Columns (N, C * window, positions) summed back to (N, C, H, W): the entries of one window go together."""
    channel = x.ndim - 2
    walk.pin(x.axes.get(x.ndim - 1), "it is folded along it")
    channels = node.meta["val"].shape[-3]
    axes = {a: v for a, v in x.axes.items() if a < channel}
    if channel in x.axes:
        grid = x.axes[channel].reshape(channels, -1)
        walk.unite(np.repeat(grid[:, 0], grid.shape[1]), x.axes[channel])
        axes[channel] = grid[:, 0].copy()
    return walk.make(node, axes, x.zero, x.why)


@named("unfold", inplace=False)
def windows(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    if node.op == "call_function":
        return unfold(walk, node, input, *args, **kwargs)
    walk.pin(input.axes.get(args[0] % input.ndim), "a window slides along it")
    kept = Value(input.shape, {a: v for a, v in input.axes.items() if a != args[0] % input.ndim}, input.zero, input.why)
    return walk.make(node, kept.axes, kept.zero, kept.why)


# -- sizes --------------------------------------------------------------------------------------------------------------------


def _flat(args: Sequence[Any]) -> list[Any]:
    return list(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else list(args)


def _view_sizes(slim: Any, node: fx.Node) -> None:
    name = "size" if "size" in node.kwargs else "shape"
    if name in node.kwargs:
        node.kwargs = {**node.kwargs, name: slim.sizes(node, node.kwargs[name])}
    else:
        node.args = (node.args[0], *slim.sizes(node, _flat(node.args[1:]))) if node.op == "call_method" else (node.args[0], slim.sizes(node, _flat(node.args[1:])))


@named("view", "reshape", "_unsafe_view", rewrite=_view_sizes, inplace=False)
def view(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], torch.dtype):
        return walk.opaque(node, [input], "its bits are read as another dtype")
    shape = node.meta["val"].shape
    quick = _same_places(input, shape)
    if quick is not None:
        return walk.make(node, {quick[a]: v for a, v in input.axes.items()}, [quick[a] for a in input.zero], input.why)
    return walk.move(node, input, lambda labels: labels.reshape(shape))


def _same_places(x: Value, shape: Sequence[int]) -> dict[int, int] | None:
    """Where each labelled axis of ``x`` lies in ``shape``, if the view leaves every one of them whole."""
    places = {}
    for axis in x.axes:
        before, size = math.prod(x.shape[:axis]), x.shape[axis]
        run = 1
        for place, extent in enumerate(shape):
            if run == before and extent == size:
                places[axis] = place
                break
            run *= extent
        else:
            return None
    return places


@named("view_as", "reshape_as", inplace=False)
def view_as(walk: Walk, node: fx.Node, input: Value, other: Value) -> Any:
    moved = walk.move(node, input, lambda labels: labels.reshape(node.meta["val"].shape))
    axes, _ = walk.combine(moved.shape, [moved, other])
    return walk.make(node, axes, [a for a in moved.zero if a in axes], input.why)


def _unflatten_sizes(slim: Any, node: fx.Node) -> None:
    x = slim.value(slim.argument(node, 0, "input"))
    sizes = slim.argument(node, 2, "sizes" if "sizes" in node.kwargs else "unflattened_size")
    name = "sizes" if "sizes" in node.kwargs else "unflattened_size"
    slim.set_argument(node, 2, name, slim.sizes(node, sizes, slim.argument(node, 1, "dim") % x.ndim))


@named("unflatten", rewrite=_unflatten_sizes, inplace=False)
def unflatten(walk: Walk, node: fx.Node, input: Value, *_: Any, **__: Any) -> Any:
    return view(walk, node, input)


@modules(nn.Unflatten)
def unflatten_module(walk: Walk, node: fx.Node, module: nn.Module, input: Value) -> Any:
    return view(walk, node, input)


def _expand_sizes(slim: Any, node: fx.Node) -> None:
    _view_sizes(slim, node)


@named("expand", "broadcast_to", rewrite=_expand_sizes, inplace=False)
def expand(walk: Walk, node: fx.Node, input: Value, *_: Any, **__: Any) -> Any:
    """An axis that is expanded gets labels of its own: its size can follow whatever it meets."""
    shape = tuple(node.meta["val"].shape)
    shift = len(shape) - input.ndim
    axes = {a + shift: v for a, v in input.axes.items()}
    for axis, size in enumerate(shape):
        if size > 1 and (axis < shift or input.shape[axis - shift] == 1):
            axes[axis] = walk.fresh("expand", size, soft=True)
    return walk.make(node, axes, [a + shift for a in input.zero], input.why)


@named("expand_as", inplace=False)
def expand_as(walk: Walk, node: fx.Node, input: Value, other: Value) -> Any:
    axes, _ = walk.combine(other.shape, [input, other])
    return walk.make(node, axes, [a for a in axes if a - other.ndim + input.ndim in input.zero], input.why)


def _repeats(slim: Any, node: fx.Node) -> None:
    x, out = slim.value(node.args[0]), slim.value(node)
    times = _flat(node.args[1:]) if len(node.args) > 1 else list(node.kwargs.get("dims", node.kwargs.get("repeats", ())))
    shift = out.ndim - x.ndim
    new = [slim.count(out, a) if slim.kept(out, a) is not None and (a < shift or x.shape[a - shift] == 1) else t for a, t in enumerate([1] * (out.ndim - len(times)) + times)]
    node.args, node.kwargs = (node.args[0], tuple(new)), {}


@named("repeat", "tile", rewrite=_repeats, inplace=False)
def repeat(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    moved = walk.move(node, input, lambda labels: labels.expand(input.shape).repeat(*_padded(input, args, kwargs)))
    shift = moved.ndim - input.ndim
    axes = dict(moved.axes)
    for axis, size in enumerate(moved.shape):
        if size > 1 and axis not in axes and (axis < shift or input.shape[axis - shift] == 1):
            axes[axis] = walk.fresh("repeat", size, soft=True)
    return walk.make(node, axes, moved.zero, input.why)


def _padded(x: Value, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
    times = _flat(args) if args else list(kwargs.get("dims", kwargs.get("repeats", ())))
    return [1] * (x.ndim - len(times)) + list(times)


@named("repeat_interleave", inplace=False)
def repeat_interleave(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    if any(True for _ in values((args, kwargs))):
        return walk.opaque(node, [input, *values((args, kwargs))], "it is repeated a different number of times per index")
    return _moved(walk, node, input, *args, **kwargs)


# -- several tensors ----------------------------------------------------------------------------------------------------------


@named("cat", "concat", "concatenate", inplace=False)
def cat(walk: Walk, node: fx.Node, tensors: Sequence[Value], dim: int = 0, **kwargs: Any) -> Value:
    parts = [t for t in tensors if t.shape != (0,)]
    return _joined(walk, node, parts, kwargs.get("axis", dim) % parts[0].ndim)


def _joined(walk: Walk, node: fx.Node, parts: Sequence[Value], dim: int) -> Value:
    axes: dict[int, Vector] = {}
    zero: set[int] = set()
    for axis in {a for p in parts for a in p.axes} - {dim}:
        bare = next((p for p in parts if axis not in p.axes), None)
        having = [p for p in parts if axis in p.axes]
        if bare is not None:
            for part in having:
                walk.clash(part.axes[axis], bare)
                walk.pin(part.axes[axis], f"it is concatenated with a tensor of fixed size ({bare.why})")
            continue
        first = next((p.axes[axis] for p in having if not walk.is_soft(p.axes[axis])), having[0].axes[axis])
        for part in having:
            walk.unite(first, part.axes[axis])
        axes[axis] = first
        if all(axis in p.zero for p in parts):
            zero.add(axis)
    if any(dim in p.axes for p in parts):
        pieces = []
        for part in parts:
            piece = part.axes.get(dim)
            if piece is None:
                piece = walk.fresh("cat", part.shape[dim])
                walk.pin(piece, f"it is a part of fixed size ({part.why})")
            pieces.append(piece)
        axes[dim] = np.concatenate(pieces)
        if all(dim in p.zero for p in parts):
            zero.add(dim)
    return walk.make(node, axes, zero, parts[0].why)


@named("stack", inplace=False)
def stack(walk: Walk, node: fx.Node, tensors: Sequence[Value], dim: int = 0, **_: Any) -> Value:
    place = dim % (tensors[0].ndim + 1)
    shifted = [
        Value((*t.shape[:place], 1, *t.shape[place:]), {a + (a >= place): v for a, v in t.axes.items()}, frozenset(a + (a >= place) for a in t.zero), t.why)
        for t in tensors
    ]  # fmt: skip
    return _joined(walk, node, shifted, place)


@functions(torch.broadcast_tensors)
def broadcast_tensors(walk: Walk, node: fx.Node, *tensors: Value) -> Any:
    shape = tuple(node.meta["val"][0].shape)
    axes, _ = walk.combine(shape, tensors)
    return tuple(walk.make(node, axes, (), t.why, i) for i, t in enumerate(tensors))


# -- parts of a tensor --------------------------------------------------------------------------------------------------------


def _split_sizes(slim: Any, node: fx.Node) -> None:
    """Each part's new size: parts of one tensor may lose different numbers of channels, whatever split them."""
    x = slim.value(slim.argument(node, 0, "tensor" if "tensor" in node.kwargs else "input"))
    dim = slim.argument(node, 2, "dim", 0) % x.ndim
    if slim.kept(x, dim) is None:
        return
    parts = [slim.count(part, dim) for part in slim.value(node)]
    node.args, node.kwargs = (slim.argument(node, 0, "input"), parts), {"dim": dim}
    if node.op == "call_method":
        node.target = "split"
    else:
        node.target = torch.split


@named("split", "chunk", "split_with_sizes", "tensor_split", rewrite=_split_sizes, inplace=False)
@functions(torch.functional.split)
def split(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % input.ndim
    if dim in input.axes:
        return _moved(walk, node, input, *args, **kwargs)
    return tuple(walk.make(node, input.axes, input.zero, input.why, i) for i in range(len(node.meta["val"])))


def _narrow(slim: Any, node: fx.Node) -> None:
    x = slim.value(slim.argument(node, 0, "input"))
    dim = slim.argument(node, 1, "dim") % x.ndim
    start, length = (slim.number(slim.argument(node, i, n)) for i, n in ((2, "start"), (3, "length")))
    kept = slim.kept(x, dim)
    if kept is not None:
        start = start % x.shape[dim]
        slim.set_argument(node, 2, "start", int((kept < start).sum()))
        slim.set_argument(node, 3, "length", int(((kept >= start) & (kept < start + length)).sum()))


named("narrow", rewrite=_narrow, inplace=False)(move)


def _select(slim: Any, node: fx.Node) -> None:
    x = slim.value(slim.argument(node, 0, "input"))
    dim = slim.argument(node, 1, "dim") % x.ndim
    kept = slim.kept(x, dim)
    if kept is not None:
        slim.set_argument(node, 2, "index", int((kept < slim.number(slim.argument(node, 2, "index")) % x.shape[dim]).sum()))


named("select", rewrite=_select, inplace=False)(move)


def _roll(slim: Any, node: fx.Node) -> None:
    """Rolling by s moves the last s indices to the front; of those, the kept ones count."""
    x = slim.value(slim.argument(node, 0, "input"))
    shifts, dims = slim.argument(node, 1, "shifts"), slim.argument(node, 2, "dims", None)
    if dims is None:
        return
    many = isinstance(dims, (tuple, list))
    new = []
    for shift, dim in zip(shifts, dims, strict=True) if many else [(shifts, dims)]:
        kept, size = slim.kept(x, dim % x.ndim), x.shape[dim]
        new.append(shift if kept is None else int((kept >= size - slim.number(shift) % size).sum()))
    slim.set_argument(node, 1, "shifts", tuple(new) if many else new[0])


@named("roll", rewrite=_roll, inplace=False)
def roll(walk: Walk, node: fx.Node, input: Value, shifts: Any, dims: Any = None) -> Any:
    if dims is None:
        walk.pin_all(input, "it is rolled as one flat row")
        return walk.make(node, {}, (), input.why)
    rolled = {d % input.ndim for d in (dims if isinstance(dims, (tuple, list)) else (dims,))}
    if not rolled & set(input.axes):
        return walk.make(node, input.axes, input.zero, input.why)
    return _moved(walk, node, input, shifts, dims)


def _pads(slim: Any, node: fx.Node) -> None:
    """Padded positions have labels of their own; the new amount is how many of them are kept."""
    x, out = slim.value(slim.argument(node, 0, "input")), slim.value(node)
    pad = list(slim.argument(node, 1, "pad"))
    for i in range(0, len(pad), 2):
        axis = x.ndim - 1 - i // 2
        kept_in, kept_out = slim.kept(x, axis), slim.kept(out, axis)
        if kept_in is None and kept_out is None:
            continue
        before, after = slim.number(pad[i]), slim.number(pad[i + 1])
        kept_out = np.arange(out.shape[axis]) if kept_out is None else kept_out
        kept_in = np.arange(x.shape[axis]) if kept_in is None else kept_in
        pad[i] = int((kept_out < before).sum()) if before > 0 else -int((kept_in < -before).sum())
        pad[i + 1] = int((kept_out >= out.shape[axis] - after).sum()) if after > 0 else -int((kept_in >= x.shape[axis] + after).sum())
    slim.set_argument(node, 1, "pad", pad)


@functions(F.pad, torch._C._nn.pad, torch.constant_pad_nd, rewrite=_pads)
def pad(walk: Walk, node: fx.Node, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    return _padded_value(walk, node, input, list(pad), mode, value)


@modules(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
         nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)  # fmt: skip
def pad_module(walk: Walk, node: fx.Node, module: Any, input: Value) -> Any:
    """Modules pad space; one that reaches into the channels would need its amounts rewritten, so those channels stay."""
    return walk.through(node, input, mixed=[input.ndim - 1 - i // 2 for i in range(0, len(module.padding), 2) if module.padding[i] or module.padding[i + 1]])


def _padded_value(walk: Walk, node: fx.Node, x: Value, pad: list[int], mode: str, value: float | None) -> Value:
    axes = dict(x.axes)
    zero = set(x.zero)
    for i in range(0, len(pad), 2):
        axis = x.ndim - 1 - i // 2
        before, after = pad[i], pad[i + 1]
        if axis not in axes or (before, after) == (0, 0):
            continue
        if mode != "constant":
            walk.pin(axes.pop(axis), f"it is padded in {mode} mode")
            continue
        vector = axes[axis][max(0, -before) : len(axes[axis]) + min(0, after)]
        axes[axis] = np.concatenate([walk.fresh("before", max(0, before)), vector, walk.fresh("after", max(0, after))])
        if value:
            zero.discard(axis)
    return walk.make(node, axes, zero, x.why)


# -- indexing -----------------------------------------------------------------------------------------------------------------


def _entries(index: Any, ndim: int) -> list[Any]:
    """The index as a list with the ellipsis written out: one entry per axis of the tensor, and a None per new axis."""
    parts = list(index) if isinstance(index, tuple) else [index]
    used = sum(1 for p in parts if p is not None and p is not Ellipsis)
    spare = [slice(None)] * (ndim - used)
    if any(p is Ellipsis for p in parts):
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        return [*parts[:at], *spare, *parts[at + 1 :]]
    return [*parts, *spare]


@functions(operator.getitem)
def getitem(walk: Walk, node: fx.Node, input: Any, index: Any) -> Any:
    if not isinstance(input, Value):
        return input[index]
    raw = list(node.args[1]) if isinstance(node.args[1], (tuple, list)) and isinstance(index, (tuple, list)) else [node.args[1]]
    indexed = _resolved(walk, node, input, index, raw)
    if indexed is None:
        return walk.opaque(node, [input, *values(index)], "it is indexed by values the graph computes")
    return walk.move(node, input, lambda labels: labels[indexed])


def _resolved(walk: Walk, node: fx.Node, x: Value, index: Any, raw: Sequence[Any]) -> Any:
    """The index with every tensor in it replaced by its actual values, or by zeros where it picks along an axis without labels."""
    parts = list(index) if isinstance(index, (tuple, list)) and (isinstance(index, tuple) or any(isinstance(i, (Value, slice)) for i in index)) else [index]
    if len(parts) != len(raw):
        raw = [node.args[1]]
    axis = 0
    done: list[Any] = []
    spread = x.ndim - sum(1 for p in parts if p is not None and p is not Ellipsis)
    for part, source in zip(parts, raw, strict=True):
        if part is Ellipsis:
            axis += spread
        elif isinstance(part, Value):
            actual = walk.real(source)
            if actual is None:
                if axis in x.axes:
                    return None
                actual = torch.zeros(part.shape, dtype=torch.long)
            if actual.dtype == torch.bool:
                return None
            part = actual.cpu()
            axis += 1
        elif part is not None:
            axis += 1
        done.append(part)
    return tuple(done) if isinstance(index, tuple) or len(done) > 1 else done[0]


def rewrite_getitem(slim: Any, node: fx.Node) -> None:
    x = slim.value(node.args[0])
    if not isinstance(x, Value) or not any(slim.kept(x, a) is not None for a in x.axes):
        return
    index = node.args[1]
    many = isinstance(index, tuple)
    entries = _entries(index if many else (index,), x.ndim)
    axis = -1
    for i, entry in enumerate(entries):
        if entry is None:
            continue
        axis += 1
        kept = slim.kept(x, axis)
        if kept is None or (isinstance(entry, slice) and entry == slice(None)):
            continue
        entries[i] = _kept_entry(slim, node, entry, kept, x.shape[axis])
    while entries and isinstance(entries[-1], slice) and entries[-1] == slice(None) and len(entries) > 1:
        entries.pop()
    node.args = (node.args[0], tuple(entries))


named("__getitem__", rewrite=rewrite_getitem, inplace=False)(getitem)
functions(operator.getitem, rewrite=rewrite_getitem)(getitem)


def _kept_entry(slim: Any, node: fx.Node, entry: Any, kept: Vector, size: int) -> Any:
    """One entry of an index, in terms of the kept channels of its axis."""
    if isinstance(entry, slice):
        bounds = slice(*(None if b is None else slim.number(b) for b in (entry.start, entry.stop, entry.step)))
        start, stop, step = bounds.indices(size)
        if step == 1:
            low = int((kept < start).sum())
            return slice(low or None, None if stop >= size else int((kept < max(start, stop)).sum()))
        chosen = np.arange(size)[bounds]
        return np.searchsorted(kept, chosen[np.isin(chosen, kept)]).tolist()
    if isinstance(entry, int):
        return int((kept < entry % size).sum())
    if isinstance(entry, (list, tuple)):
        chosen = np.asarray(entry) % size
        return np.searchsorted(kept, chosen[np.isin(chosen, kept)]).tolist()
    return slim.renumbered(node, entry, kept, size)


def _index_select(slim: Any, node: fx.Node) -> None:
    x = slim.value(slim.argument(node, 0, "input"))
    kept = slim.kept(x, slim.argument(node, 1, "dim") % x.ndim)
    if kept is not None:
        slim.set_argument(node, 2, "index", slim.renumbered(node, slim.argument(node, 2, "index"), kept, x.shape[slim.argument(node, 1, "dim")]))


@named("index_select", rewrite=_index_select, inplace=False)
def index_select(walk: Walk, node: fx.Node, input: Value, dim: int, index: Value) -> Any:
    axis = dim % input.ndim
    if axis not in input.axes:
        return walk.make(node, input.axes, input.zero, input.why)
    actual = walk.real(node.args[2] if len(node.args) > 2 else node.kwargs["index"])
    if actual is None:
        return walk.opaque(node, [input, index], "it is indexed by values the graph computes")
    return walk.move(node, input, lambda labels: labels.index_select(axis, actual.cpu()))


@named("gather", "take_along_dim", inplace=False)
def gather(walk: Walk, node: fx.Node, input: Value, *args: Any, **kwargs: Any) -> Any:
    return walk.opaque(node, [input, *values((args, kwargs))], "it is gathered by values the graph computes")


@functions(operator.setitem)
def setitem(walk: Walk, node: fx.Node, target: Value, index: Any, value: Any) -> Any:
    """``target[index] = value``: sound where the index leaves every labelled axis whole; otherwise the channels stay."""
    entries = _entries(index if isinstance(index, tuple) else (index,), target.ndim)
    written = values((index, value))
    plain = all(isinstance(e, (slice, int)) for e in entries)
    touched = [e for a, e in enumerate(entries) if a in target.axes] if plain else []
    if plain and all(isinstance(e, slice) and e == slice(None) for e in touched):
        gone = [a for a, e in enumerate(entries) if isinstance(e, int)]
        inner = {a - sum(g < a for g in gone): v for a, v in target.axes.items()}
        shape = tuple(len(range(n)[e]) for n, e in zip(target.shape, entries, strict=True) if isinstance(e, slice))
        walk.combine(shape, [Value(shape, inner, frozenset(), target.why), *(v for v in (value,) if isinstance(v, Value))])
        return None
    for found in (target, *written):
        walk.pin_all(found, "a part of it is assigned to")
    return None


# -- tensors made by the graph ------------------------------------------------------------------------------------------------


def _factory_sizes(slim: Any, node: fx.Node) -> None:
    if node.op == "call_method":
        node.args = (node.args[0], slim.sizes(node, _flat(node.args[1:]) if len(node.args) > 1 else list(node.kwargs["size"])), *_rest(node.args[1:]))
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "size"}
        return
    if "size" in node.kwargs:
        node.kwargs = {**node.kwargs, "size": slim.sizes(node, node.kwargs["size"])}
        return
    node.args = (slim.sizes(node, _flat(node.args) if not isinstance(node.args[0], (tuple, list)) else node.args[0]), *_rest(node.args))


def _rest(args: Sequence[Any]) -> Sequence[Any]:
    return args[1:] if args and isinstance(args[0], (tuple, list)) else ()


@functions(torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn, torch.full, rewrite=_factory_sizes)
def factory(walk: Walk, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Every axis gets labels of its own: its size can follow whatever it meets."""
    shape = tuple(node.meta["val"].shape)
    axes = {a: walk.fresh("factory", n, soft=True) for a, n in enumerate(shape) if n > 1}
    return walk.make(node, axes, axes if node.target is torch.zeros else (), f"it is made by {walk.op_name()}")


for _name in ("new_zeros", "new_ones", "new_empty", "new_full"):
    named(_name, rewrite=_factory_sizes, inplace=False)(lambda walk, node, *args, **kwargs: factory(walk, node))


@functions(torch.arange, torch.linspace, torch.eye, torch.randint, torch.randperm, torch.tensor, torch.tril_indices, torch.triu_indices, torch.normal)
def positions(walk: Walk, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Their values depend on where they stand, so their sizes stay."""
    return walk.make(node, {}, (), f"it is made by {walk.op_name()}")


def _size_read(slim: Any, node: fx.Node) -> None:
    """Reads of a pruned axis are answered with its original size while the graph is copied (see ``slim``)."""


@named("size", rewrite=_size_read, inplace=False)
def size(walk: Walk, node: fx.Node, input: Value, *_: Any) -> Any:
    return node.meta["val"]


@functions(torch._assert)
def assertion(walk: Walk, node: fx.Node, *_: Any, **__: Any) -> Any:
    return None
