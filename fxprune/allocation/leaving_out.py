"""What the removal of whole blocks does to the output, in the terms of the error tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.allocation.responses import directed
from fxprune.allocation.tables import SAMPLES
from fxprune.evaluation.batches import alone, inputs_of
from fxprune.evaluation.running import call, device_of, evaluating, to_device
from fxprune.passes.coupling.blocks import Block
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.rewriting.blocks import with_zeroed_blocks
from fxprune.repair.repairer import Repairer
from fxprune.repair.splitting import samples as samples_of


def block_effects(
    graph: CouplingGraph, blocks: Sequence[Block], calibration: Iterable[Any], *, samples: int = SAMPLES, seed: int = 0, refit: bool = False
) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """The change of the output that leaving each block out makes, for every sample along the direction that the table draws for it.

    Unlike the table's, which are first order, these are exact: the network is run without the block.

    Args:
        graph: the analysed network; its model is not changed.
        blocks: each is left out alone.
        calibration: batches of inputs, or of (inputs, labels).
        samples: as many as the table takes. ``seed``: the table's, so that both see the same directions.
        refit: whether the layer before a block is fitted to stand in for it, as a repair by least squares does.

    Returns:
        For each block, (samples,).
    """
    batches, held = [], 0
    for batch in calibration:
        if held >= samples:
            break
        batches.append(inputs_of(batch, graph.inputs))
        held += samples_of(batches[-1])
    wanted = _along(with_zeroed_blocks(graph, []), batches, seed)
    repairer = Repairer(graph, alone(batches), "lstsq", thorough=False)
    made = (repairer.stood_in([block]) if refit else with_zeroed_blocks(graph, [block]) for block in blocks)
    return [_along(one, batches, seed) - wanted for one in made]


def _along(module: nn.Module, batches: Sequence[Any], seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The output of every sample along its direction."""
    device, found = device_of(module), []
    with evaluating(module):
        for number, batch in enumerate(batches):
            drawn = torch.Generator().manual_seed(seed * 1_000_003 + number)
            terms = directed(call(module, to_device(batch, device)), drawn)
            found.append(sum((_by_sample(term, samples_of(batch)) for term in terms), torch.zeros(samples_of(batch), dtype=torch.float64)))
    return torch.cat(found).numpy()


def _by_sample(term: Tensor, samples: int) -> Tensor:
    """Summed by sample; where samples cannot be told apart, as many equal shares whose squares add up to the same."""
    if term.ndim and len(term) == samples:
        summed: Tensor = term.flatten(1).sum(1) if term.ndim > 1 else term
        return summed.cpu().double()
    shared: Tensor = (term.sum().cpu().double() * samples**-0.5).expand(samples)
    return shared
