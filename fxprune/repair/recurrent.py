"""Recurrent layers by least squares: what goes into the gates, before their nonlinearity, is linear in the input and the last state.

Each layer and direction is fitted by itself: the original's sums at the gates of the units that are left, from the slim network's inputs
and the states. The states are first the original's, then those that the repaired layer itself goes through, as long as its outputs get
nearer to the original's on inputs that were not fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.records import LayerRepair
from fxprune.repair.least_squares import Moments, fitted
from fxprune.repair.splitting import FIT, JUDGE

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
ROUNDS = 3  # with the original's states, then twice with the layer's own
Kept = Mapping[str, Mapping[int, Tensor]]
"""Parameter name -> {dimension: kept indices}."""


@dataclass(frozen=True)
class Sequences:
    """A call of the layer in both networks: inputs and initial states, and what the call is for."""

    role: int
    slim: Tensor
    original: Tensor
    slim_state: Any = None
    original_state: Any = None


def repairable(module: nn.Module) -> bool:
    """Whether ``module`` is a recurrent layer of torch, as torch computes it, without a projection of its output."""
    return isinstance(module, LAYERS) and type(module).forward in {one.forward for one in LAYERS} and not module.proj_size


@torch.no_grad()
def fit_recurrent(slim: nn.RNNBase, original: nn.RNNBase, kept: Kept, calls: Sequence[Sequences]) -> LayerRepair:
    """Fit ``slim`` in place to what ``original`` goes through.

    Args:
        slim: The layer without the units that went.
        original: The layer with all of them.
        kept: Of its parameters, what is left.
        calls: The inputs of both on calibration data: (batch, time, features), or as ``batch_first`` says.
    """
    x = [_time_first(slim, call.slim) for call in calls]
    wanted = [_time_first(original, call.original) for call in calls]
    roles = [call.role for call in calls]
    done: list[LayerRepair] = []
    for layer in range(slim.num_layers):
        found, targets = [], []
        for direction in range(2 if slim.bidirectional else 1):
            number = layer * (2 if slim.bidirectional else 1) + direction
            one = _Direction(slim, original, kept, f"_l{layer}{'_reverse' if direction else ''}", bool(direction))
            starts = [(_state(c.slim_state, number), _state(c.original_state, number)) for c in calls]
            done.append(one.fit(roles, x, wanted, starts))
            found.append([one.run(one.slim, a, s) for a, (s, _) in zip(x, starts, strict=True)])
            targets.append([one.run(one.original, b, s) for b, (_, s) in zip(wanted, starts, strict=True)])
        x = [torch.cat(parts, -1) for parts in zip(*found, strict=True)]
        wanted = [torch.cat(parts, -1) for parts in zip(*targets, strict=True)]
    best = "fitted" if any(one.done == "fitted" for one in done) else "shifted" if any(one.done == "shifted" for one in done) else "sliced"
    ridge = next((one.ridge for one in reversed(done) if one.ridge is not None), None)
    return LayerRepair(best, ridge, sum(one.before for one in done) / len(done), sum(one.after for one in done) / len(done))


class _Direction:
    """One layer in one direction, time running forwards: reversed sequences are flipped on their way in and out."""

    def __init__(self, slim: nn.RNNBase, original: nn.RNNBase, kept: Kept, suffix: str, reverse: bool) -> None:
        self.slim, self.original, self.reverse, self.suffix = slim, original, reverse, suffix
        self.gates = {"LSTM": 4, "GRU": 3}.get(slim.mode, 1)
        dims = kept.get(f"weight_hh{suffix}", {})
        units = dims.get(1, torch.arange(original.hidden_size))
        rows = dims.get(0)
        self.rows = torch.arange(self.gates * original.hidden_size) if rows is None else rows
        self.units = units

    def weights(self, module: nn.RNNBase) -> list[Tensor]:
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
        return [getattr(module, name + self.suffix) for name in names]

    def run(self, module: nn.RNNBase, x: Tensor, state: Any) -> Tensor:
        """The states after every step, (time, batch, hidden)."""
        x = x.flip(0) if self.reverse else x
        zeros = x.new_zeros(1, x.shape[1], module.hidden_size)
        h, c = state if isinstance(state, tuple) else (state, None)
        h = zeros if h is None else h
        function: Callable[..., Any] = getattr(torch, module.mode.lower())
        start = (h, zeros if c is None else c) if module.mode == "LSTM" else h
        found: Tensor = function(x, start, self.weights(module), module.bias, 1, 0.0, False, False, False)[0]
        return found.flip(0) if self.reverse else found

    def before(self, states: Tensor, start: Any) -> Tensor:
        """The state that each step starts from, in the order of the sequence as it is given."""
        h = start[0] if isinstance(start, tuple) else start
        h = states.new_zeros(1, *states.shape[1:]) if h is None else h
        return torch.cat([states[1:], h]) if self.reverse else torch.cat([h, states[:-1]])

    def fit(self, roles: Sequence[int], x: Sequence[Tensor], wanted: Sequence[Tensor], starts: Sequence[Any]) -> LayerRepair:
        original = [self.run(self.original, b, s) for b, (_, s) in zip(wanted, starts, strict=True)]
        goals = [one[..., self.units.to(one.device)] for one in original]
        before = best = self.missed(roles, x, goals, starts)
        done, ridge = "sliced", None
        # What the steps start from: the original's states of the units that are left.
        last = [self.before(one, s)[..., self.units.to(one.device)] for one, (_, s) in zip(original, starts, strict=True)]
        targets = [self.sums(b, self.before(h, s)) for b, h, (_, s) in zip(wanted, original, starts, strict=True)]
        for round in range(ROUNDS):
            held = [w.clone() for w in self.weights(self.slim)]
            if round:
                last = [self.before(self.run(self.slim, a, s), s) for a, (s, _) in zip(x, starts, strict=True)]
            fits = self.changed(roles, x, last, targets)
            now = self.missed(roles, x, goals, starts)
            if now >= best:
                for weight, old in zip(self.weights(self.slim), held, strict=True):
                    weight.copy_(old)
                break
            best = now
            done, ridge = ("fitted" if any(r is not None for r in fits) else "shifted"), next((r for r in fits if r is not None), None)
        return LayerRepair(done, ridge, before, best)

    def sums(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """What the input and the last state put into the gates of the original that are left, (time, batch, rows)."""
        ih, hh, *biases = (w[self.rows.to(w.device)] for w in self.weights(self.original))
        zero = x.new_zeros(())
        b, c = biases or (zero, zero)
        return x @ ih.T + b, h @ hh.T + c

    def parts(self) -> list[tuple[slice, bool, bool]]:
        """Rows of the gates that are fitted together, and whether from the input and from the state: the candidate of a GRU keeps the two
        apart, as the reset gate multiplies the second."""
        rows = self.slim.hidden_size
        if self.slim.mode != "GRU":
            return [(slice(None), True, True)]
        return [(slice(0, 2 * rows), True, True), (slice(2 * rows, None), True, False), (slice(2 * rows, None), False, True)]

    def changed(self, roles: Sequence[int], x: Sequence[Tensor], last: Sequence[Tensor], targets: Sequence[Any]) -> list[float | None]:
        ih, hh, *biases = self.weights(self.slim)
        found = []
        for rows, from_input, from_state in self.parts():
            folds = [Moments() for _ in range(3)]
            weights = [w[rows] for w, used in ((ih, from_input), (hh, from_state)) if used]
            shifts = [b[rows] for b, used in zip(biases, (from_input, from_state), strict=False) if used]
            for role, a, h, (of_input, of_state) in zip(roles, x, last, targets, strict=True):
                features = torch.cat([t for t, used in ((a, from_input), (h, from_state)) if used], -1).flatten(0, 1).float()
                goal = sum(t[..., rows] for t, used in ((of_input, from_input), (of_state, from_state)) if used)
                p = features @ torch.cat(weights, 1).float().T + sum(shifts, features.new_zeros(()))
                folds[role].add(features[None], p[None], (goal.flatten(0, 1) - p)[None])
            fit = fitted(folds, 1.0, takes_shift=bool(biases), refit=True)
            found.append(fit.ridge)
            if fit.change is not None:
                change, at = fit.change[0].to(ih), 0
                for w in weights:
                    w.add_(change[:, at : at + w.shape[1]])
                    at += w.shape[1]
            if fit.shift is not None:
                shifts[0].add_(fit.shift[0].to(ih))
        return found

    def missed(self, roles: Sequence[int], x: Sequence[Tensor], goals: Sequence[Tensor], starts: Sequence[Any]) -> float:
        """The squared distance of the slim layer's states from the original's, as a share of their variance, where it is judged."""
        judge = JUDGE if JUDGE in roles else FIT
        missed, energy = 0.0, 0.0
        for role, a, goal, (s, _) in zip(roles, x, goals, starts, strict=True):
            if role == judge:
                missed += float((self.run(self.slim, a, s) - goal).square().sum())
                energy += float((goal - goal.mean((0, 1))).square().sum())
        return missed / max(energy, 1e-30)


def _time_first(module: nn.RNNBase, x: Tensor) -> Tensor:
    x = x.unsqueeze(0 if module.batch_first else 1) if x.ndim == 2 else x
    return x.transpose(0, 1) if module.batch_first else x


def _state(given: Any, number: int) -> Any:
    """The initial state of one layer and direction, (1, batch, hidden), or a pair of them, or None."""
    if given is None:
        return None
    if isinstance(given, (tuple, list)):
        return tuple(_state(one, number) for one in given)
    found: Tensor = given[number : number + 1]
    return found.unsqueeze(1) if given.ndim == 2 else found
