"""The oracle on a network of yours: whether a rule or a layer that you registered says the truth."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.api import analyze, compress, record
from fxprune.evaluation.copying import copied
from fxprune.evaluation.running import call, evaluating, set_training
from fxprune.passes.compat import tree_leaves
from fxprune.passes.coupling.graph import CouplingGraph

SPARSITIES = (0.25, 0.5, 0.75)


def assert_sound(
    model: nn.Module, inputs: Any, *, removes: Iterable[str] = (), exact: bool = True, seed: int = 0, tolerance: float = 1e-4
) -> CouplingGraph:
    """Prune every group of ``model`` at its own sparsity, and compare the slim module with the original, removed channels set to zero.

    Args:
        model: a network with the operation or layer in it, in front of something that reads its channels. It is not changed.
        inputs: a tensor, a tuple or a dict, with values for which the network gives finite outputs.
        removes: names of parameters that must have lost channels; so a rule that locks everything is noticed.
        exact: whether zeroing is defined for all groups, that is no removed channel passes a statistic or softmax over channels.
        seed: of the sparsities of the groups.
        tolerance: the largest difference, as a share of the output's largest magnitude.

    Returns:
        The coupling graph, for further questions.

    Raises:
        AssertionError: nothing can be pruned, a parameter in ``removes`` kept all, the outputs differ, a parameter is not a slice of the
            original's, keeping all is not bit for bit the original, or the original was changed.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = analyze(model, inputs)
    free = [group for group in graph.groups if group.prunable]
    reasons = "; ".join(f"{group.name}: {group.reason}" for group in graph.groups)
    _require(bool(free), f"nothing can be pruned: {reasons}")
    noted = [f"{group.name}: {note}" for group in free for note in group.notes]
    _require(not (exact and noted), f"zeroing is not defined for every group, pass exact=False: {'; '.join(noted)}")
    draw = random.Random(seed)
    slim = compress(graph, {group.name: draw.choice(SPARSITIES) for group in free}, inputs)
    kept = record(slim).kept
    _require(bool(kept), "nothing was removed: every group has too few units for its sparsity; use more channels")
    whole = [name for name in removes if name not in kept]
    _require(not whole, f"{whole[:1]} kept all its channels; {reasons}")
    _slices(model, slim, kept)
    if exact:
        found = _gap(_outputs(_zeroed(model, kept), inputs), _outputs(slim, inputs))
        _require(found <= tolerance, f"the slim module differs from the zeroed original by {found:.1e} of its largest output")
    same = _gap(_outputs(model, inputs), _outputs(compress(model, 0.0, inputs), inputs))
    _require(same == 0.0, f"with all channels kept the outputs differ by {same:.1e}")
    after = model.state_dict()
    changed = [name for name, tensor in before.items() if name not in after or not torch.equal(tensor, after[name])]
    _require(not changed, f"{changed[:1]} of the original was changed")
    return graph


def _zeroed(model: nn.Module, kept: Any) -> nn.Module:
    """A copy in which every slice that was not kept is zero; running variances stay."""
    twin = copied(model)
    state = twin.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in dims.items() if name in state and not name.endswith("running_var") else ():
                gone = torch.ones(state[name].shape[dim], dtype=torch.bool)
                gone[indices] = False
                state[name].index_fill_(dim, gone.nonzero().flatten().to(state[name].device), 0)
    return twin


def _slices(model: nn.Module, slim: nn.Module, kept: Any) -> None:
    original, renumbered = model.state_dict(), record(slim).renumbered
    for name, tensor in slim.state_dict().items():
        wanted = original[name]
        for dim, indices in kept.get(name, {}).items():
            wanted = wanted.index_select(dim, indices.to(wanted.device))
        _require(name in renumbered or torch.equal(wanted, tensor), f"{name!r} is not the original's slice")


def _outputs(module: nn.Module, inputs: Any) -> Any:
    twin = copied(module)
    set_training(twin, False)
    with evaluating(twin):
        torch.manual_seed(0)
        return call(twin, inputs)


def _gap(one: Any, other: Any) -> float:
    mine, theirs = ([leaf for leaf in tree_leaves(side) if isinstance(leaf, Tensor)] for side in (one, other))
    _require([t.shape for t in mine] == [t.shape for t in theirs], "the slim module gives outputs of other shapes")
    gaps = [0.0]
    for a, b in zip(mine, theirs, strict=True):
        if a.numel():
            _require(bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all()), "an output is not finite; give other inputs")
            gaps.append(float((a.double() - b.double()).abs().max()) / (float(a.double().abs().max()) or 1.0))
    return max(gaps)


def _require(holds: bool, message: str) -> None:
    if not holds:  # no assert statement: python -O would take it out
        raise AssertionError(message)
