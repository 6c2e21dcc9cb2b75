"""Layers that are called several times: heads that all levels of a pyramid share, siamese encoders, a transformer's layer run in a loop.

One change of the weights has to serve all calls, so rows of all of them are fitted together, and before anything else is repaired: what
the layer reads is taken from the original network, with the channels that are left (elsewhere a layer is fitted to what the repaired
network before it gives, which a later call would still change).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.labels.values import Value, values
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.records import LayerRepair
from fxprune.repair.fitting import Folds
from fxprune.repair.layers import Layer, Reading
from fxprune.repair.matrices import choose, grouped, input_rows, matrices, output_rows
from fxprune.repair.replay import Playback
from fxprune.repair.splitting import portions

MEMORY = 2**30  # bytes of moments that are gathered at once
ROLES = 3


@dataclass(frozen=True)
class Repeated:
    """A layer of the slim network and its calls in the original one, each with the input and output channels that are left (None: all)."""

    layer: Layer
    calls: tuple[tuple[Layer, Any, Any], ...]


def repeated(slim: Reading, original: Reading, traced: Reading, env: Mapping[fx.Node, Any], slimmer: Slimmer) -> list[Repeated]:
    """The layers called several times that lost input channels, the same ones at each call, and nothing along other axes.

    Args:
        slim: The slim network, or a part of it.
        original: The same of the original network, as it is run.
        traced: The same as it was analysed.
        env: Labels of the nodes of ``traced``.
        slimmer: What made ``slim``.
    """
    theirs = {tuple(str(one.node) for one in same): same for same in original.repeated()}
    ours = {tuple(str(one.node) for one in same): same for same in slim.repeated()}
    found = []
    for analysed in traced.repeated():
        names = tuple(str(one.node) for one in analysed)
        if names not in theirs or names not in ours:
            continue
        kept = [(_kept(env.get(one.source), one, slimmer), _kept(env.get(one.node), one, slimmer)) for one in analysed]
        if any(pair is None for both in kept for pair in both):
            continue
        calls = tuple((one, *(pair[0] for pair in both if pair)) for one, both in zip(theirs[names], kept, strict=True))
        if all(read is not None for _, read, _ in calls):
            found.append(Repeated(ours[names][0], calls))
    return found


def _kept(nested: Any, one: Layer, slimmer: Slimmer) -> tuple[Any] | None:
    """What is left along the channels of what a layer reads or gives; None where something went along another axis."""
    value: Value | None = next(iter(values(nested)), None)
    if value is None:
        return None
    axis = value.ndim - 1 - one.form.space
    if any(slimmer.kept(value, other) is not None for other in value.axes if other != axis):
        return None
    return (slimmer.kept(value, axis),)


def repair_repeated(
    layers: Sequence[Repeated], playback: Callable[[], Playback], roles: Sequence[int], rows: Callable[[Layer, int], int], refit: bool
) -> dict[str, LayerRepair]:
    """Repair ``layers`` in place.

    Args:
        layers: What to repair.
        playback: Makes what runs the original over the calibration inputs; once, or several times where moments take much memory.
        roles: What each of these inputs is for.
        rows: How many rows to take from a layer on the inputs of a number.
        refit: Whether weights may change, or constants alone.

    Returns:
        Path of the layer -> what was done.
    """
    made: dict[str, LayerRepair] = {}
    for portion in portions(layers, _size, MEMORY):
        weights = {id(one): matrices(one.layer.form, one.layer.weight).float() for one in portion}
        folds = {id(one): Folds(refit, weights[id(one)].shape[2]) for one in portion}
        play = playback()
        stops = sorted(((call, one) for one in portion for call in one.calls), key=lambda stop: play.place[stop[0][0].node])
        for piece, role in enumerate(roles):
            for number, (call, one) in enumerate(stops):
                limit = -(-rows(call[0], piece) // len(one.calls))
                for x, p, y in _rows(play, piece, call, one.layer, weights[id(one)], limit, piece * 100_003 + number):
                    folds[id(one)].add(role, x, p, y - p)
            play.drop(piece)
        for one in portion:
            made[one.layer.path] = folds[id(one)].repair(one.layer, weights[id(one)])
    return made


def _rows(
    play: Playback, piece: int, call: tuple[Layer, Any, Any], one: Layer, weights: Tensor, limit: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What the layer reads, what it gives and what it should give, (groups, rows, ...), of one call of the original network on a piece."""
    twin, read, given = call
    now = play.before(piece, twin.node)
    inputs = [each[twin.source] for each in now]
    for x, output in zip(inputs, play.through(now, twin.node), strict=True):
        places = choose(twin.form, twin.weight, x, limit, seed)
        y = output_rows(twin.form, output, places)
        y = y if given is None else y.index_select(1, torch.from_numpy(given).to(y.device))
        axis = x.ndim - 1 - twin.form.space
        rows = input_rows(one.form, one.weight, x.index_select(axis, torch.from_numpy(read).to(x.device)), places)
        p = rows @ weights.transpose(1, 2)
        if one.bias is not None:
            p = p + one.bias.detach().float().unflatten(0, (len(p), 1, -1))
        yield rows, p, grouped(one.form, y)
    play.leave(piece, now)


def _size(one: Repeated) -> int:
    groups, outputs, features = matrices(one.layer.form, one.layer.weight).shape
    return ROLES * 8 * groups * features * (features + 2 * outputs)
