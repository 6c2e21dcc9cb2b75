"""Result shapes of common modules and functions by arithmetic: torch's own are partly Python and cost a hundred times as much."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from fxprune.passes.compat import DropoutNd, pack_padded, pad_packed
from fxprune.passes.ir.nested import packed
from fxprune.passes.rules.computing import pointwise
from fxprune.passes.rules.layer_specs import SPECS, spec_of

_SAME_EXACT = frozenset(pointwise.MODULES)
_SAME_FUNCTIONS = frozenset(
    {F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.dropout, F.leaky_relu, torch.relu, torch.sigmoid, torch.tanh}
)
_SAME_METHODS = frozenset({"relu", "sigmoid", "tanh", "contiguous"})
_BINARY = frozenset({operator.add, operator.mul, operator.sub, operator.truediv, torch.add, torch.mul, torch.sub, torch.div})
_AUGMENTED = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv})
_FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


def quick(module: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
    """What ``module(*args)`` would give, as a meta tensor; None where it has to be run to be known."""
    if len(args) != 1 or not isinstance(args[0], torch.Tensor):
        return None
    x = args[0]
    kind = type(module)
    if kind in _SAME_EXACT:
        return x if getattr(module, "inplace", False) or _hands_on(module) else _like(x)
    spec = spec_of(module)
    if spec is None or spec.shape is None or (spec.produces and kind not in SPECS):  # a subclass may compute something else
        return None
    found: torch.Tensor | None = spec.shape(module, args)
    return found


def _hands_on(module: Any) -> bool:
    """Whether a module returns the very tensor that it is given: what is written into one is written into the other."""
    idle = isinstance(module, DropoutNd) and (not module.training or module.p == 0)
    return idle or isinstance(module, nn.Identity)


def recurrent(module: Any, args: tuple[Any, ...]) -> tuple[Any, Any] | None:
    """What a recurrent layer gives, from one step: on meta torch unrolls every step in Python. None for other calls."""
    x = args[0] if args else None
    if isinstance(module, nn.RNNBase) and isinstance(x, PackedSequence):
        out, state = module.forward(x.data.unsqueeze(0 if module.batch_first else 1)[:1, :1])
        sequences = x.data.shape[0] // x.batch_sizes.shape[0]
        states = [s.new_empty(s.shape[0], sequences, s.shape[2]) for s in (state if isinstance(state, tuple) else (state,))]
        made = packed(x.data.new_empty(x.data.shape[0], out.shape[-1]), *x[1:])
        return made, tuple(states) if isinstance(state, tuple) else states[0]
    if not isinstance(module, nn.RNNBase) or not isinstance(x, torch.Tensor) or x.ndim not in (2, 3):
        return None
    time = 1 if module.batch_first and x.ndim == 3 else 0
    if x.shape[time] < 2:
        return None
    out, state = module.forward(x.narrow(time, 0, 1), *args[1:])
    return out.new_empty([x.shape[a] if a == time else size for a, size in enumerate(out.shape)]), state


def _pack(x: torch.Tensor, lengths: Any, batch_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As long as it can be: the lengths are values, and those of the example say nothing about the next."""
    steps = x.shape[1 if batch_first else 0]
    return x.new_empty(x.shape[0] * x.shape[1], *x.shape[2:]), x.new_empty(steps, dtype=torch.int64)


def _unpack(
    data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, padding: float, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = data.shape[0] // batch_sizes.shape[0]
    shape = (sequences, steps) if batch_first else (steps, sequences)
    return data.new_empty(*shape, *data.shape[1:]), data.new_empty(sequences, dtype=torch.int64)


def _waves(
    input: torch.Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: torch.Tensor | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> torch.Tensor:
    """An inverse short-time Fourier transform, which looks at the values of its window and so has no kernel on meta."""
    whole = n_fft + (n_fft // 4 if hop_length is None else hop_length) * (input.shape[-1] - 1)
    found = length if length is not None else whole - 2 * (n_fft // 2) if center else whole
    return input.new_empty(*input.shape[:-2], found, dtype=input.dtype if return_complex else input.dtype.to_real())


def _counts(input: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor | None:
    """How often each number stands in ``input``: as many as the code asks for, which has to be more than the largest. torch has no meta
    kernel for it."""
    dtype = torch.int64 if weights is None else weights.dtype if weights.dtype == torch.float32 else torch.float64
    return input.new_empty(minlength, dtype=dtype) if minlength > 0 else None


_MADE: dict[Any, Any] = {
    **dict.fromkeys((torch.istft, "istft"), _waves),
    **dict.fromkeys((torch.bincount, "bincount"), _counts),
    pack_padded: _pack,
    pad_packed: _unpack,
}


def _rows(a: Any = None, b: Any = None, **named: Any) -> torch.Tensor | None:
    """``grouped_mm`` (S, K) by (E, K, N), which on meta takes bfloat16 alone; other forms are left to torch."""
    a, b = named.get("self", named.get("mat_a", a)), named.get("mat2", named.get("mat_b", b))
    return a.new_empty(a.shape[0], b.shape[2]) if a.ndim == 2 and b.ndim == 3 and a.shape[1] == b.shape[1] else None


_GROUPED = [f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None]


def quick_function(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function or a method (by name) would give, as a meta tensor; None where it has to be run to be known."""
    if target is torch.cat:
        return _joined(args, kwargs)
    if target in _MADE:
        return _MADE[target](*args, **kwargs)
    if target in _GROUPED:
        return _rows(*args[:2], **{k: v for k, v in kwargs.items() if k in ("self", "mat_a", "mat2", "mat_b")})
    if not args or not isinstance(args[0], torch.Tensor) or args[0].dtype not in _FLOATS:
        return None
    x = args[0]
    if target in _SAME_FUNCTIONS or target in _SAME_METHODS:
        unchanged = len(args) == 1 and not (kwargs.keys() - {"inplace", "p", "training"})
        if not unchanged or target == "contiguous":
            return x if unchanged and x.is_contiguous() else None
        idle = target is F.dropout and (kwargs.get("training") is False or kwargs.get("p") == 0)
        return x if kwargs.get("inplace") is True or idle else _like(x)
    if target in _AUGMENTED and len(args) == 2 and (isinstance(args[1], (int, float)) or _fits(args[1], x)):
        return x
    if target in _BINARY and len(args) == 2 and not kwargs:
        other = args[1]
        if isinstance(other, (int, float)):
            return _like(x)
        if isinstance(other, torch.Tensor) and other.dtype == x.dtype and x.ndim == other.ndim:
            return _broadcast(x, other)
    return None


def _fits(other: Any, x: torch.Tensor) -> bool:
    """Whether ``other`` can be worked into ``x`` as it is: no dimension that x lacks, no other dtype."""
    if not isinstance(other, torch.Tensor) or other.dtype != x.dtype or other.ndim > x.ndim:
        return False
    return all(a in (1, b) for a, b in zip(reversed(other.shape), reversed(x.shape), strict=False))


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if x.is_contiguous() else torch.empty_like(x)


def _broadcast(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """The result of two contiguous tensors of equally many dimensions; layouts that mix are left to torch."""
    if not (x.is_contiguous() and other.is_contiguous()):
        return None
    pairs = list(zip(x.shape, other.shape, strict=True))
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        return None
    return torch.empty([b if a == 1 else a for a, b in pairs], dtype=x.dtype, device="meta")


def _joined(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    if len(args) not in (1, 2) or kwargs.keys() - {"dim"} or not isinstance(args[0], (list, tuple)) or not args[0]:
        return None
    parts, dim = args[0], args[1] if len(args) == 2 else kwargs.get("dim", 0)
    first = parts[0]
    if not isinstance(dim, int) or not all(isinstance(p, torch.Tensor) for p in parts) or not -first.ndim <= dim < first.ndim:
        return None
    dim %= first.ndim
    rest = [*first.shape[:dim], *first.shape[dim + 1 :]]
    for part in parts:
        if part.dtype != first.dtype or part.ndim != first.ndim or not part.is_contiguous():
            return None
        if [*part.shape[:dim], *part.shape[dim + 1 :]] != rest:
            return None
    return torch.empty([*first.shape[:dim], sum(p.shape[dim] for p in parts), *first.shape[dim + 1 :]], dtype=first.dtype, device="meta")
