"""The search: how much to take from which group. It sees numbers and functions, never a network.

Where each part of RL-Pruner (https://arxiv.org/abs/2411.06463) is: the dependency graph is ``fxprune.passes.coupling`` and the layer
pruner ``passes.rewriting.slimmer``; the Monte Carlo sampler is ``sampler``, the Q-value evaluator ``qvalue``, the policy updater ``update``
(with ``epsilon``), the replay buffer ``buffer``; the knowledge distiller is ``training.distillation``. ``strategies.rl_pruner`` puts them
together, ``loop`` runs it.
"""

from __future__ import annotations

from fxprune.driver.budget import Budget
from fxprune.driver.config import SearchConfig
from fxprune.driver.loop import run
from fxprune.driver.outcome import Allocation, Progress, SearchOutcome
from fxprune.driver.problem import Problem, Space
from fxprune.driver.strategies import STRATEGIES, Scored, Strategy
from fxprune.driver.targets import Target

__all__ = [
    "STRATEGIES",
    "Allocation",
    "Budget",
    "Scored",
    "Problem",
    "Progress",
    "SearchConfig",
    "SearchOutcome",
    "Space",
    "Strategy",
    "Target",
    "run",
]
