"""Data sets by their spec, in three parts: training, validation (a held-out part of the training data) and test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fxprune.data import readers
from fxprune.data.factories import from_factory
from fxprune.data.images import Batches, Images
from fxprune.errors import InputError

# The statistics that most published weights for RGB images were trained with; grey images have no such habit.
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY_STATISTICS = ((0.5,), (0.5,))

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Data:
    """A classification data set. The parts are map-style: ``train[i]`` is an image (channels, height, width) and its class.

    ``mean``, ``std``: one number a channel; images in [0, 1] are normalised with them in every batch.
    ``image_size``: pixels of each side. ``padding``, ``flip``: the augmentation of training batches (see ``fxprune.data.images.Batches``).
    """

    name: str
    train: Images
    validation: Images
    test: Images
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    padding: int = 0
    flip: bool = False

    def batches(
        self,
        part: Part,
        batch_size: int = 128,
        *,
        training: bool = False,
        augmented: bool = False,
        limit: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Batches:
        """Normalised batches of a part, on ``device``.

        ``training``: shuffled again each epoch and augmented. ``augmented``: augmented as in training, in order and always alike, which
        makes images that a network was trained on about as hard for it as unseen ones. ``limit``: that many samples, drawn once at
        random by ``seed``; for calibration and for scoring on part of the validation data.
        """
        images: Images = getattr(self, part)
        if limit is not None and limit < len(images):
            images = images.select(torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit])
        padding, flip = (self.padding, self.flip) if training or augmented else (0, False)
        return Batches(images, batch_size, self.mean, self.std, training, padding, flip, seed, device)

    def example(self) -> torch.Tensor:
        """One normalised test image, of shape (1, channels, height, width): the example input of a network for these data."""
        images, _ = next(iter(self.batches("test", 1)))
        return images


def load_data(
    spec: str,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
    validation: float | None = None,
    seed: int = 0,
) -> Data:
    """Read ``digits``, ``warped-digits``, ``imagefolder:DIR``, ``parquet:DIR``, ``torchvision:NAME:DIR`` or ``package.module:factory``.

    ``mean``, ``std``: for images in [0, 1], one number a channel; left out, what is usual for the data. ``image_size``: pixels a side;
    left out, that of the first image, at most 224. ``validation``: the share of the training data to hold out where the data set has no
    validation part of its own (0.1; for digits 0.2). Data without a test part lose a fifth to one first. ``seed`` decides both splits.
    Raises ``InputError`` in one line for whatever cannot be read, ``DependencyError`` with the command that installs what is missing.
    """
    if std is not None and not all(s > 0 for s in std):
        raise InputError(f"std is {','.join(str(s) for s in std)}; its numbers must be above 0")
    if image_size is not None and image_size < 1:
        raise InputError(f"image size is {image_size}; it must be at least 1 pixel")
    if validation is not None and not 0 < validation < 1:
        raise InputError(f"the validation share is {validation}; it must lie between 0 and 1")
    channels = len(mean) if mean is not None and len(mean) in (1, 3) else None
    found = _read(spec, readers.Asked(image_size, channels))
    train, test = (found.train, found.test) if found.test is not None else found.train.split(0.2, seed)
    held_out = found.validation
    if held_out is None:
        train, held_out = train.split(validation or (0.2 if spec == "digits" else 0.1), seed + 1)
    for part, images in (("training", train), ("validation", held_out), ("test", test)):
        if len(images) == 0:
            raise InputError(f"data {spec!r} leave no {part} sample; more than two images of a class are needed")
    channels, _, side = train[0][0].shape  # after reading: what the images have, rather than what was asked
    usual = found.statistics or (IMAGENET_STATISTICS if channels == 3 else (GREY_STATISTICS[0] * channels, GREY_STATISTICS[1] * channels))
    mean, std = mean or usual[0], std or usual[1]
    if not len(mean) == len(std) == channels:
        raise InputError(f"mean and std have {len(mean)} and {len(std)} numbers; the images of {spec!r} have {channels} channels")
    return Data(spec, train, held_out, test, found.num_classes, mean, std, side, found.padding, found.flip)


def _read(spec: str, asked: readers.Asked) -> readers.DatasetParts:
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        return readers.digits(asked)
    if spec == "warped-digits":
        return readers.warped_digits(asked)
    if kind == "torchvision":
        name, _, folder = rest.partition(":")
        if not name or not folder:
            raise InputError(f"data {spec!r} is not of the form torchvision:NAME:DIR")
        return readers.torchvision(name, Path(folder).expanduser(), asked)
    if kind in ("imagefolder", "parquet") and rest:
        read = readers.image_folder if kind == "imagefolder" else readers.parquet
        return read(Path(rest).expanduser(), asked)
    if not rest or kind in ("imagefolder", "parquet"):
        raise InputError(
            f"data {spec!r} is none of digits, warped-digits, imagefolder:DIR, parquet:DIR, torchvision:NAME:DIR, package.module:factory"
        )
    return from_factory(spec, asked)
