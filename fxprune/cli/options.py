"""What a command-line search is asked to do: plain data, complete enough to be resumed by another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fxprune.driver.config import SearchConfig
from fxprune.errors import SearchError
from fxprune.evaluation.synthetic import NONE
from fxprune.exporting.formats import format_named

DIGITS_MODEL = "fxprune.models:digits_net"
RANDOM_WEIGHTS = ("torchvision:", "timm:", "fxprune.models:")  # what these build has not been trained


@dataclass(frozen=True)
class Options:
    """One run of ``fxprune-search``. Data and model by their specs (``fxprune.data.load_data``, ``fxprune.models.load_model``).

    ``train_epochs``: epochs of ordinary training before the search; None: enough for digits where there are no weights, else none.
    ``distill_epochs``: epochs of distillation after it; None: by the size of the data. ``baseline``: whether the uniform allocation is
    tested too and, where the result is distilled, that one and the one halfway to it as well, of which the best is kept.
    ``score_images``, ``calibration_images``: held-out images a candidate is scored on; training images for
    importance and for the repair of a candidate before it is scored. ``repair_images``: training images for the repair of the result.
    ``calibration``: "data", or "none": both are made without data then, ``calibration_images`` of them (``fxprune.synthetic_batches``).
    ``rough_images``: as many of the score images judge all but the finalists, where ``search.finalists`` are asked for.
    ``augment``: whether all these images are moved and mirrored as in training; None: unless this run trains the network itself.
    ``tensorboard``: whether each round's figures go to ``out/tensorboard`` too.
    ``export``: formats of other runtimes (``fxprune.export``) that the result is written in too.
    """

    model: str = DIGITS_MODEL
    weights: str | None = None
    data: str = "digits"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    batch_size: int = 128
    train_epochs: int | None = None
    distill_epochs: int | None = None
    distill_lr: float | None = None
    baseline: bool = True
    score_images: int = 1000
    rough_images: int = 256
    calibration: str = "data"
    calibration_images: int = 256
    repair_images: int = 2048
    augment: bool | None = None
    preset: str = "default"
    out: str = "fxprune-out"
    export: tuple[str, ...] = ()
    tensorboard: bool = False
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        for name in ("batch_size", "score_images", "rough_images", "calibration_images", "repair_images", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SearchError(f"{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.calibration not in ("data", NONE):
            raise SearchError(f'calibration is {self.calibration!r}; it must be "data" or "{NONE}"')
        for name in self.export:
            format_named(name)
        for name in ("train_epochs", "distill_epochs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SearchError(f"{name.replace('_', '-')} is {value}; it must be 0 or more")
        if self.distill_lr is not None and not 0 < self.distill_lr < float("inf"):
            raise SearchError(f"distill-lr is {self.distill_lr}; it must be above 0")
        if self.weights is None and self.training_epochs == 0 and self.model.startswith(RANDOM_WEIGHTS):
            raise SearchError(
                f"model {self.model!r} comes without trained weights; give --weights FILE, or --train-epochs N to train it first"
            )

    @property
    def training_epochs(self) -> int:
        """Epochs of training before the search."""
        if self.train_epochs is not None:
            return self.train_epochs
        return 20 if self.data == "digits" and self.weights is None and self.model.startswith(RANDOM_WEIGHTS) else 0

    @property
    def augmented(self) -> bool:
        """Whether candidates are scored and repaired on augmented images.

        A network knows the images it was trained on too well to tell which of its parts it needs for others; moved and mirrored they rank
        candidates as unseen ones do. What this run trains has never seen the held-out images: they are as hard as unseen ones already.
        """
        if self.augment is not None:
            return self.augment
        return self.weights is not None or self.training_epochs == 0

    @property
    def distillation_epochs(self) -> int:
        """Epochs of distillation after the search."""
        if self.distill_epochs is not None:
            return self.distill_epochs
        return 20 if self.data == "digits" or self.preset == "paper" else 2  # 20: what the paper gives each step

    def state(self) -> dict[str, Any]:
        """The options as JSON. Raises ``SearchError`` for a function among them, which no other process could resume."""
        described = {**asdict(self), "search": self.search.described()}
        for name in ("strategy", "reward", "importance", "repair", "loss"):
            if callable(getattr(self.search, name)):
                raise SearchError(f"{name} is a function; from the command line name it as package.module:function")
        for name, cost in (self.search.costs or {}).items():
            if callable(cost):
                raise SearchError(f"cost {name!r} is a function; from the command line name it as {name}=package.module:function")
        return described

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Options:
        """Resume from what ``state`` returned, or a file of the same form."""
        values = dict(state)
        known = {one.name for one in fields(SearchConfig)}
        search = {name: _tupled(value) for name, value in dict(values.pop("search", {})).items() if name in known}
        own = {one.name for one in fields(cls)}
        return cls(search=SearchConfig(**search), **{name: _tupled(value) for name, value in values.items() if name in own})

    def moved(self, **changes: Any) -> Options:
        """The same run with other workers: ``jobs``, ``executor`` or ``device``, which change no result."""
        return replace(self, search=replace(self.search, **changes))


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
