"""Importance: one score per unit of every group; the lowest go first.

Criteria are summed over all the weights that a unit's removal takes: the producer's rows, the consumers' columns, the norms between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fxprune.errors import InputError, PolicyError, kind_of
from fxprune.importance.gradients import Loss, gradients
from fxprune.importance.reconstruction import reconstruction
from fxprune.importance.registry import CRITERIA, Criterion, RankingData, Scores, by_group, checked, register_criterion
from fxprune.imports import by_path
from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.passes.labels.values import Vector
from fxprune.zeros import first_elements, may_be_dead, zero_units

Importance = str | Criterion | Callable[[Group, nn.Module], Any]
CALLABLE = "callable:"  # in front of the name of a function of the user's, which no policy can hold


def importance_name(importance: Importance) -> str:
    """An importance as records and policies name it: a callable as "callable:" and its qualified name."""
    if isinstance(importance, str):
        return importance
    if isinstance(importance, Criterion) and CRITERIA.get(importance.name) is importance:
        return importance.name
    return f"{CALLABLE}{getattr(importance, '__qualname__', None) or getattr(importance, 'name', type(importance).__qualname__)}"


def scores(
    graph: CouplingGraph,
    importance: Importance = "auto",
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    loss: Loss | None = None,
) -> Scores:
    """Scores of all prunable groups: group name -> array (units).

    ``importance``: "taylor" (first order, |weight x gradient| summed; Molchanov 2017, here over the whole group), "l2", "l1",
    "variance" (of the weights), "reconstruction" (the error of the layers that read the unit, fitted again without it; see
    ``fxprune.importance.reconstruction``), "random" (by ``seed``), "auto" (taylor where ``calibration`` is given, else l2), the name of
    another that is registered, a ``Criterion``, or a callable ``(group, module) -> scores``. ``calibration``: batches, each
    ``(inputs, targets)`` or inputs alone. ``loss``: what "taylor" differentiates (see ``fxprune.importance.gradients``). Units that are
    dead already (``fxprune.zeros``) score below all others.
    """
    name = ("l2" if calibration is None else "taylor") if importance == "auto" else importance
    if not isinstance(name, str) or name not in _OF_WEIGHTS or _without_values(graph) or _without_versions(graph):
        return _dead_first(graph, _scores(graph, importance, calibration, seed, loss))
    known: dict[str, Any] = graph.__dict__.setdefault("_remembered", {})
    now = _mark(graph)
    earlier = known.get(name)
    if earlier is None or not _same_mark(earlier[0], now):
        known[name] = earlier = (now, _dead_first(graph, _scores(graph, name, None, seed, loss)))
    return {group: one.copy() for group, one in earlier[1].items()}


# Criteria that depend on the weights alone: their scores are remembered while the weights are unchanged.
_OF_WEIGHTS = ("l2", "l1", "variance")


def _mark(graph: CouplingGraph) -> tuple[list[tuple[int, int]], list[torch.Tensor]]:
    """By what a change of the weights is noticed: versions and addresses, and the first element of every row and column of each tensor.

    Writes through ``tensor.data`` leave the version as it is; where they change whole channels the elements tell.
    """
    skeleton = graph.traced.skeleton
    tensors = [t for t in map(skeleton.real, skeleton.names) if t.layout is torch.strided]  # sparse ones rank nothing
    firsts: dict[Any, list[torch.Tensor]] = {}
    for t in tensors:
        if t.numel():
            firsts.setdefault((t.dtype, t.device), []).extend(first_elements(t, dim) for dim in range(min(t.ndim, 2)))
    return [(t._version, t.data_ptr()) for t in tensors], [torch.cat(same) for same in firsts.values() if same]


def _without_values(graph: CouplingGraph) -> bool:
    """Whether the model is on the meta device, or part of it."""
    skeleton = graph.traced.skeleton
    return any(skeleton.real(name).is_meta for name in skeleton.parameter_names)


def _without_versions(graph: CouplingGraph) -> bool:
    """Whether the model was built in ``torch.inference_mode``: nothing tells then when a weight changes."""
    skeleton = graph.traced.skeleton
    return any(skeleton.real(name).is_inference() for name in skeleton.names)


def _same_mark(one: Any, other: Any) -> bool:
    alike = one[0] == other[0] and len(one[1]) == len(other[1])
    return alike and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def _dead_first(graph: CouplingGraph, found: Scores) -> Scores:
    """The scores with those of dead units below zero and below all others of their group."""
    if _without_values(graph) or not may_be_dead(graph):
        return found
    dead = zero_units(graph).dead
    if not dead.any():
        return found
    changed = dict(found)
    for group in graph.groups:
        mine = dead[graph.starts[group.number] : graph.starts[group.number + 1]]
        if group.name in changed and mine.any():
            one = np.array(changed[group.name], dtype=np.float64)
            lowest = min(0.0, float(one.min()))
            one[mine] = lowest - 1e-12 - 1e-9 * abs(lowest)
            changed[group.name] = one
    return changed


def resolved(importance: Importance) -> Importance:
    """``importance``, or what it names where it is an import path: a ``Criterion`` or a function ``(group, module) -> scores``.

    For what the user types, not for what a file says: a path is imported, which runs code.
    """
    if not isinstance(importance, str) or ":" not in importance or importance.startswith(CALLABLE):
        return importance
    found = by_path(importance, "importance")
    if not callable(found):
        raise InputError(f"importance {importance!r} is {kind_of(found)}; it must be a Criterion or (group, module) -> scores")
    return found  # type: ignore[no-any-return]


def _scores(graph: CouplingGraph, importance: Importance, calibration: Iterable[Any] | None, seed: int, loss: Loss | None) -> Scores:
    if isinstance(importance, str):
        importance = _named(importance, calibration is not None)
    if not isinstance(importance, Criterion):
        return {g.name: checked(importance(g, graph.model), g, "the importance callable") for g in graph.groups if g.prunable}
    data = RankingData(tuple(calibration or ()), seed, loss)
    found = importance(graph, data)
    left_out = any(g.name not in found for g in graph.groups if g.prunable)
    return {**CRITERIA["l2"](graph, data), **found} if left_out else found


def _named(name: str, has_data: bool) -> Criterion:
    """The criterion of that name. Raises ``PolicyError`` that lists those there are."""
    if name == "auto":
        name = "taylor" if has_data else "l2"
    if name.startswith(CALLABLE):
        name = name.removeprefix(CALLABLE)
        raise PolicyError(f"the policy was made with the function {name!r} as importance; pass it as importance= again")
    if ":" in name:  # what a file names is not imported on its word
        raise PolicyError(f"the policy was made with importance {name!r}; pass it as importance= again")
    if name not in CRITERIA:
        raise PolicyError(
            f"importance {name!r} is not known; choose one of {', '.join(('auto', *CRITERIA))} or pass a callable (group, module) -> scores"
        )
    return CRITERIA[name]


def _weights(graph: CouplingGraph) -> dict[str, torch.Tensor]:
    return {n: graph.traced.skeleton.real(n) for n in graph.traced.skeleton.parameter_names}


def _taylor(graph: CouplingGraph, data: RankingData) -> Scores:
    """First order, |weight x gradient|; Molchanov 2017, here summed over the whole group."""
    return by_group(graph, _sums(graph, gradients(graph.model, data.batches, data.loss, graph.inputs), lambda w, g: (w * g).abs()))


def _l2(graph: CouplingGraph, data: RankingData) -> Scores:
    return by_group(graph, np.sqrt(_squares(graph, _weights(graph))))


def _l1(graph: CouplingGraph, data: RankingData) -> Scores:
    return by_group(graph, _sums(graph, _weights(graph), lambda w, _: w.abs()))


def _variance(graph: CouplingGraph, data: RankingData) -> Scores:
    weights = _weights(graph)
    squares = _sums(graph, weights, lambda w, _: w.square())
    count = _sums(graph, weights, lambda w, _: torch.ones_like(w))
    mean = _sums(graph, weights, lambda w, _: w) / np.maximum(count, 1)
    return by_group(graph, squares / np.maximum(count, 1) - mean**2)


def _random(graph: CouplingGraph, data: RankingData) -> Scores:
    return by_group(graph, np.random.default_rng(data.seed).random(int(graph.starts[-1])))


def _reconstruction(graph: CouplingGraph, data: RankingData) -> Scores:
    return reconstruction(graph, data.batches)  # what no suitable layer reads is left out, and ranked by its weights


for _built_in in (
    Criterion("taylor", _taylor, needs_data=True),
    Criterion("l2", _l2),
    Criterion("l1", _l1),
    Criterion("variance", _variance),
    Criterion("random", _random, needs_values=False),
    Criterion("reconstruction", _reconstruction, needs_data=True),
):
    register_criterion(_built_in)


def _sums(graph: CouplingGraph, tensors: Mapping[str, Any], term: Callable[[torch.Tensor, Any], torch.Tensor]) -> npt.NDArray[np.float64]:
    """``term`` of every weight, added up over the units each dimension of the weight belongs to. Shape (units,)."""
    found: list[tuple[Vector, torch.Tensor]] = []
    with torch.no_grad():
        for name, given in tensors.items():
            weight, gradient = given if isinstance(given, tuple) else (given, None)
            wanted, expert = _scored_dimensions(graph, name, weight.ndim), graph.expert_of(name)
            if wanted or expert is not None:
                if weight.is_complex() and gradient is not None:
                    terms = term(weight.detach().real.float(), gradient.real) + term(weight.detach().imag.float(), gradient.imag)
                else:
                    terms = term(_real(weight), gradient)
                sums = _sums_along(terms, wanted)
                found.extend((units, sums[dim]) for dim, units in wanted.items())
                found += [(expert, terms.sum().reshape(1))] if expert is not None else []
    return _added_up(graph, found)


def _squares(graph: CouplingGraph, weights: Mapping[str, torch.Tensor]) -> npt.NDArray[np.float64]:
    """Sum of squared weights per unit; each weight is read once, for both of its channel dimensions."""
    found: list[tuple[Vector, torch.Tensor]] = []
    with torch.no_grad():
        for name, weight in weights.items():
            wanted = _scored_dimensions(graph, name, weight.ndim)
            if wanted:
                sums = _squares_along(_real(weight), wanted)
                found.extend((units, sums[dim]) for dim, units in wanted.items())
            if (expert := graph.expert_of(name)) is not None:
                found.append((expert, _real(weight).square().sum().reshape(1)))
    return _added_up(graph, found)


def _real(weight: torch.Tensor) -> torch.Tensor:
    """Of complex weights, as spectral convolutions have them, the magnitudes."""
    return weight.detach().abs().float() if weight.is_complex() else weight.detach().float()


def _scored_dimensions(graph: CouplingGraph, name: str, ndim: int) -> dict[int, Vector]:
    """The units along each dimension of a parameter that has any to choose from."""
    units = {d: graph.unit_of[name, d] for d in range(ndim) if (name, d) in graph.unit_of}
    return {d: u for d, u in units.items() if graph.prunable_unit[u].any()}


def _added_up(graph: CouplingGraph, found: list[tuple[Vector, torch.Tensor]]) -> npt.NDArray[np.float64]:
    count = int(graph.starts[-1])
    if not found:
        return np.zeros(count)
    weights = torch.cat([sums.double().cpu() for _, sums in found]).numpy()
    total = np.bincount(np.concatenate([units for units, _ in found]), weights=weights, minlength=count)
    return total.astype(np.float64, copy=False)


# As many numbers as stay in a core's cache between squaring and summing them.
_BLOCK = 1 << 17


def _squares_along(weight: torch.Tensor, dims: Iterable[int]) -> dict[int, torch.Tensor]:
    """Sum of squares at every index of each of ``dims``: {dim: (size of dim,)}."""
    if weight.ndim == 1:
        return {0: weight.square()}
    found = {d: weight.movedim(d, 0).flatten(1).square().sum(1) for d in dims if d > 1}
    matrix = weight.flatten(1)
    rows = max(_BLOCK // max(matrix.shape[1], 1), 1)
    if 1 not in dims:
        return {**found, 0: torch.linalg.vector_norm(matrix, dim=1).square()} if 0 in dims else found
    columns, sums = torch.zeros(matrix.shape[1], device=weight.device), []
    for block in matrix.split(rows):
        squares = block.square()
        columns += squares.sum(0)
        sums.append(squares.sum(1))
    return {**found, 0: torch.cat(sums), 1: columns.view(weight.shape[1], -1).sum(1)}


def _sums_along(term: torch.Tensor, dims: Iterable[int]) -> dict[int, torch.Tensor]:
    """Sum at every index of each of ``dims``; kernels are summed away once, so that both channel dimensions read a matrix."""
    per_channel = term.flatten(2).sum(2) if term.ndim > 2 else term
    return {d: _sum_but(per_channel if d < 2 else term, d) for d in dims}


def _sum_but(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    rest = [d for d in range(tensor.ndim) if d != dim]
    return tensor.sum(rest) if rest else tensor
