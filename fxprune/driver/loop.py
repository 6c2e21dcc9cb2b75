"""The loop: ask the strategy, score, tell it, write it down; from the first checkpoint to the outcome."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fxprune.atomic import remove
from fxprune.driver import checkpoint, rewards, strategies
from fxprune.driver.budget import Budget
from fxprune.driver.config import SearchConfig
from fxprune.driver.executors import choice
from fxprune.driver.executors.base import Executor
from fxprune.driver.history import History
from fxprune.driver.measured import LATENCY, Measured
from fxprune.driver.outcome import Allocation, Progress, SearchOutcome
from fxprune.driver.problem import IntArray, Problem
from fxprune.driver.scoring import Evaluator
from fxprune.driver.selection import best_of
from fxprune.driver.strategies.base import Scored, Strategy
from fxprune.driver.strategies.table import from_table
from fxprune.driver.targets import Point
from fxprune.errors import PruningWarning, SearchError, TargetError

OnEvent = Callable[[Progress], None]
FIRST_LOOKS, CORRECTIONS = 2, 12  # networks measured at most before a search for a latency, beside the smallest, and after it
AIM = 0.4  # of the tolerance: a latency measured so near to its target needs no correction
PREDICTED, AIMED = 3, 6  # corrections that may all go by the prediction, and those that aim so high; every other one halves what is left
NEARER = 0.7  # of how far the one before was off, that a prediction must come to be followed on


def run(
    problem: Problem,
    config: SearchConfig,
    *,
    checkpoint_dir: Path | str | None = None,
    on_event: OnEvent | None = None,
    executor: Executor | None = None,
    resume: bool = False,
) -> SearchOutcome:
    """Search ``problem`` for the removal vector of highest reward on target.

    ``checkpoint_dir``: where the state is kept after every round; with ``resume`` the search goes on from what is there, bit for bit.
    ``executor``: scores the candidates; by default what ``config`` names, closed at the end.
    Raises ``TargetError``, whose ``nearest`` is the outcome that comes closest, if no candidate is on target; ``SearchError`` for options
    that do not fit; ``EvaluationError`` for a score that is not a finite number. Where the nearest that was measured for a latency is
    faster than asked by more than the tolerance, it is the outcome, with a ``PruningWarning``: a clock moves, and the bound is kept.
    """
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    if resume and folder is None:
        raise SearchError("resume needs checkpoint_dir, the folder of the search to go on with")
    if config.recover_every and problem.recover is None:
        raise SearchError("recover_every asks for training between prune steps, but the problem has no recover; set recover_every=0")
    strategies.find(config.strategy)
    used = executor or choice.make(config)
    try:
        search = _Search(problem, config, folder, on_event, used)
        if resume and folder is not None:
            search.restore(folder)
        return search.all_points()
    finally:
        if executor is None:
            used.close()


class _Search:
    """One search with everything that a checkpoint holds."""

    def __init__(self, problem: Problem, config: SearchConfig, folder: Path | None, on_event: OnEvent | None, executor: Executor) -> None:
        self.measured = Measured(problem.cost, problem.measured, problem.clock)
        self.problem = problem = replace(problem, cost=self.measured)
        self.config, self.folder, self.on_event = config, folder, on_event
        self.evaluator = Evaluator(problem, rewards.make(config), executor, rough=config.finalists > 0)
        self.history = History()
        self.baselines: dict[str, Allocation] = {}
        self.points: list[SearchOutcome] = []
        self.strategy_state: dict[str, Any] | None = None
        self.weights: str | None = None
        self.spent, self.begun = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.begun

    @property
    def limit(self) -> int | None:
        """How many evaluations may be used up when the point that is searched now ends: equal shares, and what earlier ones left over."""
        if self.config.evaluations is None:
            return None
        return math.ceil(self.config.evaluations * (len(self.points) + 1) / len(self.config.points))

    def all_points(self) -> SearchOutcome:
        """Search every point of the targets, each from where the one before it ended."""
        self.save()
        points = self.config.points
        for targets in points[len(self.points) :]:
            start = self.points[-1].removed if self.points else None
            budget = Budget(self.problem.space, self.relative(targets), self.config.tolerance, start)
            self.points.append(self.one_point(budget))
            self.history, self.baselines, self.strategy_state = History(), {}, None
            self.save()
        return _joined(self.points)

    def relative(self, targets: Point) -> Point:
        """``targets`` with times as shares of what the original takes. Raises ``SearchError`` where it takes no more."""
        if all(target.seconds is None for target in targets):
            return targets
        clock, wholes = self.problem.clock, self.problem.measured
        if clock is None and LATENCY not in wholes:
            self.problem.cost(self.problem.space.zeros())[LATENCY]  # measured where it is looked up
        if clock is None and LATENCY not in wholes:
            raise SearchError("this problem does not say what the original takes; give the latency as a share, for example latency=0.5")
        return tuple(target.of(wholes[LATENCY] if clock is None else clock.seconds()) for target in targets)

    def timed(self, budget: Budget) -> bool:
        """Whether a latency is asked for that is predicted, and has to be measured in the end."""
        return self.problem.clock is not None and any(target.metric == LATENCY for target in budget.targets)

    def calibrate(self, budget: Budget) -> None:
        """Measure the smallest network, where predictions begin, and an allocation on the target, so that what is searched is near it."""
        if not self.timed(budget) or self.baselines:
            return
        self.measured.share(budget.space.room)
        budget.forget()
        for _ in range(FIRST_LOOKS if budget.fits(budget.space.room) else 0):
            tried = budget.uniform() if budget.space.table is None else from_table(budget)
            self.measured.share(tried)
            budget.forget()
            if abs(budget.excess(tried)) <= budget.tolerance:
                break
        self.save()

    def settled(self, strategy: Strategy, chosen: Scored) -> Scored:
        """``chosen`` measured and, where that is off its target, brought nearer step by step; the nearest that was measured."""
        budget = strategy.budget
        if not self.timed(budget):
            return chosen
        removed: IntArray | None = chosen.removed
        tried = list[IntArray]()
        while removed is not None and len(tried) < CORRECTIONS:
            self.measured.share(removed)
            budget.forget()
            if abs(budget.excess(removed)) <= AIM * budget.tolerance:
                self.measured.confirm(removed)
                budget.forget()
            tried.append(removed)
            aim = AIM if len(tried) <= AIMED else 1.0
            removed = None if abs(budget.excess(removed)) <= aim * budget.tolerance else self.nearer(strategy, tried)
        best = min(tried, key=lambda one: abs(budget.excess(one)))
        if best is not tried[-1]:
            self.measured.share(best)  # the newest counts
            budget.forget()
        self.save()
        return self.evaluator.finals([best], budget)[0]

    def nearer(self, strategy: Strategy, tried: list[IntArray]) -> IntArray | None:
        """What to measure next: by the prediction as it has been corrected or, where that does not get nearer, what lies between the two
        that were measured next to the target; None where nothing does."""
        budget, tries = strategy.budget, len(tried)
        off = [abs(budget.excess(one)) for one in tried[-2:]]
        if tries <= PREDICTED and off[-1] <= NEARER * off[0] or tries == 1:
            again = strategy.again()
            found = budget.fitted(tried[-1]) if again is None else again
            if not self.measured.knows(found):
                return found
        ends = self.measured.around(budget)
        return None if ends is None else budget.between(*ends, self.measured.knows, halfway=tries % 2 == 0)

    def one_point(self, budget: Budget) -> SearchOutcome:
        """Search one set of targets from its baselines to its outcome."""
        self.calibrate(budget)
        self.score_baselines(budget)
        if not budget.fits(budget.space.room):
            bound = self.evaluator([budget.space.room], budget)[0]
            most = "all but one unit of every group" if budget.space.most is None else "all that most= lets go"
            more = ", or blocks=True, which leaves out whole blocks" if self.timed(budget) and not budget.space.blocks else ""
            raise self.unmet(budget, bound, f"cannot be met: even with {most} removed,", more)
        strategy = strategies.find(self.config.strategy)(budget, self.config.with_targets(budget.targets))
        if self.strategy_state is not None:
            strategy.restore(self.strategy_state)
        self.tell_progress("start", strategy, self.points[-1] if self.points else self.baselines["original"])
        while self.one_round(strategy):
            self.strategy_state = strategy.state()
            self.save()
        chosen = self.settled(strategy, self.final(strategy))
        if self.history.rounds:  # a step cut short by the bound on evaluations
            self.close_step(strategy, chosen)
        self.tell_progress("end", strategy, chosen)
        if not budget.met(chosen.removed):
            grain = budget.space.grain
            coarse = "units are" if grain == 1 else f"channels in multiples of {grain} are"
            if not self.timed(budget):
                raise self.unmet(budget, chosen, f"was not met: {coarse} too coarse to come closer; the nearest found:")
            if not budget.fits(chosen.removed):
                raise self.unmet(budget, chosen, "was not met: the nearest that was measured:")
            near = f"target {budget}: the nearest that was measured is faster than asked, {budget.shown(chosen.removed)}"
            warnings.warn(near, PruningWarning, stacklevel=3)
            return replace(self.outcome(budget, chosen), note=near)
        return self.outcome(budget, chosen)

    def final(self, strategy: Strategy) -> Scored:
        """The candidate to end with. Where the search went by a rough score the best few, and the baselines, are scored in full now."""
        best = best_of(strategy, self.evaluator, max(1, self.config.finalists), keep_best=self.config.keep_best)
        if self.evaluator.rough is None:
            return best[0]
        names, budget = list(self.baselines), strategy.budget
        vectors = [*(self.baselines[name].removed for name in names), *(outcome.removed for outcome in best)]
        outcomes = self.evaluator.finals(vectors, budget)
        self.baselines = {name: _allocation(outcome, budget) for name, outcome in zip(names, outcomes, strict=False)}
        return max(outcomes[len(names) :], key=lambda outcome: outcome.reward)

    def score_baselines(self, budget: Budget) -> None:
        """Score the original network and the uniform allocation on the same budget, for the comparison that every report makes."""
        if self.baselines:
            return
        vectors = {"original": budget.space.zeros(), "uniform": budget.uniform()}
        for name, outcome in zip(vectors, self.evaluator(list(vectors.values()), budget), strict=True):
            self.baselines[name] = _allocation(outcome, budget)
        self.save()

    def one_round(self, strategy: Strategy) -> bool:
        """Ask, score, tell. Returns False when the strategy is done or the evaluations are used up."""
        vectors = strategy.ask()
        wanted = strategy.wanted(len(vectors))
        if not vectors or self.used_up(vectors[:wanted]):
            return False
        if wanted < len(vectors):
            vectors = strategy.narrow(self.evaluator.best_by_rungs(vectors, wanted, strategy.budget))
            if self.used_up(vectors):
                return False
        outcomes = self.evaluator(vectors, strategy.budget)
        best, current = outcomes[0], strategy.current()
        if len(vectors) > 1 or current is None or not np.array_equal(vectors[0], current):  # else it only scores where it stands
            best = self.history.add_round(outcomes, strategy.budget, self.evaluator.count)
        if strategy.tell(outcomes):
            current = strategy.current()
            self.close_step(strategy, best if current is None else self.evaluator([current], strategy.budget)[0])
            self.recover(strategy)
        self.tell_progress("round", strategy, best)
        return True

    def used_up(self, vectors: list[IntArray]) -> bool:
        """Whether scoring ``vectors`` would leave no evaluation for the result, and for scoring in full what takes part in the final."""
        limit = self.limit
        reserved = 1 if self.evaluator.rough is None else 1 + self.config.finalists + len(self.baselines)
        return limit is not None and self.evaluator.count + len(self.evaluator.new(vectors)) > limit - reserved

    def close_step(self, strategy: Strategy, best: Scored) -> None:
        self.history.close_step(strategy, str(self.config.described()["strategy"]), best, self.evaluator.count, self.seconds)
        self.tell_progress("step", strategy, best)

    def recover(self, strategy: Strategy) -> None:
        """Train what is left, where the configuration asks for it after this step (Wang 2024, sec. 3.5)."""
        every, current, train = self.config.recover_every, strategy.current(), self.problem.recover
        if not every or train is None or current is None or strategy.step % every or strategy.budget.fits(current):
            return
        begun = time.perf_counter()
        train(current)
        self.history.recovered(time.perf_counter() - begun)
        self.evaluator.forget()
        strategy.weights_changed()
        if self.folder is not None and self.problem.save_weights is not None:
            self.weights = f"weights-{len(self.points)}-{strategy.step}"
            self.problem.save_weights(self.folder / self.weights)

    def outcome(self, budget: Budget, chosen: Scored) -> SearchOutcome:
        targets = tuple(str(target) for target in budget.targets)
        records = tuple(self.history.records)
        found = (chosen.removed, chosen.reward, chosen.metrics, records, self.evaluator.count, dict(self.baselines), targets)
        return SearchOutcome(*found, self.halfway(budget, chosen.removed))

    def halfway(self, budget: Budget, removed: IntArray) -> IntArray | None:
        """The allocation on the budget between ``removed`` and the uniform one, if it is another than these and known to be on target."""
        if any(target.metric == LATENCY for target in budget.targets) or not budget.met(removed):
            return None
        even = self.baselines["uniform"].removed
        widths = budget.space.widths > 0  # blocks cannot go by halves: those of ``removed`` do
        found = budget.fitted(np.where(widths, (removed + even + 1) // 2, removed))
        known = any(np.array_equal(found, one) for one in (removed, even))
        return found if budget.met(found) and not known else None

    def unmet(self, budget: Budget, chosen: Scored, why: str, more: str = "") -> TargetError:
        nearest = _joined([*self.points, self.outcome(budget, chosen)])
        ways = f"ask for a milder target, {'more tolerance' if more else 'or more tolerance'}{more}"
        return TargetError(f"target {budget} {why} {budget.shown(chosen.removed)}; {ways}", nearest)

    def tell_progress(self, kind: str, strategy: Strategy, outcome: Scored | Allocation | SearchOutcome) -> None:
        if self.on_event is None:
            return
        current, budget, limit = strategy.current(), strategy.budget, self.config.evaluations
        here = 1.0 if kind == "end" else strategy.progress()
        done = max((len(self.points) + here) / len(self.config.points), self.evaluator.count / limit if limit else 0.0)
        self.on_event(
            Progress(
                kind=kind,
                targets=tuple(str(target) for target in budget.targets),
                step=strategy.step,
                steps=strategy.steps(),
                evaluations=self.evaluator.count,
                limit=limit,
                reward=outcome.reward,
                accuracy=outcome.metrics["accuracy"],
                best=self.history.best,
                share=budget.progress(outcome.removed if current is None else current),
                done=done,
                seconds=self.seconds,
                left=self.seconds * (1 - done) / done if done > 0 else None,
                rounds=sum(len(record["rounds"]) for point in self.points for record in point.history) + self.history.total,
                figures={**outcome.metrics, **strategy.figures()},
            )
        )

    def save(self) -> None:
        """Write the checkpoint; the first one before anything is scored."""
        if self.folder is None:
            return
        state = {
            "config": self.config.identity(),
            "names": list(self.problem.names),
            "units": self.problem.units.tolist(),
            "points": [point.state() for point in self.points],
            "strategy": self.strategy_state,
            "memo": self.evaluator.memo.state(),
            "measured": self.measured.state(),
            "evaluations": self.evaluator.count,
            "history": self.history.state(),
            "baselines": {name: allocation.state() for name, allocation in self.baselines.items()},
            "weights": self.weights,
            "seconds": self.seconds,
        }
        checkpoint.save(self.folder, state)
        for old in self.folder.glob("weights-*"):
            if old.name != self.weights:
                remove(old)

    def restore(self, folder: Path) -> None:
        """Resume from the folder's checkpoint. Raises ``SearchError`` when it belongs to another search."""
        state = checkpoint.load(folder)
        mine = {"config": self.config.identity(), "names": list(self.problem.names), "units": self.problem.units.tolist()}
        for key, value in mine.items():
            if state.get(key) != value:
                raise SearchError(f"the search in {folder} was made with another {key}{_difference(state.get(key), value)}")
        self.points = [SearchOutcome.of(point) for point in state["points"]]
        self.strategy_state = state["strategy"]
        self.evaluator.memo.restore(state["memo"])
        self.measured.restore(state["measured"])
        self.evaluator.count = state["evaluations"]
        self.history.restore(state["history"])
        self.baselines = {name: Allocation.of(item) for name, item in state["baselines"].items()}
        self.weights, self.spent = state["weights"], state["seconds"]
        if self.weights is not None and self.problem.load_weights is not None:
            self.problem.load_weights(folder / self.weights)


def _joined(points: list[SearchOutcome]) -> SearchOutcome:
    """The last point with the history of all, and all of them where there are several."""
    if len(points) == 1:
        return points[0]
    return replace(points[-1], history=tuple(record for point in points for record in point.history), pareto=tuple(points))


def _allocation(outcome: Scored, budget: Budget) -> Allocation:
    return Allocation(outcome.removed, outcome.reward, outcome.metrics, budget.met(outcome.removed))


def _difference(old: Any, new: Any) -> str:
    """Which option differs, where that can be said shortly."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return "; resume it with the network it was made for"
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return f": {changed[0]} was {old.get(changed[0])!r} and is now {new.get(changed[0])!r}; resume with the same options"
