"""LSTM, GRU and RNN: every layer and direction shares one hidden width, so hidden unit i goes from all of them at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx, nn

from fxprune.passes.rules.registry import modules
from fxprune.passes.rules.values import Value, Vector

if TYPE_CHECKING:
    from fxprune.passes.labels import Walk


@modules(nn.LSTM, nn.GRU, nn.RNN)
def recurrent(walk: Walk, node: fx.Node, module: Any, input: Value, hx: Any = None) -> Any:
    """``input`` (..., features); weight_ih (gates * hidden, in), weight_hh (gates * hidden, hidden or projection)."""
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    hidden, projection = module.hidden_size, module.proj_size
    directions = 2 if module.bidirectional else 1
    cell = _units(walk, node, "weight_hr_l0" if projection else "weight_hh_l0", 1, hidden)
    seen = _units(walk, node, "weight_hr_l0", 0, projection) if projection else cell
    arriving = input.axes.get(input.ndim - 1)
    for layer in range(module.num_layers):
        for suffix in [f"l{layer}", f"l{layer}_reverse"][:directions]:
            _rows(walk, node, f"weight_ih_{suffix}", cell, gates)
            _rows(walk, node, f"weight_hh_{suffix}", cell, gates)
            for bias in ("bias_ih_", "bias_hh_"):
                _rows(walk, node, bias + suffix, cell, gates)
            _columns(walk, node, f"weight_hh_{suffix}", seen, "")
            if projection:
                _rows(walk, node, f"weight_hr_{suffix}", seen, 1)
                _columns(walk, node, f"weight_hr_{suffix}", cell, "")
            _columns(walk, node, f"weight_ih_{suffix}", arriving, input.why)
        arriving = np.tile(seen, directions)
    for axis in range(input.ndim - 1):
        walk.pin(input.axes.get(axis), "a recurrent layer runs along it")
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    for state, units in zip(states, (seen, cell), strict=False):
        if isinstance(state, Value):
            _state(walk, state, units)
    steps = int(np.prod(input.shape[:-1]))
    for name in ("weight_ih_", "weight_hh_"):
        for layer in range(module.num_layers):
            for suffix in [f"l{layer}", f"l{layer}_reverse"][:directions]:
                weight = walk.weight(node, name + suffix)
                assert weight is not None
                walk.cost(str(node.target), steps * weight.shape[0] * weight.shape[1], *weight.axes.values())
    out = walk.make(node, {input.ndim - 1: np.tile(seen, directions)}, [input.ndim - 1] if hx is None else [], "", 0)
    last = node.meta["val"][1]
    if module.mode != "LSTM":
        return out, Value(tuple(last.shape), {last.ndim - 1: seen}, frozenset(), out.why)
    return out, tuple(Value(tuple(t.shape), {t.ndim - 1: u}, frozenset(), out.why) for t, u in zip(last, (seen, cell), strict=True))


def _units(walk: Walk, node: fx.Node, key: str, dim: int, size: int) -> Vector:
    name = walk.canonical(str(node.target), key)
    assert name is not None
    return walk.parameter(name, dim, size)


def _rows(walk: Walk, node: fx.Node, key: str, units: Vector, gates: int) -> None:
    name = walk.canonical(str(node.target), key)
    if name is not None:
        walk.tie(name, 0, np.tile(units, gates))


def _columns(walk: Walk, node: fx.Node, key: str, units: Vector | None, why: str) -> None:
    name = walk.canonical(str(node.target), key)
    if name is None:
        return
    if units is not None:
        walk.tie(name, 1, units)
        return
    size = walk.traced.skeleton.tensor(name).shape[1]
    walk.pin(walk.parameter(name, 1, size), f"the layer reads channels of fixed size ({why})")


def _state(walk: Walk, state: Value, units: Vector) -> None:
    axis = state.ndim - 1
    if axis in state.axes:
        walk.unite(state.axes[axis], units)
    else:
        walk.pin(units, f"its initial state has a fixed size ({state.why})")
    for other in range(axis):
        walk.pin(state.axes.get(other), "a recurrent layer runs along it")


def resize(module: Any) -> None:
    """Set a sliced recurrent layer's sizes from its weights."""
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_ih_l0.shape[0] // gates
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]
