"""Images and batches: selection, splits, decoding, normalisation, augmentation, order."""

from __future__ import annotations

import pickle

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from fxprune.data.images import Batches, Images, InMemory, Opened, augmented, class_numbers, pixels
from fxprune.errors import InputError


def numbered(samples: int, channels: int = 1, side: int = 4) -> Images:
    """Image i is filled with i; its class is i modulo 3."""
    images = torch.arange(samples, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, side, side).contiguous()
    return Images(torch.arange(samples) % 3, InMemory(images))


def firsts(images: Tensor) -> list[int]:
    return images[:, 0, 0, 0].int().tolist()


def test_images_are_a_map_style_dataset() -> None:
    images = numbered(7)
    image, label = images[5]
    assert image.shape == (1, 4, 4) and int(image[0, 0, 0]) == 5 and label == 2
    assert int(images[-1][0][0, 0, 0]) == 6
    with pytest.raises(IndexError):
        images[7]
    batches = list(DataLoader(images, batch_size=4))
    assert firsts(batches[1][0]) == [4, 5, 6]


def test_selections_nest() -> None:
    chosen = numbered(10).select(torch.tensor([9, 3, 6])).select(torch.tensor([2, 0]))
    assert firsts(chosen.fetch(torch.tensor([0, 1]))) == [6, 9]
    assert chosen.labels.tolist() == [0, 0]


def test_split_is_disjoint_stratified_and_decided_by_the_seed() -> None:
    images = numbered(60)
    first, second = images.split(0.2, seed=1)
    seen = firsts(first.fetch(torch.arange(len(first)))) + firsts(second.fetch(torch.arange(len(second))))
    assert sorted(seen) == list(range(60))
    assert torch.bincount(second.labels).tolist() == [4, 4, 4]
    again = images.split(0.2, seed=1)[1]
    assert firsts(again.fetch(torch.arange(12))) == firsts(second.fetch(torch.arange(12)))
    other = images.split(0.2, seed=2)[1]
    assert firsts(other.fetch(torch.arange(12))) != firsts(second.fetch(torch.arange(12)))


def test_split_leaves_the_only_sample_of_a_class_in_the_first_part() -> None:
    images = Images(torch.tensor([0, 0, 0, 1]), InMemory(torch.zeros(4, 1, 2, 2)))
    first, second = images.split(0.5, seed=0)
    assert first.labels.tolist().count(1) == 1 and 1 not in second.labels.tolist()


def test_batches_normalise_to_mean_and_deviation() -> None:
    images = Images(torch.tensor([0]), InMemory(torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)))
    batch, labels = next(iter(Batches(images, 4, mean=(0.5, 0.25), std=(0.5, 0.25))))
    assert batch.flatten().tolist() == [-1.0, 3.0]
    assert batch.dtype == torch.float32 and labels.dtype == torch.int64


def test_float_images_are_taken_as_they_are_and_left_alone() -> None:
    tensor = torch.full((1, 1, 2, 2), 0.75)
    batch, _ = next(iter(Batches(Images(torch.tensor([0]), InMemory(tensor)), 1, mean=(0.5,), std=(0.5,))))
    assert batch.unique().tolist() == [0.5]
    assert tensor.unique().tolist() == [0.75]


def plain(images: Images, size: int, **options: object) -> Batches:
    return Batches(images, size, mean=(0.0,), std=(1 / 255,), **options)  # type: ignore[arg-type]


def test_order_is_that_of_the_seed_and_the_epoch() -> None:
    def order(batches: Batches) -> list[int]:
        return [round(float(v)) for images, _ in batches for v in images[:, 0, 0, 0]]

    assert order(plain(numbered(10), 4)) == list(range(10))
    shuffled = plain(numbered(12), 4, shuffle=True, seed=3)
    first = order(shuffled)
    assert sorted(first) == list(range(12)) and first != list(range(12))
    assert order(shuffled) == first
    shuffled.set_epoch(1)
    assert order(shuffled) != first
    shuffled.set_epoch(0)
    assert order(shuffled) == first
    assert order(plain(numbered(12), 4, shuffle=True, seed=4)) != first


@pytest.mark.parametrize(("samples", "shuffle", "sizes"), [(10, False, [4, 4, 2]), (10, True, [4, 4]), (3, True, [3]), (8, True, [4, 4])])
def test_a_shuffled_last_batch_is_whole_or_the_only_one(samples: int, shuffle: bool, sizes: list[int]) -> None:
    batches = plain(numbered(samples), 4, shuffle=shuffle)
    assert [len(labels) for _, labels in batches] == sizes
    assert len(batches) == len(sizes)


def test_augmentation_shifts_and_mirrors_each_image_by_itself() -> None:
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    out = augmented(image.expand(64, 1, 4, 4), padding=1, flip=True, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    allowed = [padded[0, :, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    allowed += [crop.flip(2) for crop in allowed]
    found = {next(n for n, crop in enumerate(allowed) if torch.equal(crop, one)) for one in out}
    assert len(found) > 12


def test_augmentation_without_flip_keeps_left_and_right() -> None:
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(32, 1, 4, 4)
    assert torch.equal(augmented(image, padding=0, flip=False, generator=torch.Generator()), image)


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(InputError, match="batch size is 0"):
        plain(numbered(4), 0)


@pytest.mark.parametrize(("size", "channels", "shape"), [(8, 3, (3, 8, 8)), (8, 1, (1, 8, 8)), (160, 3, (3, 160, 160))])
def test_pixels_resize_and_cut_to_a_square(size: int, channels: int, shape: tuple[int, ...]) -> None:
    out = pixels(Image.new("RGB", (30, 20), (255, 0, 0)), size, channels)
    assert out.shape == shape and out.dtype == torch.uint8
    assert out[0].unique().tolist() == ([255] if channels == 3 else [76])


def test_pixels_of_the_right_size_are_untouched() -> None:
    raw = torch.randint(0, 256, (5, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.frombytes("RGB", (5, 5), bytes(raw.flatten().tolist()))
    assert torch.equal(pixels(image, 5, 3), raw.permute(2, 0, 1))


def test_large_images_cut_an_eighth_off_the_resized_sides() -> None:
    image = Image.new("L", (128 * 8, 128 * 8), 0)
    image.paste(255, (64, 64, 960, 960))  # the inner 7/8
    assert pixels(image, 128, 1).float().mean() > 253


@pytest.mark.parametrize("side", [8, 128])
def test_opened_images_come_in_order(side: int) -> None:
    fetch = Opened(_filled, side, 1)
    assert firsts(fetch(torch.tensor([3, 1, 2]))) == [3, 1, 2]


def _filled(number: int) -> Image.Image:
    return Image.new("L", (6, 6), number)


def test_batches_can_be_sent_to_another_process() -> None:
    batches = plain(numbered(6).select(torch.tensor([4, 2])), 2)
    images, labels = next(iter(pickle.loads(pickle.dumps(batches))))
    assert images[:, 0, 0, 0].round().tolist() == [4.0, 2.0] and labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1.0], "one whole number"),
        ([[0], [1]], "one whole number"),
        ([], "no sample"),
        ([0, -1], "count from 0"),
        (["cat"], "whole numbers"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(labels: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        class_numbers(labels, "somewhere")
