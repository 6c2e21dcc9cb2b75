"""Pruning while a network trains from scratch: channels go a few at a time, in the user's own loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxprune.allocation.target_policies import bounds_of
from fxprune.api import compress
from fxprune.attached import record_of
from fxprune.costs.profiling import profile
from fxprune.errors import InputError
from fxprune.training.rebinding import rebind


class GradualPruning:
    """Brings a network onto a target in several cuts between two steps of its training.

    What is left of the metric falls fast at first and slowly near the end, by the cubic curve of Zhu and Gupta 2017
    (https://arxiv.org/abs/1710.01878, eq. 1), so that early cuts are made where training still moves much and late ones have time to heal.
    After each cut the optimizer goes on with the state of what is left (``fxprune.rebind``), and so do its schedulers.

        pruning = fxprune.GradualPruning(model, optimizer, images[:1], "macs=0.5", begin=200, end=2000)
        for images, labels in loader:
            loss = criterion(pruning.model(images), labels)
            pruning.optimizer.zero_grad()
            loss.backward()
            pruning.optimizer.step()
            pruning.step()

    Args:
        model: The network, as for ``compress``. It is not changed; once the first cut is made, ``self.model`` is a slim module.
        optimizer: Built on its parameters.
        example_inputs: As for ``compress``.
        target: One metric and what is to be left of it, "macs=0.5" or "params=0.5", as for ``compress``.
        begin: Calls of ``step`` before the first cut.
        end: Calls of ``step`` before the last.
        cuts: How many in all. Each traces and slices the network again: a second or so.
        schedulers: The optimizer's learning rate schedulers, which from then on set the new one's rates.
        options: Further arguments of ``compress``: ``importance``, ``calibration`` (allocates by error tables), ``most``, ``round_to``, ...

    Attributes:
        model: The network as it is now.
        optimizer: Its optimizer.
        history: One (calls of ``step``, share of the metric that is left) for each cut.

    Raises:
        InputError: ``begin``, ``end`` and ``cuts`` do not fit together, or several metrics.
        PolicyError: The target is malformed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_inputs: Any,
        target: str = "macs=0.5",
        *,
        begin: int,
        end: int,
        cuts: int = 8,
        schedulers: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        bounds = bounds_of(target)
        if len(bounds) != 1 or next(iter(bounds)) not in _METRICS:
            raise InputError(f"gradual pruning takes {' or '.join(_METRICS)} as its target, not {target!r}")
        if not 0 <= begin <= end or cuts < 1 or (cuts > 1 and end - begin < cuts - 1):
            raise InputError(f"begin={begin}, end={end} and cuts={cuts} do not fit: end - begin must be cuts - 1 or more, none below 0")
        self.model, self.optimizer, self.history = model, optimizer, list[tuple[int, float]]()
        ((self._metric, self._final),) = bounds.items()
        self._example, self._schedulers, self._options = example_inputs, schedulers, options
        self._steps = 0
        self._due = [begin + round((end - begin) * cut / max(1, cuts - 1)) for cut in range(cuts)]
        self._begin, self._end = begin, end
        self._whole = self._cost()

    def step(self) -> bool:
        """Count one step of the training, and cut where one is due.

        Returns:
            Whether channels went: ``self.model`` and ``self.optimizer`` are new ones then.

        Raises:
            TargetError: What is due cannot be met, as when the rest is locked.
        """
        due = self._steps in self._due
        self._steps += 1
        return self._cut(self._steps - 1) if due else False

    def _cut(self, step: int) -> bool:
        done = 1.0 if self._end == self._begin else (step - self._begin) / (self._end - self._begin)
        # One more cut than the curve's points: its first is at the start, where nothing is gone yet.
        place = (1 + done * (len(self._due) - 1)) / len(self._due)
        wanted = self._final + (1 - self._final) * (1 - place) ** 3
        share = wanted * self._whole / self._cost()
        if share >= 1:
            return False
        training = self.model.training
        slim = compress(self.model, f"{self._metric}={share!r}", self._example, **self._options)
        self.optimizer = rebind(self.optimizer, slim, schedulers=self._schedulers)
        self.model = slim.train(training)
        self.history.append((step, self._cost() / self._whole))
        return True

    def _cost(self) -> float:
        made = record_of(self.model)
        found = profile(self.model, self._example) if made is None else made.after
        return float(getattr(found, self._metric))


_METRICS = ("macs", "params")
