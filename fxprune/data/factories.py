"""Data sets that a function of the user's makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import TensorDataset

from fxprune.data.images import Images, InMemory, Stacked, class_numbers
from fxprune.data.readers import Asked, DatasetParts
from fxprune.errors import InputError, kind_of
from fxprune.imports import by_path, call_factory


def from_factory(spec: str, asked: Asked) -> DatasetParts:
    """``package.module:factory`` gives (train, test), (train, validation, test), or a mapping with these keys.

    Each is a map-style data set of image tensors (channels, height, width), uint8 or float in [0, 1], with class numbers.
    The factory may take ``image_size``. Images are used as they are: floats not normalised unless the user says so.
    """
    factory = by_path(spec, "data")
    if not callable(factory):
        raise InputError(f"data {spec!r} is {kind_of(factory)}; it must be a function that gives the data sets")
    made = call_factory(spec, "data", factory, image_size=asked.size)
    if isinstance(made, tuple | list) and len(made) in (2, 3):
        made = dict(zip(("train", "test") if len(made) == 2 else ("train", "validation", "test"), made, strict=True))
    if not isinstance(made, Mapping) or "train" not in made or not set(made) <= {"train", "validation", "test"}:
        raise InputError(f"data {spec!r} gave {kind_of(made)}; it must give (train, test) or (train, validation, test)")
    parts = {str(part): _stacked(dataset, f"data {spec!r}, {part}") for part, dataset in made.items() if dataset is not None}
    classes = 1 + max(int(images.labels.max()) for images in parts.values())
    first = parts["train"][0][0]
    statistics = None if first.dtype == torch.uint8 else ((0.0,) * len(first), (1.0,) * len(first))
    return DatasetParts(parts["train"], classes, parts.get("validation"), parts.get("test"), statistics)


def _stacked(dataset: Any, where: str) -> Images:
    """The user's data set, asked for each sample again: it may augment."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(f"{where} is {kind_of(dataset)}; it must have a length and give (image, class number) by number")
    read = Stacked(dataset, where)
    if isinstance(dataset, TensorDataset) and len(dataset):
        read.pair(0)
        return Images(class_numbers(dataset.tensors[1], where), InMemory(dataset.tensors[0]))
    labels, shapes = [], {}
    for number in range(len(dataset)):
        image, label = read.pair(number)
        shapes[number] = image.shape
        labels.append(label)
    read.alike(shapes)
    return Images(class_numbers(labels, where), read)
