"""LSTM, GRU and RNN: every layer and direction shares one hidden width, so hidden unit i goes from all of them at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence

from fxprune.passes.compat import pack_padded, pad_packed
from fxprune.passes.ir.nested import packed
from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Value, Vector
from fxprune.passes.rules.layer_specs import layers
from fxprune.passes.rules.protocols import Rewriter
from fxprune.passes.rules.registry import functions, modules


def _gates(module: Any) -> int:
    return {"LSTM": 4, "GRU": 3}.get(module.mode, 1)


def _resize(slim: Rewriter, module: Any, x: Value, y: Value) -> None:
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_ih_l0.shape[0] // _gates(module)
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]


layers(nn.RNNBase, resize=_resize)


@modules(nn.LSTM, nn.GRU, nn.RNN)
def recurrent(ctx: LabelContext, node: fx.Node, module: Any, input: Any, hx: Any = None) -> Any:
    """``input`` (..., features), maybe packed; weight_ih (gates * hidden, in), weight_hh (gates * hidden, hidden or projection)."""
    given, input = input, input.data if isinstance(input, PackedSequence) else input
    gates = _gates(module)
    hidden, projection = module.hidden_size, module.proj_size
    directions = 2 if module.bidirectional else 1
    cell = _units(ctx, node, "weight_hr_l0" if projection else "weight_hh_l0", 1, hidden)
    seen = _units(ctx, node, "weight_hr_l0", 0, projection) if projection else cell
    if projection:  # torch looks for a projection only where its size is not the hidden size, and misreads the weights where it is
        ctx.pin(cell, "with a projection the hidden size stays", ReasonKind.STRUCTURE)
    arriving = input.axes.get(input.ndim - 1)
    for layer in range(module.num_layers):
        for suffix in [f"l{layer}", f"l{layer}_reverse"][:directions]:
            _rows(ctx, node, f"weight_ih_{suffix}", cell, gates)
            _rows(ctx, node, f"weight_hh_{suffix}", cell, gates)
            for bias in ("bias_ih_", "bias_hh_"):
                _rows(ctx, node, bias + suffix, cell, gates)
            _columns(ctx, node, f"weight_hh_{suffix}", seen, None)
            if projection:
                _rows(ctx, node, f"weight_hr_{suffix}", seen, 1)
                _columns(ctx, node, f"weight_hr_{suffix}", cell, None)
            _columns(ctx, node, f"weight_ih_{suffix}", arriving, input.why)
        arriving = np.tile(seen, directions)
    for axis in range(input.ndim - 1):
        ctx.pin(input.axes.get(axis), "a recurrent layer runs along it")
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    for state, units in zip(states, (seen, cell), strict=False):
        if isinstance(state, Value):
            _state(ctx, state, units)
    steps = int(np.prod(input.shape[:-1]))
    for name in ("weight_ih_", "weight_hh_"):
        for layer in range(module.num_layers):
            for suffix in [f"l{layer}", f"l{layer}_reverse"][:directions]:
                weight = ctx.weight(node, name + suffix)
                assert weight is not None
                ctx.cost(str(node.target), steps * weight.shape[0] * weight.shape[1], *weight.axes.values())
    last = input.ndim - 1
    units = np.tile(seen, directions)
    axes = {last: units} if len(units) > 1 else {}
    out: Any = Value((*input.shape[:-1], len(units)), axes, frozenset(axes if hx is None else ()), ctx.origin())
    why, state_of = out.why, node.meta["val"][1]
    if isinstance(given, PackedSequence):
        out = packed(out, *given[1:])
    if module.mode != "LSTM":
        return out, Value(tuple(state_of.shape), {state_of.ndim - 1: seen}, frozenset(), why)
    return out, tuple(Value(tuple(t.shape), {t.ndim - 1: u}, frozenset(), why) for t, u in zip(state_of, (seen, cell), strict=True))


@functions(pack_padded)
def pack(ctx: LabelContext, node: fx.Node, input: Value, lengths: Any, batch_first: bool) -> Any:
    """``input`` (batch, time, channels) or (time, batch, channels) to (batch * time, channels)."""
    return _repacked(ctx, node, input, (0, 1), input.ndim - 2, True)


@functions(pad_packed)
def unpack(ctx: LabelContext, node: fx.Node, data: Value, batch_sizes: Value, batch_first: bool, padding: float, steps: Any) -> Any:
    return _repacked(ctx, node, data, (0,), data.ndim, padding == 0)


def _repacked(ctx: LabelContext, node: fx.Node, x: Value, ragged: tuple[int, ...], last: int, zero: bool) -> Any:
    for axis in ragged:
        ctx.pin(x.axes.get(axis), "a recurrent layer runs along it")
    axes = {last: x.axes[x.ndim - 1]} if x.ndim - 1 in x.axes else {}
    return ctx.make(node, axes, [last] if zero and x.ndim - 1 in x.zero else [], x.why, 0), ctx.make(node, {}, (), "", 1)


@functions(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
def cell(
    ctx: LabelContext, node: fx.Node, input: Value, hx: Any, w_ih: Value, w_hh: Value, b_ih: Value | None = None, b_hh: Value | None = None
) -> Any:
    """One step: ``input`` (..., features), states ``hx`` (..., hidden), w_ih (gates * hidden, features), w_hh (gates * hidden, hidden)."""
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    gates = w_hh.shape[0] // w_hh.shape[1]
    units = w_hh.axes.get(1)
    for weight in (w_ih, w_hh):
        ctx.read_as_weight(weight)
        ctx.cost(node.name, int(np.prod(input.shape[:-1])) * weight.shape[0] * weight.shape[1], *weight.axes.values())
    for part in (w_ih, w_hh, b_ih, b_hh):
        if part is None:
            continue
        if 0 not in part.axes:
            ctx.pin(units, "it meets a weight of fixed size", because=part.why)
        elif units is None:
            ctx.pin(part.axes[0], *_lone(w_hh))
        else:
            ctx.unite(part.axes[0], np.tile(units, gates))
    arriving = input.axes.get(input.ndim - 1)
    if arriving is None:
        ctx.pin(w_ih.axes.get(1), "the layer reads channels of fixed size", because=input.why)
    elif 1 in w_ih.axes:
        ctx.unite(w_ih.axes[1], arriving)
    else:
        ctx.pin(arriving, "it meets a weight of fixed size", because=w_ih.why)
    for axis in range(input.ndim - 1):
        ctx.pin(input.axes.get(axis), "a recurrent cell runs along it")
    for state in states:
        if units is not None:
            _state(ctx, state, units)
        else:
            ctx.pin(state.axes.get(state.ndim - 1), *_lone(w_hh))
    last = states[0].ndim - 1
    zero = {last} if all(last in s.zero for s in states) else set()  # gates of zero leave a state of zero where it is
    axes = {} if units is None else {last: units}
    if isinstance(node.meta["val"], torch.Tensor):
        return ctx.make(node, axes, zero)
    return tuple(ctx.make(node, axes, zero, "", i) for i in range(len(states)))


def _lone(w_hh: Value) -> tuple[str, ReasonKind | None, Reason | None]:
    """Why the units of a cell stay where the weight that goes from unit to unit has no channels."""
    if w_hh.shape[1] == 1:
        return "the cell has a single hidden unit", None, None
    return "it meets a weight of fixed size", None, w_hh.why


def _units(ctx: LabelContext, node: fx.Node, key: str, dim: int, size: int) -> Vector:
    name = ctx.canonical(str(node.target), key)
    assert name is not None
    return ctx.parameter(name, dim, size)


def _rows(ctx: LabelContext, node: fx.Node, key: str, units: Vector, gates: int) -> None:
    name = ctx.canonical(str(node.target), key)
    if name is not None:
        ctx.tie(name, 0, np.tile(units, gates))


def _columns(ctx: LabelContext, node: fx.Node, key: str, units: Vector | None, why: Reason | None) -> None:
    name = ctx.canonical(str(node.target), key)
    if name is None:
        return
    if units is not None:
        ctx.tie(name, 1, units)
        return
    size = ctx.traced.skeleton.tensor(name).shape[1]
    ctx.pin(ctx.parameter(name, 1, size), "the layer reads channels of fixed size", because=why)


def _state(ctx: LabelContext, state: Value, units: Vector) -> None:
    axis = state.ndim - 1
    if axis in state.axes:
        ctx.unite(state.axes[axis], units)
    else:
        ctx.pin(units, "its initial state has a fixed size", because=state.why)
    for other in range(axis):
        ctx.pin(state.axes.get(other), "a recurrent layer runs along it")
