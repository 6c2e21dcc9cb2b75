"""RL-Pruner: a pruning distribution over the groups, sampled around and moved towards what scored best, prune step by prune step.

After Wang 2024 (https://arxiv.org/abs/2411.06463). It differs in what ``SearchConfig`` marks as ours, and in two places marked below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fxprune.driver.problem import FloatArray, IntArray
from fxprune.driver.simplex import on_simplex, proportional, spread
from fxprune.driver.strategies.base import Scored, Strategy
from fxprune.driver.strategies.magnitude import global_ranking
from fxprune.driver.strategies.rl import sampler
from fxprune.driver.strategies.rl.buffer import Entry, ReplayBuffer
from fxprune.driver.strategies.rl.epsilon import epsilon_at
from fxprune.driver.strategies.rl.qvalue import q_values
from fxprune.driver.strategies.rl.update import updated
from fxprune.driver.strategies.rl.value import ValueModel
from fxprune.driver.strategies.table import from_table, from_trials

SHORTEST = 12  # rounds before it is asked whether more pay
WIDER = 1.25  # what the noise grows by after a round that came to known architectures alone,
WIDEST = 8.0  # and at most


class RLPruner(Strategy):
    """State: units kept in every group. Action: each group's share of the step's removals. Policy: the distribution actions come from."""

    def start(self) -> None:
        config, space = self.config, self.space
        self.at: IntArray = self.budget.start.copy()
        self.accuracy: float | None = None  # of the architecture at hand; scored first thing
        self.buffer = ReplayBuffer(config.samples)
        self.round = 0
        self.stale = 0
        self.peak = -math.inf
        self.widening = 1.0  # of the noise (ours): in a small network all draws may come to the same few architectures
        self.peaks: list[float] = []  # the best Q after every round of the step
        self.before_reset: Entry | None = None  # what the step came to before a sharp drop had it redone
        self.closed = False
        self.nodes: list[sampler.Node] = []
        self.value = ValueModel(space.units)
        # To bring a draw onto a measured target costs more than to score it: then there is nothing to screen.
        measured = any(target.metric == "latency" for target in self.budget.targets) and "latency" not in space.slack
        self.draws = 1 if measured else config.screen
        total = int(self.budget.uniform().sum() - self.at.sum())
        share = max(1, round(config.step_ratio * int(space.units.sum())))
        self.planned = max(1, config.steps or math.ceil(total / share))
        self.per_step = max(1, math.ceil(total / config.steps)) if config.steps else share
        scale = 1 / len(space.names) if config.noise_relative else 1.0
        self.noise: float | FloatArray = config.noise * scale
        if space.blocks:  # noise is in mean groups, of which a block is a small one
            self.noise = np.where(space.widths > 0, self.noise, self.noise * space.units / max(float(space.widths.mean()), 1.0))
        self.first: IntArray | None = from_table(self.budget) if config.table != "no" and space.table is not None else None
        self.policy: FloatArray = self._first_policy()

    def propose(self) -> list[IntArray]:
        self.closed = False
        if self.accuracy is None:
            return [self.at]
        if self.budget.fits(self.at):
            return []
        config = self.config
        begun = self._begun() if self.step == self.round == 0 else []
        self.nodes = sampler.trajectories(
            self.at,
            self.policy,
            self._advance,
            samples=config.samples * (config.halving**self.space.rungs if self._races() else 1),
            depth=config.depth,
            scaling=config.depth_scaling,
            noise=self.noise * self.widening,
            floor=config.floor,
            rng=self.rng,
            draws=self.draws if len(self.value) > config.samples else 1,
            choose=self._most_promising,
        )
        for i, first in enumerate(begun[: config.samples if config.depth == 1 else 1]):
            self.nodes[i] = sampler.Node(-1, self._towards(first), first)
        return [node.removed for node in self.nodes]

    def learn(self, outcomes: Sequence[Scored]) -> None:
        if self.accuracy is None:
            self.accuracy = outcomes[0].accuracy
            return
        config = self.config
        fresh = any(outcome.removed not in self.value for outcome in outcomes)
        for outcome in outcomes if config.screen > 1 else ():
            self.value.add(outcome.removed, outcome.reward)
        values = q_values(self.nodes, [outcome.reward for outcome in outcomes], config.discount, config.depth)
        for node, value, outcome in zip(self.nodes, values, outcomes, strict=True):
            if node.parent < 0:
                self.buffer.add(Entry(value, node.action, node.removed, outcome.accuracy))
        best = self.buffer.best
        self.policy = updated(self.policy, best.action, step_length=config.step_length, clip=config.clip, floor=config.floor)
        self.round += 1
        if fresh or config.screen == 1 or self.widening >= WIDEST:
            self.widening = 1.0 if fresh else self.widening
            self.stale = 0 if best.q > self.peak + config.improvement else self.stale + 1
            self.peak = max(self.peak, best.q)
            self.peaks.append(self.peak)
        else:  # a round that scored nothing says nothing of what more would pay
            self.widening = min(WIDER * self.widening, WIDEST)
        if not self._pays() or self.round >= config.rounds or (config.patience is not None and self.stale >= config.patience):
            self._move()

    def wanted(self, asked: int) -> int:
        return min(asked, self.config.samples) if self.accuracy is not None and self._races() else asked

    def narrowed(self, chosen: Sequence[int]) -> None:
        self.nodes = [self.nodes[i] for i in chosen]

    def _races(self) -> bool:
        """Whether more candidates are drawn than are scored in full (ours). Not in the first round, whose first sample is given, nor along
        trajectories, where children belong to their parents."""
        return self.space.rungs > 0 and self.config.halving > 1 and self.config.depth == 1 and not self.step == self.round == 0

    def step_done(self) -> bool:
        return self.closed

    def steps(self) -> int:
        return max(self.planned, self.step + (0 if self.budget.fits(self.at) else 1))

    def progress(self) -> float:
        return min(1.0, (self.step + self.round / self.config.rounds) / self.steps())

    def current(self) -> IntArray:
        return self.at

    def weights_changed(self) -> None:
        self.accuracy = None
        self.value.clear()

    def result(self) -> IntArray:
        if self.budget.fits(self.at):
            return self.at
        best = self.buffer.best.action if len(self.buffer) else self.policy
        return self.budget.project(self.at, best)

    def notes(self) -> dict[str, Any]:
        return {"policy": [round(float(p), 6) for p in self.policy], "epsilon": self._epsilon(), "redone": self.before_reset is not None}

    def figures(self) -> dict[str, float]:
        return {"epsilon": self._epsilon(), "policy_entropy": -float((self.policy * np.log(self.policy)).sum())}

    def memory(self) -> dict[str, Any]:
        return {
            "at": self.at.tolist(),
            "accuracy": self.accuracy,
            "policy": self.policy.tolist(),
            "buffer": self.buffer.state(),
            "round": self.round,
            "stale": self.stale,
            "peaks": self.peaks,
            "widening": self.widening,
            "peak": self.peak if math.isfinite(self.peak) else None,
            "before_reset": self.before_reset.state() if self.before_reset else None,
            "value": self.value.state(),
        }

    def recall(self, memory: dict[str, Any]) -> None:
        self.at = np.array(memory["at"], dtype=np.int64)
        self.accuracy = memory["accuracy"]
        self.policy = np.array(memory["policy"], dtype=np.float64)
        self.buffer.restore(memory["buffer"])
        self.round, self.stale = memory["round"], memory["stale"]
        self.peaks = list(memory["peaks"])
        self.widening = memory.get("widening", 1.0)
        self.peak = -math.inf if memory["peak"] is None else memory["peak"]
        self.before_reset = Entry.of(memory["before_reset"]) if memory["before_reset"] else None
        self.value.restore(memory["value"])

    def _first_policy(self) -> FloatArray:
        """The table's allocation, or proportional to what the groups have left, mixed with the importance ranking's by ``warm_start``."""
        weight, floor = self.config.warm_start, self.config.floor
        if self.first is not None:
            return self._towards(self.first)
        even = proportional(np.minimum(self.space.units - self.at, self.space.widths), floor)
        if not weight:
            return even
        ranked = global_ranking(self.budget)
        return on_simplex((1 - weight) * even + weight * ranked / max(int(ranked.sum()), 1), floor)

    def _begun(self) -> list[IntArray]:
        """The first samples of all, to the unit (ours): the best of some allocations that were tried out, and the table's own. The policy
        begins with the first of them."""
        if self.first is None or self.planned > 1:
            return []
        best = from_trials(self.budget)
        if best is None or np.array_equal(best, self.first):
            return [self.first]
        self.policy = self._towards(best)
        return [best, self.first]

    def _towards(self, removed: IntArray) -> FloatArray:
        """The action that leads to ``removed``."""
        return on_simplex(np.maximum(removed - self.at, 0) / max(int(removed.sum()), 1), self.config.floor)

    def _most_promising(self, drawn: Sequence[IntArray]) -> int:
        """Of the architectures drawn, the one of highest expected reward (ours; the paper scores what it draws), new ones before known."""
        if len(drawn) == 1:
            return 0
        expected = self.value.predict(drawn)
        expected[[removed in self.value for removed in drawn]] -= np.inf
        return int(np.argmax(expected))

    def _pays(self) -> bool:
        """Whether more rounds are worth their evaluations: what they gain is judged by what the later half of those so far gained, as many
        more as there were would hardly gain more (ours). ``SHORTEST`` rounds are always made."""
        pays = self.config.pays
        return (
            pays is None
            or self.config.patience is None
            or len(self.peaks) < SHORTEST
            or self.peaks[-1] - self.peaks[(len(self.peaks) - 1) // 2] >= pays
        )

    def _epsilon(self) -> float:
        config = self.config
        return epsilon_at(self.step, self.planned, start=config.epsilon, decay=config.epsilon_decay, share=config.epsilon_share)

    def _advance(self, removed: IntArray, action: FloatArray, level: int) -> IntArray:
        """The architecture that ``action`` leads to: a step's worth of units away, and exactly on the budget where that is passed."""
        if self.budget.fits(removed):
            return removed
        if self.config.step_by == "cost":  # ours: equal shares of the way in cost, so the candidates of a step compare
            return self.budget.project(removed, action, min(1.0, (self.step + level + 1) / self.planned))
        room = self.space.room - removed
        further = removed + spread(action, min(self.per_step, int(room.sum())), room)
        return self.budget.project(removed, action) if self.budget.fits(further) else further

    def _move(self) -> None:
        """Choose the next architecture, epsilon-greedily; after a sharp drop of accuracy reset the policy and redo the step, once."""
        explore = self.rng.random() < self._epsilon()
        chosen = self.buffer[int(self.rng.integers(len(self.buffer)))] if explore else self.buffer.best
        fell = self.accuracy is not None and chosen.accuracy < (1 - self.config.sharp_drop) * self.accuracy
        if fell and self.before_reset is None and self.planned > 1:  # ours: a single step's drop is the target's, not the policy's
            self.before_reset = chosen
            self._restart(proportional(self.space.units - self.at, self.config.floor))
            return
        if self.before_reset is not None and self.before_reset.q > chosen.q:
            chosen = self.before_reset  # ours: the redone step must be the better one to count
        self.at, self.accuracy = chosen.removed, chosen.accuracy
        self.before_reset = None
        self.closed = True
        self._restart(self.policy)

    def _restart(self, policy: FloatArray) -> None:
        self.buffer.clear()
        self.policy = policy
        self.round, self.stale, self.peak, self.peaks = 0, 0, -math.inf, []
