"""ATen operators, as ``torch.export`` and ``make_fx`` leave them, as the torch functions that they are.

While a graph is traced each operator is written as the function or method it comes from: ``aten.conv2d.default`` as ``F.conv2d``,
``aten.sym_size.int`` as ``x.size(i)``. torch parses both by one schema, so nothing is computed differently, and one set of rules serves
every front end. An operator whose function has no rule stays what it is: it locks what it touches, under its own name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxprune.passes.compat import assert_true
from fxprune.passes.ir.nodes import RESHAPING
from fxprune.passes.rules.registry import FUNCTIONS, METHODS

_LAST = (1 << 63) - 1  # the end of a slice that goes to the end


class Absent:
    """A result that only a backward pass reads (saved statistics, random state): nothing may use it here."""


def _conv(x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int) -> Any:
    space = w.dim() - 2
    if transposed:
        return getattr(F, f"conv_transpose{space}d")(x, w, b, stride, padding, output_padding, groups, dilation)
    return getattr(F, f"conv{space}d")(x, w, b, stride, padding, dilation, groups)


def _batch_norm(x: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float) -> Any:
    return torch.batch_norm(x, w, b, mean, var, training, momentum, eps, torch.backends.cudnn.enabled), Absent(), Absent()


def _batch_norm_inference(x: Any, w: Any, b: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    return _batch_norm(x, w, b, mean, var, False, momentum, eps)


def _batch_norm_functional(x: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float) -> Any:
    """The running statistics it would have written are results; the graph copies them into the buffers itself."""
    mean, var = mean.clone(), var.clone()
    return *_batch_norm(x, w, b, mean, var, training, momentum, eps), mean, var


def _batch_norm_stateless(x: Any, w: Any, b: Any, training: bool, momentum: float, eps: float) -> Any:
    return _batch_norm(x, w, b, None, None, training, momentum, eps)


def _instance_norm(x: Any, w: Any, b: Any, mean: Any, var: Any, use_input: bool, momentum: float, eps: float, cudnn: bool) -> Any:
    return F.instance_norm(x, mean, var, w, b, use_input, momentum, eps)


def _embedding(weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False) -> Any:
    padding = None if padding_idx == -1 else padding_idx
    return F.embedding(indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    # By type: a size that the graph computes is not to be compared with anything here.
    start = None if type(start) is int and start == 0 else start
    end = None if type(end) is int and end == _LAST else end
    return x if start is None and end is None and step == 1 else x[_place(x, dim, slice(start, end, None if step == 1 else step))]


def _place(x: Any, dim: int, part: Any) -> tuple[Any, ...]:
    return (*(slice(None),) * (dim % x.dim()), part)


def _slice_scatter(x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    made = x.clone()
    made[_place(x, dim, slice(start, end, step))] = source
    return made


def _select_scatter(x: Any, source: Any, dim: int, index: Any) -> Any:
    made = x.clone()
    made[_place(x, dim, index)] = source
    return made


def _index(x: Any, indices: Sequence[Any]) -> Any:
    return x[tuple(slice(None) if i is None else i for i in indices)]


def _index_put(x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Any:
    return _index_put_(x.clone(), indices, values)


def _index_put_(x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Any:
    x[tuple(slice(None) if i is None else i for i in indices)] = values
    return x


def _to(x: Any, dtype: Any = None, device: Any = None, non_blocking: bool = False, copy: bool = False, **rest: Any) -> Any:
    given = {"dtype": dtype, "device": device, "non_blocking": non_blocking or None, "copy": copy or None}
    return x.to(**{k: v for k, v in (given | {"memory_format": rest.get("memory_format")}).items() if v is not None})


def _to_copy(x: Any, **options: Any) -> Any:
    return _to(x, **{**options, "copy": True})


def _assert_scalar(condition: Any, message: str) -> None:
    assert_true(condition, message)


def _nothing(*_: Any, **__: Any) -> None:
    """A check that holds by construction: dtypes are converted and sizes computed by nodes that stay in the graph."""


def _same(x: Any) -> Any:
    return x


# Operators that are called differently from the function they are, by name (and overload); all others are called as they stand.
_DIFFERENT: dict[str, Callable[..., Any]] = {
    "sym_size": lambda x, dim: x.size(dim),
    "sym_numel": lambda x: x.numel(),
    "item": lambda x: x.item(),
    "_local_scalar_dense": lambda x: x.item(),
    "convolution": _conv,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit.no_stats": _batch_norm_stateless,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm_inference,
    "_native_batch_norm_legit_functional": _batch_norm_functional,
    "native_layer_norm": lambda x, shape, w, b, eps: (F.layer_norm(x, shape, w, b, eps), Absent(), Absent()),
    "native_group_norm": lambda x, w, b, n, c, size, groups, eps: (F.group_norm(x, groups, w, b, eps), Absent(), Absent()),
    "native_dropout": lambda x, p, train: (F.dropout(x, p, bool(train)), Absent()),
    "instance_norm": _instance_norm,
    "embedding": _embedding,
    "slice": _slice,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "copy": lambda x, source, non_blocking=False: x.clone().copy_(source),
    "index": _index,
    "index_put": _index_put,
    "index_put_": _index_put_,
    "to": lambda x, *args, **kwargs: x.to(*args, **kwargs) if args else _to(x, **kwargs),
    "_to_copy": _to_copy,
    "_softmax": lambda x, dim, half: torch.softmax(x, dim),
    "_log_softmax": lambda x, dim, half: torch.log_softmax(x, dim),
    # A view that was one stays one; where narrower channels give another memory order (fused attention's), it may have to be a copy.
    "view.default": lambda x, size: x.reshape(size),
    "_unsafe_view": lambda x, size: x.reshape(size),
    "constant_pad_nd": lambda x, pad, value=0: F.pad(x, pad, "constant", value),
    "einsum": lambda equation, tensors, path=None: torch.einsum(equation, *tensors),
    "mT": lambda x: x.mT,
    "mH": lambda x: x.mH,
    "numpy_T": lambda x: x.T,
    "unsafe_split": lambda x, size, dim=0: x.split(size, dim),
    "split": lambda x, size, dim=0: x.split(size, dim),
    "expand": lambda x, size, implicit=False: x.expand(size),
    "im2col": F.unfold,
    "col2im": F.fold,
    "_adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "_adaptive_avg_pool3d": F.adaptive_avg_pool3d,
    "alias": _same,
    "lift_fresh": _same,
    "lift_fresh_copy": lambda x: x.clone(),
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "_assert_scalar": _assert_scalar,
    "_assert_tensor_metadata": _nothing,
    "sym_constrain_range": _nothing,
    "sym_constrain_range_for_size": _nothing,
}
# Arguments, by position, under which an operator is more than the function: half in and float out, duplicates summed.
_ONLY_WITHOUT = {"_softmax": 2, "_log_softmax": 2, "index_put": 3, "index_put_": 3}
# Built-in functions parse their arguments by the operator's own schema; Python ones of the same name may not.
_BUILT_IN = {
    name: function
    for function in FUNCTIONS
    if isinstance(function, type(torch.relu)) and (name := function.__name__) and function.__module__ != "_operator"
}


def positional(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as the schema orders them: what may be given by position is, the others by name."""
    rest, made = dict(kwargs), list(args)
    formal = [a for a in op._schema.arguments if not a.kwarg_only]
    for i, argument in enumerate(formal[len(args) :], len(args)):
        if argument.name in rest:
            made.append(rest.pop(argument.name))
        elif any(later.name in rest for later in formal[i + 1 :]):
            made.append(argument.default_value)
        else:
            break
    return tuple(made), rest


def opened(op: Any, create: Callable[..., Any]) -> Callable[..., Any] | None:
    """What to call in place of an ATen operator, or None where it must stay: a rule of its own, or no function with a rule.

    ``create(kind, target, args, kwargs)`` records a node.
    """
    if op in FUNCTIONS or op.namespace != "aten":
        return None
    name = op._schema.name.removeprefix("aten::")
    body: Callable[..., Any] | None = _DIFFERENT.get(f"{name}.{op._overloadname}") or _DIFFERENT.get(name)
    plain = name[:-1] if name in RESHAPING else name  # the graph reads the result from there on
    if body is None and name in _BUILT_IN:
        function = _BUILT_IN[name]

        def body(*args: Any, **kwargs: Any) -> Any:
            return create("call_function", function, args, kwargs)
    elif body is None and name in METHODS:

        def body(*args: Any, **kwargs: Any) -> Any:
            return create("call_method", plain, args, kwargs)

    if body is None:
        return None
    found = body

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = positional(op, args, kwargs)
        if name in _ONLY_WITHOUT and len(args) > _ONLY_WITHOUT[name] and args[_ONLY_WITHOUT[name]]:
            return create("call_function", op, args, kwargs)
        return found(*args, **kwargs)

    return call
