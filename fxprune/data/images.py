"""Labelled images, and the batches made of them: gathered, augmented and normalised a batch at a time.

Images from files are uint8, 0 to 255, and stay so until they are in a batch: CIFAR-10 takes 184 MB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fxprune.errors import FAULTS, FxPruneError, InputError, first_line, in_a_line, kind_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Images of this side and more are treated as ImageNet's are: evaluated on a centre crop of that share of the resized image.
_LARGE, _CROP_SHARE = 128, 0.875


@dataclass(frozen=True, eq=False)
class Images(Dataset[tuple[Tensor, int]]):
    """A map-style data set that can also give many samples at once.

    ``labels``: LongTensor of shape (samples,), class numbers from 0.
    ``fetch``: LongTensor of n sample numbers -> images of shape (n, channels, height, width), uint8 or float in [0, 1].
    """

    labels: Tensor
    fetch: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number = range(len(self))[index]
        return self.fetch(torch.tensor([number]))[0], int(self.labels[number])

    def select(self, indices: Tensor) -> Images:
        """The samples of those numbers, in that order; nothing is copied."""
        return Images(self.labels[indices], _Selected(self.fetch, indices))

    def split(self, share: float, seed: int) -> tuple[Images, Images]:
        """Two disjoint parts, the second with ``share`` of every class (rounded, at least one of a class of two or more).

        The same seed gives the same parts.
        """
        generator = torch.Generator().manual_seed(seed)
        first, second = [], []
        for label in sorted(set(self.labels.tolist())):
            members = (self.labels == label).nonzero().flatten()
            members = members[torch.randperm(len(members), generator=generator)]
            held_out = min(max(1, round(share * len(members))), len(members) - 1)
            first.append(members[held_out:])
            second.append(members[:held_out])
        return self.select(torch.cat(first).sort().values), self.select(torch.cat(second).sort().values)


@dataclass(frozen=True, eq=False)
class _Selected:
    fetch: Callable[[Tensor], Tensor]
    indices: Tensor

    def __call__(self, numbers: Tensor) -> Tensor:
        return self.fetch(self.indices[numbers])


@dataclass(frozen=True, eq=False)
class InMemory:
    """Fetches from one tensor of shape (samples, channels, height, width)."""

    images: Tensor

    def __call__(self, numbers: Tensor) -> Tensor:
        return self.images[numbers]


@dataclass(frozen=True, eq=False)
class Opened:
    """Fetches by opening one image after another; large ones on a thread for each core (small ones would only fight for Python's lock).

    ``open``: sample number -> PIL image; ``size``: pixels of each side of the result; ``channels``: 1 (grey) or 3 (RGB).
    """

    open: Callable[[int], Image]
    size: int
    channels: int

    def __call__(self, numbers: Tensor) -> Tensor:
        if self.size < _LARGE:
            return torch.stack([self._one(number) for number in numbers.tolist()])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return torch.stack(list(pool.map(self._one, numbers.tolist())))

    def _one(self, number: int) -> Tensor:
        return pixels(self.open(number), self.size, self.channels)


@dataclass(frozen=True, eq=False)
class Stacked:
    """Fetches from any map-style data set of (image tensor, label) pairs. ``where``: what errors call the data set."""

    dataset: Any
    where: str

    def pair(self, number: int) -> tuple[Tensor, int]:
        """A sample, checked. Raises ``InputError``."""
        found = sample(self.dataset, number, self.where)
        try:
            image, label = found
            label = int(label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.where} does not give pairs of an image tensor and a class number: {first_line(error)}") from error
        if not isinstance(image, Tensor) or image.ndim != 3:
            what = f"a tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else kind_of(image)
            raise InputError(f"{self.where} must give images as tensors of shape (channels, height, width); sample {number} is {what}")
        return image, label

    def __call__(self, numbers: Tensor) -> Tensor:
        images = [self.pair(number)[0] for number in numbers.tolist()]
        self.alike({number: image.shape for number, image in zip(numbers.tolist(), images, strict=True)})
        return torch.stack(images)

    def alike(self, shapes: Mapping[int, torch.Size]) -> None:
        """Raise ``InputError`` where images, their shapes by sample number, differ in size."""
        first = next(iter(shapes), 0)
        other = next((number for number, shape in shapes.items() if shape != shapes[first]), None)
        if other is not None:
            sizes = ["x".join(map(str, shapes[number])) for number in (first, other)]
            raise InputError(
                f"{self.where} gives images of different sizes: sample {first} is {sizes[0]}, sample {other} is {sizes[1]}; "
                "resize or crop them to one size in the data set"
            )


def sample(dataset: Any, number: int, where: str) -> Any:
    """``dataset[number]`` of a data set of the user's. What it raises becomes an ``InputError`` that names the data set, ``where``."""
    try:
        return dataset[number]
    except FxPruneError:
        raise
    except FAULTS as error:
        raise InputError(f"{where}: reading sample {number} raised {in_a_line(error)}") from error


def pixels(image: Image, size: int, channels: int) -> Tensor:
    """A PIL image as uint8 of shape (channels, size, size): the shorter side resized, the centre cut out.

    Sides of 128 pixels and more keep a margin of an eighth, as is usual where ImageNet networks are evaluated.
    """
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        shorter = round(size / _CROP_SHARE) if size >= _LARGE else size
        scale = shorter / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, channels).permute(2, 0, 1).contiguous()


@dataclass
class Batches:
    """Normalised batches of ``images``: pairs of float images (n, channels, height, width) and labels (n,), on ``device``.

    Iterating again gives the same batches; ``set_epoch`` changes the order and the augmentation, both of which depend on
    ``seed`` and the epoch alone. ``shuffle`` also drops an incomplete last batch, for BatchNorm's sake, unless it is the only one.
    ``padding`` and ``flip`` augment: crops at random offsets from zero-padded images, and mirror images.
    """

    images: Images
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shuffle: bool = False
    padding: int = 0
    flip: bool = False
    seed: int = 0
    device: torch.device | str = "cpu"
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch size is {self.batch_size}; it must be at least 1")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + bool(rest and not (self.shuffle and whole))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        samples = len(self.images)
        order = torch.randperm(samples, generator=generator) if self.shuffle else torch.arange(samples)
        for number in range(len(self)):
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            images = self.images.fetch(chosen)
            if self.padding or self.flip:
                images = augmented(images, self.padding, self.flip, generator)
            yield self._normalised(images), self.images.labels[chosen].to(self.device)

    def _normalised(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean).div_(std)


def augmented(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to ``padding`` pixels each way, zeros moving in, and mirrored with probability one half."""
    n, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    down, right = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    columns = torch.arange(width).expand(n, width)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows = down + torch.arange(height)
    sample, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, channels, 1, 1)
    return padded[sample, channel, rows.view(n, 1, height, 1), (columns + right).view(n, 1, 1, width)]


def class_numbers(labels: Sequence[Any] | Tensor, where: str) -> Tensor:
    """``labels`` as a LongTensor of class numbers; raises ``InputError`` naming ``where`` they come from."""
    if len(labels) == 0:
        raise InputError(f"{where} holds no sample")
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the labels of {where} are not whole numbers: {error}") from error
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex():
        found = f"shape {tuple(numbers.shape)} and type {numbers.dtype}"
        raise InputError(f"the labels of {where} have {found}; one whole number a sample is needed")
    if int(numbers.min()) < 0:
        raise InputError(f"the labels of {where} begin at {int(numbers.min())}; class numbers count from 0")
    return numbers.long()
