"""Readers of labelled images, one for each kind of place: scikit-learn, folders, parquet files, torchvision, a user's factory."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.data.images import Images, InMemory, Opened, class_numbers, sample
from fxprune.errors import InputError, first_line
from fxprune.imports import needed, unknown_name

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"})
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("img", "image"), ("label", "labels", "fine_label")
_TEST_NAMES, _VALIDATION_NAMES = ("test",), ("validation", "valid", "val")
# Mean and standard deviation of the training images, in [0, 1].
_STATISTICS = {
    "digits": ((0.305,), (0.376,)),
    "warped-digits": ((0.347,), (0.150,)),
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "MNIST": ((0.1307,), (0.3081,)),
    "FashionMNIST": ((0.2860,), (0.3530,)),
}
_LARGEST_DEFAULT_SIZE = 224
# Sets up to this size are decoded once and kept; larger ones are decoded a batch at a time.
_MEMORY_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Asked:
    """What the user asks of the images: the side in pixels and the channels, each None where the first image decides."""

    size: int | None = None
    channels: int | None = None


@dataclass(frozen=True)
class _Form:
    size: int
    channels: int

    @property
    def padding(self) -> int:
        """An eighth of the side: the 4 pixels that are usual at 32."""
        return self.size // 8


@dataclass(frozen=True)
class DatasetParts:
    """What a reader gives. ``validation`` and ``test`` are None where the place does not keep them apart from ``train``.

    ``statistics``: mean and standard deviation a channel, None where nothing better than the usual ones is known.
    ``padding``, ``flip``: the augmentation that suits these images.
    """

    train: Images
    num_classes: int
    validation: Images | None = None
    test: Images | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    padding: int = 0
    flip: bool = False


def digits(asked: Asked) -> DatasetParts:
    """scikit-learn's 1,797 digits, 8x8 grey. Shifting them is fine; mirroring would make other characters of them."""
    bunch = needed("sklearn.datasets", "data 'digits'", "search").load_digits()
    images = torch.from_numpy(bunch.images)[:, None].float() * (255 / 16)  # they count from 0 to 16
    if asked.size not in (None, 8):
        images = F.interpolate(images, size=(asked.size, asked.size), mode="bilinear")
    images = images.expand(-1, asked.channels or 1, -1, -1).round().to(torch.uint8).contiguous()
    statistics = None if asked.channels == 3 else _STATISTICS["digits"]
    return DatasetParts(Images(class_numbers(bunch.target, "digits"), InMemory(images)), 10, statistics=statistics, padding=1)


def warped_digits(asked: Asked) -> DatasetParts:
    """scikit-learn's digits made harder: enlarged, turned, sheared, scaled, shifted, fainter and noisy, 16x16 grey.

    Three fifths of the digits become the training part, in eight versions each, a fifth the validation part in four, a fifth the test part
    in ten (3,590 images). No digit is in two parts, and all of it is the same in every run.
    """
    bunch = needed("sklearn.datasets", "data 'warped-digits'", "search").load_digits()
    digits = torch.from_numpy(bunch.images)[:, None].float() / 16  # they count from 0 to 16
    classes = class_numbers(bunch.target, "warped-digits")
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(1))
    fifth = len(digits) // 5
    size, channels = asked.size or 16, asked.channels or 1

    def part(chosen: Tensor, versions: int, seed: int) -> Images:
        chosen = chosen.repeat(versions)
        images = _warped(digits[chosen], size, torch.Generator().manual_seed(seed)).expand(-1, channels, -1, -1)
        return Images(classes[chosen], InMemory((255 * images).round().to(torch.uint8).contiguous()))

    statistics = None if channels == 3 else _STATISTICS["warped-digits"]
    test, validation, train = order[:fifth], order[fifth : 2 * fifth], order[2 * fifth :]
    return DatasetParts(part(train, 8, 1), 10, part(validation, 4, 2), part(test, 10, 3), statistics)


def _warped(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Images in [0, 1], each under an affine map of its own, fainter by up to a half, with noise."""
    count = len(images)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    turn, scale, shear = drawn(-20, 20).deg2rad(), drawn(0.9, 1.3), drawn(-0.25, 0.25)
    rows = [torch.stack([scale * turn.cos(), scale * (shear - turn.sin()), drawn(-0.2, 0.2)], 1)]
    rows.append(torch.stack([scale * turn.sin(), scale * turn.cos(), drawn(-0.2, 0.2)], 1))
    large = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, size, size], align_corners=False)
    made = F.grid_sample(large, grid, align_corners=False) * drawn(0.5, 1.0).view(-1, 1, 1, 1)
    return (0.25 + 0.5 * made + 0.08 * torch.randn(made.shape, generator=generator)).clamp(0, 1)  # noise on both sides of the ground


def image_folder(folder: Path, asked: Asked) -> DatasetParts:
    """A folder for each class, in ``folder`` itself or in its parts train, validation (or val) and test.

    Where only a validation part stands beside the training part, as in ImageNet, it is the test set.
    """
    _check_folder(folder)
    train = folder / "train" if (folder / "train").is_dir() else folder
    numbers = {name: number for number, name in enumerate(_class_names(train))}
    if not numbers:
        raise InputError(f"data folder {train} is empty: it must hold a folder of images for each class")
    files, labels = _class_files(train, numbers)
    form = _decided(asked, files(0))
    others = {}
    for part, place in _parts({p.name: p for p in folder.iterdir() if p.is_dir() and train != folder}).items():
        part_files, part_labels = _class_files(place, numbers)
        others[part] = _images(part_files, part_labels, form)
    return DatasetParts(_images(files, labels, form), len(numbers), others.get("validation"), others.get("test"), None, form.padding, True)


def parquet(folder: Path, asked: Asked) -> DatasetParts:
    """train*.parquet and, where present, validation*.parquet and test*.parquet, in the layout of Hugging Face's ``datasets``.

    Columns: ``img`` or ``image``, a struct with the encoded ``bytes``, or the bytes themselves; ``label``, a class number.
    """
    _check_folder(folder)
    files = {name: sorted(folder.glob(f"{name}*.parquet")) for name in ("train", *_TEST_NAMES, *_VALIDATION_NAMES)}
    if not files["train"]:
        raise InputError(f"data folder {folder} holds no train.parquet")
    rows, labels = _rows(files["train"])
    form = _decided(asked, rows(0))
    others = {}
    for part, paths in _parts({name: paths for name, paths in files.items() if paths}).items():
        part_rows, part_labels = _rows(paths)
        others[part] = _images(part_rows, part_labels, form)
    train, classes = _images(rows, labels, form), int(labels.max()) + 1
    return DatasetParts(train, classes, others.get("validation"), others.get("test"), None, form.padding, True)


def torchvision(name: str, folder: Path, asked: Asked) -> DatasetParts:
    """A classification set of torchvision that lies in ``folder`` already; nothing is downloaded."""
    datasets = needed("torchvision.datasets", f"data 'torchvision:{name}'", "vision")

    if name not in datasets.__all__ or not isinstance(getattr(datasets, name), type):
        raise unknown_name("torchvision data set", name, datasets.__all__)
    _check_folder(folder)
    kind = getattr(datasets, name)
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        train, test = (_torchvision_part(name, kind, folder, train=flag) for flag in (True, False))
    elif "split" in parameters:
        train, test = (_torchvision_part(name, kind, folder, split=part) for part in ("train", "test"))
    else:
        raise InputError(f"torchvision's {name} has no training and test part; use imagefolder:{folder} or a factory of your own")
    form = _decided(asked, train(0))
    labels, test_labels = _torchvision_labels(name, train), _torchvision_labels(name, test)
    classes = max(int(labels.max()), int(test_labels.max())) + 1
    statistics = _STATISTICS.get(name)
    if statistics is not None and len(statistics[0]) != form.channels:
        statistics = None
    flip = "MNIST" not in name and name not in ("SVHN", "USPS")  # digits and letters are not their own mirror images
    parts = _images(train, labels, form), _images(test, test_labels, form)
    return DatasetParts(parts[0], classes, test=parts[1], statistics=statistics, padding=form.padding, flip=flip)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise InputError(f"data folder {folder} does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; data are read from a folder")


def _parts(named: Mapping[str, T]) -> dict[str, T]:
    """Of the parts that a place has, by their names there, those called test and validation, by our names."""
    test = next((named[n] for n in _TEST_NAMES if n in named), None)
    validation = next((named[n] for n in _VALIDATION_NAMES if n in named), None)
    if test is None:
        test, validation = validation, None
    return {part: place for part, place in (("test", test), ("validation", validation)) if place is not None}


def _decided(asked: Asked, first: Image) -> _Form:
    size = asked.size or min(*first.size, _LARGEST_DEFAULT_SIZE)
    return _Form(size, asked.channels or (1 if first.mode in ("1", "L", "I", "I;16", "F") else 3))


def _images(opened: Callable[[int], Image], labels: Tensor, form: _Form) -> Images:
    fetch = Opened(opened, form.size, form.channels)
    if len(labels) * form.size**2 * form.channels > _MEMORY_BYTES:
        return Images(labels, fetch)
    return Images(labels, InMemory(fetch(torch.arange(len(labels)))))


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]

    def __call__(self, number: int) -> Image:
        return _decode(self.paths[number], str(self.paths[number]))


@dataclass(frozen=True, eq=False)
class _Rows:
    column: Any  # pyarrow.ChunkedArray of bytes
    where: str

    def __call__(self, number: int) -> Image:
        where, encoded = f"{self.where}, row {number}", self.column[number].as_py()
        if not isinstance(encoded, bytes):
            raise InputError(f"{where} holds no image bytes")
        return _decode(io.BytesIO(encoded), where)


@dataclass(frozen=True, eq=False)
class _Samples:
    dataset: Any  # a torchvision data set without transforms
    where: str

    def __call__(self, number: int) -> Image:
        image = sample(self.dataset, number, self.where)[0]
        if not hasattr(image, "convert"):
            raise InputError(f"{self.where} gives {type(image).__name__}, not images; write a factory: package.module:factory")
        return image  # type: ignore[no-any-return]


def _decode(source: Path | io.BytesIO, where: str) -> Image:
    pillow = needed("PIL.Image", "reading images", "search")

    try:
        image: Image
        with pillow.open(source) as image:
            image.load()
        return image
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:  # SyntaxError: broken PNG chunks
        raise InputError(f"cannot read the image {where}: {error}") from error


def _class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _class_files(folder: Path, numbers: Mapping[str, int]) -> tuple[_Files, Tensor]:
    names = _class_names(folder)
    strange = [name for name in names if name not in numbers]
    if strange:
        raise InputError(f"{folder / strange[0]}: the training part has no class of that name")
    found = [(path, numbers[name]) for name in names for path in sorted((folder / name).rglob("*")) if path.suffix.lower() in _SUFFIXES]
    if not found:
        raise InputError(f"data folder {folder} holds no image; looked for {', '.join(sorted(_SUFFIXES))} in its class folders")
    return _Files(tuple(path for path, _ in found)), class_numbers([number for _, number in found], str(folder))


def _rows(paths: list[Path]) -> tuple[_Rows, Tensor]:
    pa, pc, pq = (needed(name, "reading parquet files", "search") for name in ("pyarrow", "pyarrow.compute", "pyarrow.parquet"))
    where = str(paths[0])
    try:
        table = pa.concat_tables([pq.read_table(path) for path in paths])
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read the parquet file {where}: {first_line(error)}") from error
    names = table.column_names
    image_name, label_name = (next((n for n in wanted if n in names), None) for wanted in (_IMAGE_COLUMNS, _LABEL_COLUMNS))
    if image_name is None or label_name is None:
        raise InputError(f"{where} has the columns {', '.join(names)}; needed are img (or image) and label")
    images = table[image_name]
    if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = pc.struct_field(images, "bytes")
    return _Rows(images, where), class_numbers(table[label_name].to_pylist(), where)


def _torchvision_part(name: str, kind: Callable[..., Any], folder: Path, **part: Any) -> _Samples:
    if "download" in inspect.signature(kind).parameters:
        part["download"] = False
    try:
        return _Samples(kind(str(folder), **part), f"torchvision's {name}")
    except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
        raise InputError(f"torchvision's {name} cannot be read from {folder}: {first_line(error)}") from error


def _torchvision_labels(name: str, samples: _Samples) -> Tensor:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(samples.dataset, attribute):
            return class_numbers(getattr(samples.dataset, attribute), f"torchvision's {name}")
    return class_numbers([sample(samples.dataset, n, samples.where)[1] for n in range(len(samples.dataset))], samples.where)
