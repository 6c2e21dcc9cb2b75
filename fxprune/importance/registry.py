"""The registry of importances: what ranks the units of every group, by name, those of users beside the built-in ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxprune.errors import InputError, PolicyError, kind_of
from fxprune.passes.coupling.graph import CouplingGraph, Group

Scores = Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class RankingData:
    """What a criterion may look at besides the network.

    ``batches``: the calibration batches, ``(inputs, targets)`` or inputs alone; empty where there are none.
    ``seed``: for criteria that draw at random. ``loss``: the user's ``f(output, batch) -> scalar``, or None.
    """

    batches: tuple[Any, ...] = ()
    seed: int = 0
    loss: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Criterion:
    """An importance: ranks the units of every prunable group, the lowest to go first.

    Args:
        name: by which ``importance=`` and ``--importance`` know it, once it is registered with ``fxprune.register_criterion``.
        rank: ``rank(graph, data) -> {group name: scores}``, one finite number for each unit of a prunable group; ``data`` is a
            ``fxprune.importance.registry.RankingData``. A group that is left out is ranked by "l2".
        needs_data: whether it needs calibration batches; without any the user is told so before it is called.
        needs_values: whether it reads the weights, which a model on the meta device does not have.
    """

    name: str
    rank: Callable[[CouplingGraph, RankingData], Mapping[str, Any]]
    needs_data: bool = False
    needs_values: bool = True

    def __call__(self, graph: CouplingGraph, data: RankingData) -> dict[str, npt.NDArray[np.float64]]:
        """The scores, checked. Raises ``InputError`` for missing data or values, ``PolicyError`` for scores that do not fit."""
        names = graph.traced.skeleton
        empty = [name for name in names.parameter_names if self.needs_values and names.real(name).device.type == "meta"]
        if empty:
            raise InputError(
                f'{min(empty)!r} is on the meta device and has no values to rank channels by; pass importance="random" or a callable'
            )
        if self.needs_data and not data.batches:
            raise InputError(
                f'importance "{self.name}" needs calibration data: pass calibration=[(inputs, targets), ...], or importance="l2"'
            )
        found = self.rank(graph, data)
        if not isinstance(found, Mapping):
            raise PolicyError(f"importance {self.name!r} gave {kind_of(found)}; it must give a mapping: group name -> scores")
        strange = sorted(set(map(str, found)) - {group.name for group in graph.groups})
        if strange:
            raise PolicyError(f"importance {self.name!r} gave scores for {strange[0]!r}, which is no group")
        try:
            return {g.name: checked(found[g.name], g, f"importance {self.name!r}") for g in graph.groups if g.prunable and g.name in found}
        except PolicyError as error:
            broken = [n for n in names.parameter_names if self.needs_values and not bool(names.real(n).isfinite().all())]
            if not broken:
                raise
            text = f"{broken[0]!r} holds values that are not finite, by which importance {self.name!r} cannot rank channels"
            raise InputError(f'{text}; mend the weights, or pass importance="random"') from error


CRITERIA: dict[str, Criterion] = {}


def register_criterion(criterion: Criterion) -> Criterion:
    """Make a criterion known by its name, to ``importance=``, to policies that name it, and to ``--importance``.

    Args:
        criterion: the criterion; its name is a word that no other criterion has.

    Returns:
        The criterion itself.

    Raises:
        InputError: it is no criterion, another one has the name, or the name is "auto" or an import path.
    """
    if not isinstance(criterion, Criterion):
        raise InputError(f"cannot register {kind_of(criterion)}; pass a fxprune.Criterion(name, rank)")
    taken = CRITERIA.get(criterion.name)
    if not criterion.name or criterion.name == "auto" or ":" in criterion.name or taken not in (None, criterion):
        why = "is taken" if taken is not None else 'is not a name: use a word other than "auto", without a colon'
        raise InputError(f"cannot register importance {criterion.name!r}: the name {why}")
    CRITERIA[criterion.name] = criterion
    return criterion


def checked(given: Any, group: Group, who: str) -> npt.NDArray[np.float64]:
    """Scores of one group as an array (units); raises ``PolicyError`` naming ``who`` gave others than one finite number for each unit."""
    try:
        found = np.asarray(torch.as_tensor(given).detach().cpu(), dtype=np.float64).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"{kind_of(given)} for group {group.name!r}"
        raise PolicyError(f"{who} gave {what}; it must give {group.size} finite numbers") from error
    if len(found) != group.size or not np.isfinite(found).all():
        raise PolicyError(f"{who} gave {len(found)} scores for group {group.name!r}; it must give {group.size} finite numbers")
    return found


def by_group(graph: CouplingGraph, unit_scores: npt.NDArray[np.float64]) -> Scores:
    """Scores of all units, shape (units,), by the prunable groups that they belong to."""
    return {g.name: unit_scores[graph.starts[g.number] : graph.starts[g.number + 1]] for g in graph.groups if g.prunable}
