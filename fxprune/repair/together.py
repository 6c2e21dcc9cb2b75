"""All weights of a repaired network moved together, so that its outputs come nearer to the original's, without labels.

Layers fitted one after the other come near to their own responses, each, and know nothing of what later layers make of the rest. Here the
error of the outputs alone counts: its gradients go through the whole network, some rounds of small steps (Kingma 2014,
https://arxiv.org/abs/1412.6980), each a share of a weight's own size. Statistics of BatchNorm stay. Inputs that were not fitted say after
every round how far the outputs are, and the weights of the best round are kept; those it began with, where none is better beyond chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import in_a_line
from fxprune.evaluation.running import call, evaluating, to_device
from fxprune.repair.distance import centred, distances, outputs_of
from fxprune.repair.splitting import JUDGE, Piece

STEPS = (0.006, 0.0015)  # the largest step, as a share of a weight's size; the second where the first leads nowhere
SIZES = (1e-3, 0.1)  # between which a weight's size counts, its root mean square
ROUNDS, MOST, ENOUGH = 6, 16, 96  # rounds over the inputs; more, where inputs are few, up to so many steps
SURE = 1.5  # standard errors by which it has to be better in the end
WARM = 0.1  # of all steps, in which they grow to the largest
BETAS, TINY = (0.9, 0.999), 1e-12
HELD = 256 * 2**20  # bytes of the original's outputs that are kept; more are computed again in every round

Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Together:
    """``before``, ``after``: distance of the outputs from the original's on inputs that were not fitted. ``rounds``: made. ``kept``:
    whether what came of them was better beyond chance; else the weights are as they were."""

    before: float
    after: float
    rounds: int
    kept: bool


def move_together(
    slim: nn.Module,
    original: Run,
    pieces: Sequence[Piece],
    device: torch.device,
    progress: Callable[[int, int, str], None] | None = None,
) -> Together | str:
    """Move the parameters of ``slim``, which is in evaluation mode, in place. At most 9 rounds there and back, over few inputs up to 24.

    Args:
        slim: The network.
        original: Inputs -> outputs of the original.
        pieces: Calibration inputs; those that judge are not fitted.
        device: Where inputs go.
        progress: Called after each round with how many are done, how many there are, and a name.

    Returns:
        What came of it, or why it could not be done.
    """
    fit, judge = [p for p in pieces if p.role != JUDGE], [p for p in pieces if p.role == JUDGE]
    if not fit or not judge:
        return "there are no inputs by which to judge"
    wanted = _Wanted(original, fit, device)
    aim = [original(piece.inputs) for piece in judge]

    def off() -> Tensor:
        with torch.no_grad():
            return distances([call(slim, to_device(piece.inputs, device)) for piece in judge], aim).nan_to_num(nan=math.inf)

    parameters = [p for p in slim.parameters() if p.is_floating_point()]
    begun = lowest = off()
    first = best = [p.detach().clone() for p in parameters]
    rounds = min(MOST, max(ROUNDS, -(-ENOUGH // len(fit))))
    made = 0
    order = torch.Generator().manual_seed(0)
    try:
        with _differentiated(slim, parameters):
            for step in STEPS:
                walk = _Walk(slim, parameters, wanted, step, rounds * len(fit))
                for number in range(rounds):
                    made += 1
                    finite = walk.round(torch.randperm(len(fit), generator=order).tolist())
                    if finite and float((now := off()).mean()) < float(lowest.mean()):
                        lowest, best = now, [p.detach().clone() for p in parameters]
                    if progress is not None:
                        progress(number + 1, rounds, "all layers together")
                    if not finite or (best is first and 2 * (number + 1) >= rounds):  # half way it has to be better
                        break
                _put(parameters, best)
                if best is not first:
                    break
    except (RuntimeError, NotImplementedError) as error:
        best = first
        return f"the network cannot be differentiated on the calibration data: {in_a_line(error)}"
    finally:
        kept = best is not first and _surely(begun - lowest)
        _put(parameters, best if kept else first)
    return Together(float(begun.mean()), float(lowest.mean()), made, kept)


def _surely(nearer: Tensor) -> bool:
    """Whether distances that fell by so much, by sample, did so by more than chance."""
    spread = float(nearer.std()) / math.sqrt(len(nearer)) if len(nearer) > 1 else 0.0
    return float(nearer.mean()) > SURE * spread


class _Walk:
    """Steps along the gradients of the outputs' error, each of them a share of the size of what it moves."""

    def __init__(self, slim: nn.Module, parameters: Sequence[Tensor], wanted: _Wanted, step: float, steps: int) -> None:
        self.slim, self.parameters, self.wanted = slim, parameters, wanted
        self.masters = [p.detach().float() if p.dtype in (torch.float16, torch.bfloat16) else p for p in parameters]
        sizes = [float(p.detach().float().square().mean().sqrt().clamp(*SIZES)) if p.numel() else SIZES[0] for p in parameters]
        groups: list[dict[str, Any]] = [{"params": [p], "lr": step * size} for p, size in zip(self.masters, sizes, strict=True)]
        self.optimizer = torch.optim.Adam(groups, betas=BETAS, eps=TINY)
        warm = max(1, round(WARM * steps))

        def share(done: int) -> float:
            return (done + 1) / warm if done < warm else 0.5 + 0.5 * math.cos(math.pi * (done - warm) / max(1, steps - warm))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)

    def round(self, order: Sequence[int]) -> bool:
        """Go once over the inputs; False where an output is no longer finite."""
        for number in order:
            error = self.wanted.error(self.slim, number)
            if not bool(torch.isfinite(error)):
                return False
            error.backward()
            with torch.no_grad():
                for p, master in zip(self.parameters, self.masters, strict=True):
                    if master is not p:
                        master.grad = None if p.grad is None else p.grad.float()
            self.optimizer.step()
            self.schedule.step()
            with torch.no_grad():
                for p, master in zip(self.parameters, self.masters, strict=True):
                    p.grad = None
                    if master is not p:
                        p.copy_(master)
        return True


class _Wanted:
    """The original's outputs on the inputs that are fitted, and how far another network's are from them."""

    def __init__(self, original: Run, pieces: Sequence[Piece], device: torch.device) -> None:
        self.original, self.pieces, self.device = original, pieces, device
        self._held: dict[int, list[Tensor]] = {}
        energies: list[list[float]] = []
        room = HELD
        for number, piece in enumerate(pieces):
            found = outputs_of(original(piece.inputs))
            energies.append([float((c := centred(t)).abs().square().sum()) / max(1, len(c) if c.ndim else 1) for t in found])
            room -= sum(t.nbytes for t in found)
            if room >= 0:
                self._held[number] = found
        self.energies = [max(sum(one) / len(one), 1e-30) for one in zip(*energies, strict=True)]

    def error(self, slim: nn.Module, number: int) -> Tensor:
        """The squared error of the outputs by sample, as a share of the original's energy, with a gradient."""
        inputs = self.pieces[number].inputs
        wanted = self._held.get(number) or outputs_of(self.original(inputs))
        found = outputs_of(call(slim, to_device(inputs, self.device)))
        parts = [
            (centred(a) - centred(b)).abs().square().sum() / energy / max(1, len(b) if b.ndim else 1)
            for a, b, energy in zip(found, wanted, self.energies, strict=True)
            if a.shape == b.shape  # not hidden states that lost channels themselves
        ]
        return torch.stack(parts).mean()


@contextmanager
def _differentiated(slim: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """In the block gradients reach the parameters, in evaluation mode; afterwards all is as it was."""
    flags = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        # cuDNN's recurrent layers have no gradient in evaluation mode.
        with evaluating(slim), torch.enable_grad(), torch.backends.cudnn.flags(enabled=not _recurs(slim)):
            yield
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.grad = None
            p.requires_grad_(flag)


def _recurs(slim: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in slim.modules())


def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
