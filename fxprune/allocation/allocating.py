"""From a target to a policy by error tables, without a search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fxprune.allocation.grain import multiple_for_bounds
from fxprune.allocation.prices import METRICS, FloatArray, IntArray, Prices
from fxprune.allocation.tables import ErrorTable, error_table
from fxprune.allocation.trying import TRIALS, Near, Trial, Trials, tried
from fxprune.allocation.uniform import Uniform
from fxprune.allocation.widths import Knapsack
from fxprune.errors import InputError, TargetError
from fxprune.evaluation.batches import checked
from fxprune.evaluation.running import one_thread
from fxprune.importance.criteria import importance_name, resolved, scores
from fxprune.importance.gradients import Loss
from fxprune.index_lists import ranges
from fxprune.passes.base import Observer
from fxprune.passes.coupling.blocks import Block
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.planning.naming import limits
from fxprune.passes.planning.plan import Keep, Rounding, keep_counts
from fxprune.policies import Policy
from fxprune.repair.registry import Repair, named, of_candidates

TOLERANCE = 1e-6  # by which a share may be above its bound
TIGHTENINGS = 12  # times that more is asked for where rounding gave too much back


class Allocator:
    """Allocations of one network from its error table, as many as are asked for.

    ``round_to``, ``most``: as in ``compress``. ``kept_whole``: groups of which the table says nothing, since no gradient reaches them
    (behind a rounding, say, or an index); they lose nothing. ``costs``: more metrics that may be bounded, as ``Prices.shares`` gives them.
    ``blocks``: what may be left out beside the units, each with the change of the output that it makes, (samples,); removals then have a
    column for each, behind those of the groups.
    """

    def __init__(
        self,
        graph: CouplingGraph,
        table: ErrorTable,
        *,
        round_to: int = 1,
        most: Mapping[str, float] | float | None = None,
        costs: Mapping[str, Callable[[IntArray], FloatArray]] | None = None,
        blocks: Sequence[tuple[Block, FloatArray]] = (),
    ) -> None:
        self.blocks = list(blocks)
        self.graph, self.table, self.costs = graph, table, dict(costs or {})
        self.round_to, self.most = round_to, most
        self.groups = [group for group in graph.groups if group.prunable]
        self.limits = limits(graph, most)
        self.kept_whole = tuple(group.name for group in self.groups if not table.effects[group.name].any())
        self.rounding = Rounding(graph, round_to) if round_to > 1 else None

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*METRICS, *self.costs)

    def allocate(self, bounds: Mapping[str, float], weights: FloatArray | None = None, start: IntArray | None = None) -> IntArray:
        """Units to remove from each prunable group, (groups,), so that at most these shares of the metrics are left.

        ``bounds``: metric ("macs", "params", "memory" or "sparsity", the last the share of the output channels that stays) -> share that
        is left of the original's, 0 to 1. Where that cannot be, as much as may go. ``weights``: what the changes that each group makes
        count, (groups,); all the same, if left out. ``start``: removals to begin with, near which it stays; the whole network, if left out.
        """
        knapsack = self._knapsack
        if weights is not None:
            effects = [effect * weight for effect, weight in zip(knapsack.effects, weights, strict=True)]
            knapsack = Knapsack(effects, knapsack.allowed, knapsack.shares)
        return knapsack.allocate(bounds, start)

    def met(
        self, bounds: Mapping[str, float], weights: FloatArray | None = None, start: Mapping[str, int] | None = None
    ) -> tuple[dict[str, int], dict[str, float]]:
        """Units to remove by group, rounded, and what they leave of each bounded metric; ``weights``, ``start`` as for ``allocate``."""
        wanted = dict(bounds)
        begun = None if start is None else np.array([start.get(group.name, 0) for group in self.groups], dtype=np.int64)
        for _ in range(TIGHTENINGS):  # rounding gives units back: then a little more is asked
            removed = self.allocate(wanted, weights, begun)
            counts = {group.name: int(count) for group, count in zip(self.groups, removed, strict=True)}
            if self.rounding is not None:
                counts = self.rounding(counts)
            rounded = np.array([[counts[group.name] for group in self.groups]])
            left = {metric: float(self._shares(metric, rounded)[0]) for metric in bounds}
            over = [metric for metric, share in bounds.items() if left[metric] > share + TOLERANCE]
            if not over or self.rounding is None:
                break
            for metric in over:
                wanted[metric] *= 0.99 * bounds[metric] / left[metric]
        return counts, left

    def moved(self, bounds: Mapping[str, float], counts: Mapping[str, int], name: str, wanted: int) -> dict[str, int] | None:
        """Units to remove by group, near ``counts``: the group ``name`` loses about ``wanted``, the others what the bounds then ask for.

        None where that is not possible, or changes nothing.
        """
        begun = np.array([counts.get(group.name, 0) for group in self.groups], dtype=np.int64)
        number = next(i for i, group in enumerate(self.groups) if group.name == name)
        removed = self._knapsack.moved(begun, number, wanted, bounds)
        found = {group.name: int(count) for group, count in zip(self.groups, removed, strict=True)}
        if self.rounding is not None:
            found = self.rounding(found)
        rounded = np.array([[found[group.name] for group in self.groups]])
        over = any(float(self._shares(metric, rounded)[0]) > share + TOLERANCE for metric, share in bounds.items())
        return None if over or found == dict(counts) else found

    @cached_property
    def prices(self) -> Prices:
        """What allocations cost."""
        return Prices(self.graph, self.groups, [block for block, _ in self.blocks])

    @cached_property
    def _knapsack(self) -> Knapsack:
        effects = [self.table.along(group.name) for group in self.groups]
        effects += [np.stack([np.zeros_like(effect), effect]) for _, effect in self.blocks]
        allowed = [self._allowed(i) for i in range(len(self.groups))] + [np.arange(2, dtype=np.int64) for _ in self.blocks]
        return Knapsack(effects, allowed, self._shares)

    def _shares(self, metric: str, removed: IntArray) -> FloatArray:
        return self.costs[metric](removed) if metric in self.costs else self.prices.shares(metric, removed)

    def _allowed(self, number: int) -> IntArray:
        """The removals that a group may lose alone: up to its limit and, rounded, themselves; all, where rounding lets none stand."""
        group = self.groups[number]
        if group.name in self.kept_whole:
            return np.zeros(1, dtype=np.int64)
        most = min(self.limits.get(group.name, group.size), group.size - group.least)
        every = np.arange(most + 1, dtype=np.int64)
        if self.rounding is None:
            return every
        rounding = self.rounding
        stand = np.array([rounding({group.name: int(count)})[group.name] == count for count in every])
        return every[stand] if stand.sum() > 1 else every


def allocate(
    graph: CouplingGraph,
    bounds: Mapping[str, float],
    calibration: Iterable[Any],
    *,
    importance: Any = "auto",
    loss: Loss | None = None,
    repair: Repair = "lstsq",
    round_to: int | None = None,
    most: Mapping[str, float] | float | None = None,
    seed: int = 0,
    trials: int = 0,
    observe: Observer | None = None,
) -> Policy:
    """Find a policy that meets ``bounds`` by error tables; without ``trials`` no slim network is made or run.

    What ``compress(model, "macs=0.5", x, calibration=batches)`` does with its target: ``compress(graph, allocate(graph, {"macs": 0.5},
    batches, repair=repair, round_to=round_to, most=most, trials=TRIALS), calibration=batches, repair=repair)``, ``TRIALS`` being that of
    ``fxprune.allocation.trying``. The policy lists the units, which ``compress`` takes again. For several targets make one ``Allocator``
    from one ``error_table``.

    Args:
        graph: The analysed network; it and its model stay as they are.
        bounds: Metric -> the share of the original that may be left, above 0 and at most 1: "macs", "params", "memory" (the peak of the
            activations) or "sparsity" (here the share of the output channels that stays).
        calibration: Batches of inputs, or of (inputs, labels); a few hundred samples or more. Labels are read only by an ``importance``
            that needs them.
        importance: What ranks the units of a group; "auto": the table itself. Otherwise as for ``compress``.
        loss: What an importance that needs gradients differentiates, as for ``compress``.
        repair: How the slim network will be repaired, for which the errors are reckoned.
        round_to: Channels kept in every pruned dimension are rounded up to a multiple of it; None: as ``multiple_for_bounds`` says.
        most: The largest share of its units that any group loses, or a mapping from group, module or glob to it.
        seed: Of what the table and the trials draw.
        trials: How many allocations are tried on inputs that are kept apart, the table's own, the same share of every group, and others
            that the table gives when groups count more or less; of small networks more, each a step from the best so far. The table's is
            left only for one that is better beyond chance.
        observe: Called as ``observe("Try", trial, seconds)`` after each of them, with a ``fxprune.allocation.trying.Trial``.

    Returns:
        A policy with the sparsity of every prunable group; ``meta`` names the allocation that was taken and the distances of all that
        were judged in full.

    Raises:
        InputError: A metric that must be measured, a share out of range, or no calibration data.
        TargetError: The bounds cannot be met.
    """
    named(repair)
    repair = of_candidates(repair)
    for metric, share in bounds.items():
        if metric not in METRICS:
            raise InputError(f"a table cannot bound {metric!r}, only {', '.join(METRICS)}; search for it with fxprune.search")
        if not 0 < share <= 1:
            raise InputError(f"{metric}={share} is out of range; give what is to be left as a share above 0 and at most 1")
    if round_to is None:
        round_to = multiple_for_bounds(graph, [bounds], most)
    batches = checked(list(calibration), graph.inputs) or []
    with one_thread():
        ranking = None if importance == "auto" else scores(graph, resolved(importance), batches, seed, loss)
        table = error_table(graph, batches, ranking=ranking, repair=repair, seed=seed)
    allocator = Allocator(graph, table, round_to=round_to, most=most)
    if not allocator.groups:
        raise InputError("there is no prunable group; fxprune.visualize(model, inputs) says why each is locked")
    counts, left = allocator.met(bounds)
    for metric, share in bounds.items():
        if left[metric] > share + TOLERANCE:
            least = float(allocator.prices.shares(metric, np.array([[len(a) - 1 for a in allocator._knapsack.allowed]]))[0])
            raise TargetError(out_of_reach(metric, share, least, most))
    meta: dict[str, Any] = {"strategy": "table", "bounds": dict(bounds), "left": left, "kept_whole": list(allocator.kept_whole)}
    if trials > 1:
        judged = tried_out(allocator, bounds, counts, batches, repair, trials=trials, seed=seed, observe=observe)
        if judged:
            counts = dict(judged[0].counts)
            rounded = np.array([[counts[group.name] for group in allocator.groups]])
            meta["left"] = {metric: float(allocator.prices.shares(metric, rounded)[0]) for metric in bounds}
            meta |= {"taken": judged[0].name, "distances": {one.name: one.distance for one in judged}}
    return policy_of(graph, keep_counts(graph, counts, table.ranking), round_to, importance, meta)


def tried_out(
    allocator: Allocator,
    bounds: Mapping[str, float],
    counts: Mapping[str, int],
    batches: Sequence[Any],
    repair: Repair,
    *,
    trials: int = TRIALS,
    seed: int = 0,
    observe: Observer | None = None,
) -> list[Trial]:
    """Allocations tried on inputs that are kept apart, the one to take first; none where there are no inputs to judge by.

    Args:
        allocator: Gives the allocations, without blocks.
        bounds: As for ``allocate``; so are the others.
        counts: What the table comes to as it is, units that each group loses.
    """
    graph, ranking = allocator.graph, allocator.table.ranking
    trial = Trials(graph, batches, ranking, repair, observe)
    if not trial.possible:
        return []
    uniform = Uniform(graph, ranking, bounds, allocator.round_to, allocator.most)
    near = Near(lambda *given: allocator.met(bounds, *given)[0], lambda *given: allocator.moved(bounds, *given))
    return tried(trial, uniform, allocator.groups, counts, near, trials, seed)


def out_of_reach(metric: str, share: float, least: float, most: Any) -> str:
    """What to say of a bound, the ``share`` of a metric that may be left, where ``least`` of it stay: in the user's terms."""
    limit = "all that may go" if most is None else "all that most= lets go"
    locked = "fxprune.explain(model, inputs) says what is locked"
    if metric == "sparsity":
        ask, gone = 1 - share, f"{1 - least:.3g} of the output channels go"
        return f"'sparsity={ask:g}' cannot be met: with {limit}, {gone}; give a smaller share; {locked}"
    return f"'{metric}={share:g}' cannot be met: with {limit}, {least:.3g} of the {metric} are left; give a larger share; {locked}"


def policy_of(graph: CouplingGraph, keep: Keep, round_to: int, importance: Any, meta: Mapping[str, Any]) -> Policy:
    """The policy of kept units (one boolean each), which it lists, so that ``compress`` finds them again without calibration data."""
    sparsity, units = {}, {}
    for group in graph.groups:
        if group.prunable:
            gone = np.flatnonzero(~keep[graph.starts[group.number] : graph.starts[group.number + 1]])
            sparsity[group.name] = len(gone) / group.size
            if len(gone):
                units[group.name] = ranges(torch.from_numpy(gone))
    options = {**graph.options, "round_to": round_to, "importance": importance_name(importance), "units": units}
    return Policy(sparsity, graph.inputs, options, meta)
