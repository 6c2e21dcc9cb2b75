"""Data sets by spec: what each reader gives, and one line for everything that is wrong."""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fxprune.data.datasets import Data, load_data
from fxprune.data.images import Opened
from fxprune.errors import DependencyError, InputError


def encoded(value: int, side: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path, values: list[int], labels: list[int], *, image: str = "img", nested: bool = True, label: str = "label"
) -> None:
    rows = [encoded(v) for v in values]
    column = [{"bytes": row, "path": None} for row in rows] if nested else rows
    pq.write_table(pa.table({image: column, label: labels}), path)


def write_folder(folder: Path, classes: dict[str, int], *, side: int = 6, mode: str = "RGB") -> None:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new(mode, (side, side), number).save(folder / name / f"{number}.png")


def identities(images: object) -> set[bytes]:
    return {bytes(images[n][0].flatten().tolist()) for n in range(len(images))}  # type: ignore[index, arg-type]


def test_digits_have_three_disjoint_parts() -> None:
    data = load_data("digits")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1151, 287, 359]
    assert data.num_classes == 10 and data.image_size == 8 and not data.flip
    # A few of the 1,797 images are alike; apart from those the parts share none.
    assert len(identities(data.train) & identities(data.test)) <= 2
    images, labels = next(iter(data.batches("train", 1151)))
    assert images.shape == (1151, 1, 8, 8)
    assert abs(float(images.mean())) < 0.05 and abs(float(images.std()) - 1) < 0.05
    assert labels.unique().tolist() == list(range(10))


def test_warped_digits_are_the_same_in_every_run_and_no_digit_is_in_two_parts() -> None:
    data, again = load_data("warped-digits"), load_data("warped-digits", seed=5)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8632, 1436, 3590]
    assert torch.equal(data.train.labels, again.train.labels)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(data.batches("test", 1000), again.batches("test", 1000), strict=True))
    images, labels = next(iter(data.batches("train", 8632)))
    assert images.shape == (8632, 1, 16, 16) and labels.unique().tolist() == list(range(10))
    assert abs(float(images.mean())) < 0.05 and abs(float(images.std()) - 1) < 0.05
    versions = images.view(8, 1079, 1, 16, 16)
    assert float((versions[0] - versions[1]).abs().mean()) > 0.3  # each is warped in its own way
    assert load_data("warped-digits", image_size=24).example().shape == (1, 1, 24, 24)


def test_digits_splits_are_decided_by_the_seed() -> None:
    first, again, other = (load_data("digits", seed=seed).test.labels for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_digits_can_be_enlarged_and_coloured() -> None:
    data = load_data("digits", image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert data.example().shape == (1, 3, 16, 16) and data.mean == (0.5, 0.5, 0.5)


def test_limited_batches_are_a_random_part_decided_by_the_seed() -> None:
    data = load_data("digits")
    first, again, other = (torch.cat([y for _, y in data.batches("validation", 50, limit=100, seed=s)]) for s in (0, 0, 1))
    assert len(first) == 100 and torch.equal(first, again) and not torch.equal(first, other)


def test_only_training_batches_are_augmented() -> None:
    data = load_data("digits")
    assert data.batches("train", training=True).padding == 1 and data.batches("train").padding == 0


def test_augmented_batches_keep_the_order_and_are_always_alike() -> None:
    data = replace(load_data("digits"), padding=1, flip=True)
    plain, first, again = (list(data.batches("validation", 64, augmented=wanted)) for wanted in (False, True, True))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, first, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(plain, first, strict=True))


def test_parquet_with_a_test_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", list(range(40)), [0, 1] * 20)
    write_parquet(tmp_path / "test.parquet", [200, 201], [1, 0])
    data = load_data(f"parquet:{tmp_path}", validation=0.25)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [30, 10, 2]
    assert data.test[0][0][0].unique().tolist() == [200] and data.test[0][1] == 1
    assert data.mean == (0.485, 0.456, 0.406) and data.image_size == 6 and data.flip
    seen = sorted(int(part[n][0][0, 0, 0]) for part in (data.train, data.validation) for n in range(len(part)))
    assert seen == list(range(40))


@pytest.mark.parametrize(("image", "nested", "label"), [("image", True, "label"), ("img", False, "fine_label")])
def test_parquet_columns_by_other_names(tmp_path: Path, image: str, nested: bool, label: str) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [1] * 6, [0] * 6, image=image, nested=nested, label=label)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [2] * 6, [1] * 6, image=image, nested=nested, label=label)
    data = load_data(f"parquet:{tmp_path}")
    assert data.num_classes == 2 and len(data.train) + len(data.validation) + len(data.test) == 12
    assert all(int(data.train[n][0][0, 0, 0]) == data.train[n][1] + 1 for n in range(len(data.train)))


def test_parquet_validation_file_is_used_beside_a_test_file(tmp_path: Path) -> None:
    for name, count in (("train", 8), ("validation", 4), ("test", 2)):
        write_parquet(tmp_path / f"{name}.parquet", list(range(count)), [0, 1] * (count // 2))
    data = load_data(f"parquet:{tmp_path}")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8, 4, 2]


def test_image_folder_without_parts_gives_some_to_each(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 20, "dog": 20})
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    data = load_data(f"imagefolder:{tmp_path}")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [28, 4, 8]
    assert data.num_classes == 2 and data.image_size == 6


def test_image_folder_with_only_a_validation_part_tests_on_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 10, "b": 10})
    write_folder(tmp_path / "val", {"a": 1, "b": 2})
    data = load_data(f"imagefolder:{tmp_path}")
    assert data.test.labels.tolist() == [0, 1, 1] and len(data.validation) == 2


def test_grey_images_stay_grey_unless_three_channels_are_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 8, "b": 8}, mode="L")
    assert load_data(f"imagefolder:{tmp_path}").example().shape == (1, 1, 6, 6)
    assert load_data(f"imagefolder:{tmp_path}", mean=(0.5,) * 3, std=(0.5,) * 3).example().shape == (1, 3, 6, 6)


def test_sets_too_large_to_keep_are_decoded_by_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "train", {"a": 8, "b": 8})
    write_folder(tmp_path / "test", {"a": 2, "b": 2})
    kept = load_data(f"imagefolder:{tmp_path}", image_size=12)
    monkeypatch.setattr("fxprune.data.readers._MEMORY_BYTES", 100)
    opened = load_data(f"imagefolder:{tmp_path}", image_size=12)
    assert isinstance(opened.test.fetch, Opened) and not isinstance(kept.test.fetch, Opened)
    assert torch.equal(next(iter(kept.batches("test")))[0], next(iter(opened.batches("test")))[0])


def write_idx(path: Path, values: torch.Tensor) -> None:
    path.write_bytes(struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + bytes(values.flatten().tolist()))


def test_torchvision_set_with_a_train_flag(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 20), ("t10k", 4)):
        write_idx(raw / f"{name}-images-idx3-ubyte", torch.arange(count).view(-1, 1, 1).expand(-1, 28, 28))
        write_idx(raw / f"{name}-labels-idx1-ubyte", torch.arange(count) % 2)
    data = load_data(f"torchvision:MNIST:{tmp_path}")
    assert data.example().shape == (1, 1, 28, 28) and data.mean == (0.1307,) and data.num_classes == 2 and not data.flip
    assert len(data.test) == 4 and len(data.train) + len(data.validation) == 20


def test_torchvision_set_with_a_split_argument(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 2)):
        write_folder(tmp_path / "rendered-sst2" / split, {"negative": count, "positive": count})
    data = load_data(f"torchvision:RenderedSST2:{tmp_path}")
    assert data.test.labels.tolist() == [0, 0, 1, 1] and data.flip


FACTORIES = """
import torch
from torch.utils.data import TensorDataset

def tensors(count, value=0.5):
    return TensorDataset(torch.full((count, 2, 5, 5), value), torch.arange(count) % 2)

def pair():
    return tensors(20), tensors(4)

def named(image_size=5):
    return {"train": tensors(20), "validation": tensors(6), "test": tensors(4)}

def listed():
    return [(torch.full((1, image, image), 7, dtype=torch.uint8), image % 2) for image in [4] * 10 + [4] * 10], [(torch.zeros(1, 4, 4), 1)]

def labelled_by_name():
    return [(torch.zeros(1, 4, 4), "cat")], [(torch.zeros(1, 4, 4), "dog")]

def flat():
    return TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)), tensors(2)

def broken():
    raise ValueError("no such disk")

def uneven():
    return [(torch.zeros(1, 4 + number, 4), number) for number in range(3)], tensors(2)

class Failing:
    def __len__(self):
        return 3

    def __getitem__(self, number):
        if number:
            raise OSError("disk")
        return torch.zeros(1, 4, 4), number

def failing():
    return Failing(), Failing()

nothing = None

def wrong():
    return 3

def unsized():
    return iter([]), iter([])
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module in the working directory."""
    (tmp_path / "users_data.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "users_data", raising=False)
    return "users_data"


def test_factory_images_are_used_as_they_are(factories: str) -> None:
    data = load_data(f"{factories}:pair")
    assert len(data.test) == 4 and len(data.train) == 18 and data.num_classes == 2
    assert data.example().unique().tolist() == [0.5]
    normalised = load_data(f"{factories}:pair", mean=(0.5, 0.5), std=(0.5, 0.5))
    assert normalised.example().unique().tolist() == [0.0]


def test_factory_may_give_a_mapping_or_plain_lists(factories: str) -> None:
    assert len(load_data(f"{factories}:named").validation) == 6
    assert load_data(f"{factories}:listed").train[0][0].dtype == torch.uint8


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("broken", "calling it failed: ValueError: no such disk"),
        ("nothing", "is None; it must be a function"),
        ("wrong", "gave an int; it must give"),
        ("missing", "has no 'missing'"),
        ("pairs", "did you mean pair"),
        ("unsized", "must have a length"),
        ("labelled_by_name", "pairs of an image tensor and a class number"),
        ("uneven", r"train gives images of different sizes: sample 0 is 1x4x4, sample 1 is 1x5x4; resize"),
        ("failing", r"train: reading sample 1 raised OSError: disk \(users_data.py:\d+\)"),
        ("flat", r"shape \(channels, height, width\)"),
    ],
)
def test_a_factory_that_fails_is_told_in_one_line(factories: str, factory: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_data(f"{factories}:{factory}")
    assert "\n" not in str(caught.value)


def empty(folder: Path) -> str:
    return f"imagefolder:{folder}"


def classes_without_images(folder: Path) -> str:
    (folder / "cat").mkdir()
    return f"imagefolder:{folder}"


def broken_image(folder: Path) -> str:
    write_folder(folder, {"cat": 2})
    (folder / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return f"imagefolder:{folder}"


def truncated_image(folder: Path) -> str:
    write_folder(folder, {"cat": 4}, side=200)
    whole = (folder / "cat" / "3.png").read_bytes()
    (folder / "cat" / "3.png").write_bytes(whole[: len(whole) // 2])
    return f"imagefolder:{folder}"


def unknown_test_class(folder: Path) -> str:
    write_folder(folder / "train", {"cat": 2})
    write_folder(folder / "test", {"dog": 2})
    return f"imagefolder:{folder}"


def no_parquet(folder: Path) -> str:
    return f"parquet:{folder}"


def not_parquet(folder: Path) -> str:
    (folder / "train.parquet").write_text("hello")
    return f"parquet:{folder}"


def other_columns(folder: Path) -> str:
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), folder / "train.parquet")
    return f"parquet:{folder}"


def row_without_image(folder: Path) -> str:
    pq.write_table(pa.table({"img": [encoded(1), None], "label": [0, 1]}), folder / "train.parquet")
    return f"parquet:{folder}"


def row_with_other_bytes(folder: Path) -> str:
    pq.write_table(pa.table({"img": [b"hello", b"world"], "label": [0, 1]}), folder / "train.parquet")
    return f"parquet:{folder}"


def null_label(folder: Path) -> str:
    pq.write_table(pa.table({"img": [encoded(1), encoded(2)], "label": [0, None]}), folder / "train.parquet")
    return f"parquet:{folder}"


def one_sample(folder: Path) -> str:
    write_folder(folder, {"cat": 1})
    return f"imagefolder:{folder}"


def a_file(folder: Path) -> str:
    (folder / "x").write_text("")
    return f"parquet:{folder / 'x'}"


def torchvision_absent(folder: Path) -> str:
    return f"torchvision:CIFAR10:{folder}"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (empty, "is empty: it must hold a folder of images for each class"),
        (classes_without_images, "holds no image"),
        (broken_image, "cannot read the image .*0.png"),
        (truncated_image, "cannot read the image .*3.png"),
        (unknown_test_class, "dog: the training part has no class of that name"),
        (no_parquet, "holds no train.parquet"),
        (not_parquet, "cannot read the parquet file .*train.parquet"),
        (other_columns, "has the columns text, label; needed are img"),
        (row_without_image, "row 1 holds no image bytes"),
        (row_with_other_bytes, "cannot read the image .*row 0"),
        (null_label, "labels of .*train.parquet are not whole numbers"),
        (one_sample, "leave no"),
        (a_file, "is a file; data are read from a folder"),
        (torchvision_absent, "torchvision's CIFAR10 cannot be read from"),
    ],
)
def test_bad_data_are_told_in_one_line(tmp_path: Path, prepare: Callable[[Path], str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_data(prepare(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "is none of digits, warped-digits, imagefolder:DIR"),
        ("parquet:", "is none of digits, warped-digits, imagefolder:DIR"),
        ("imagefolder:/no/such/folder", "/no/such/folder does not exist"),
        ("torchvision:CIFAR10", "not of the form torchvision:NAME:DIR"),
        ("torchvision:CIFAR11:/", "unknown torchvision data set 'CIFAR11'; did you mean CIFAR10"),
        ("torchvision:ImageFolder:/", "has no training and test part"),
        ("no_such_module_anywhere:data", "cannot import 'no_such_module_anywhere'"),
    ],
)
def test_specs_that_name_nothing(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_data(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "have 1 channels"),
        ({"std": (0.5, 0.5)}, "1 and 2 numbers"),
        ({"std": (0.0,)}, "must be above 0"),
        ({"std": (float("nan"),)}, "must be above 0"),
        ({"image_size": 0}, "at least 1 pixel"),
        ({"validation": 1.0}, "between 0 and 1"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data("digits", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "spec", "package"),
    [("sklearn.datasets", "digits", "scikit-learn"), ("pyarrow", "parquet:.", "pyarrow")],
)
def test_a_missing_extra_names_its_pip_command(
    module: str, spec: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match=rf"{package}: pip install 'fxprune\[search\]'"):
        load_data(spec)


def test_data_is_frozen() -> None:
    with pytest.raises(AttributeError):
        load_data("digits").num_classes = 3  # type: ignore[misc]
    assert Data.__dataclass_params__.frozen  # type: ignore[attr-defined]
