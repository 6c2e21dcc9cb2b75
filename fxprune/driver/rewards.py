"""Reward strategies: R = accuracy + alpha x MACs removed + beta x parameters removed (Wang 2024, sec. 3.3), where accuracy may be
stood for by likeness to the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxprune.driver.config import Reward, SearchConfig
from fxprune.errors import SearchError, kind_of
from fxprune.imports import by_path

SHARE = 0.25  # what a whole network's cost is worth, in accuracy; the paper gives no figure


@dataclass(frozen=True)
class WeightedReward:
    """Accuracy plus the removed shares of the costs, each with its weight; picklable and comparable.

    ``likeness``: the share of accuracy that the score's "likeness" stands for, where it gives one.
    """

    alpha: float = 0.0
    beta: float = 0.0
    latency: float = 0.0
    likeness: float = 0.0

    def __call__(self, metrics: Mapping[str, float]) -> float:
        reward = metrics["accuracy"]
        if self.likeness and "likeness" in metrics:
            reward += self.likeness * (metrics["likeness"] - reward)
        for weight, name in ((self.alpha, "macs"), (self.beta, "params"), (self.latency, "latency")):
            if weight:
                reward += weight * (1 - metrics[name])
        return reward


REWARDS: Mapping[str, WeightedReward] = {
    "accuracy": WeightedReward(),
    "flops": WeightedReward(alpha=SHARE),
    "params": WeightedReward(beta=SHARE),
    "latency": WeightedReward(latency=SHARE),
}


def make(config: SearchConfig) -> Reward:
    """The reward that a configuration asks for: a preset, an import path, or the user's own function of the metrics."""
    chosen = config.reward
    if callable(chosen):
        return _as_reward(chosen)
    if chosen in REWARDS:
        preset = REWARDS[chosen]
        alpha = preset.alpha if config.alpha is None else config.alpha
        beta = preset.beta if config.beta is None else config.beta
        return WeightedReward(alpha, beta, preset.latency, config.likeness)
    if ":" in str(chosen):
        return _as_reward(by_path(str(chosen), "reward", SearchError))
    raise SearchError(f"unknown reward {chosen!r}; use one of {', '.join(REWARDS)}, or module:function")


def _as_reward(function: Any) -> Reward:
    if not callable(function):
        raise SearchError(f"reward {function!r} is no function; give a function of a metrics mapping that returns a number")

    def reward(metrics: Mapping[str, float]) -> float:
        found = function(metrics)
        try:
            return float(found)
        except (TypeError, ValueError) as error:
            raise SearchError(f"the reward function returned {kind_of(found)}; it must return a number") from error

    return reward
