"""Data sets, splits, the order of images and their augmentation."""

import hashlib
import math
from dataclasses import replace
from itertools import islice, product

import numpy as np
import pytest
import torch

from qbench.data import digits, svhn, synthetic
from qbench.data.augment import (
    BOX_ATTEMPTS,
    COLOUR_DRAWS,
    CROP_DRAWS,
    Augment,
    adjust_colours,
    center_crop,
    crop_and_flip,
    random_box,
)
from qbench.data.dataset import Dataset, Split, split_validation
from qbench.data.loader import MAX_EVALUATION_PIXELS, Loader, is_sorted
from qbench.data.normalize import FIXED, normalization
from qbench.system.torchvision import torchvision

CPU = torch.device("cpu")


def small_dataset(count: int = 100, **options: object) -> Dataset:
    return synthetic.build(train=count, test=20, size=8, **options)  # type: ignore[arg-type]


def random_images(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def dataset_of(images: torch.Tensor, augment: Augment) -> Dataset:
    """Return a data set with these images in every split; the labels are their indices."""
    split, channels = Split(images, torch.arange(len(images))), images.shape[1]
    mean, std = (0.49, 0.48, 0.45)[:channels], (0.25, 0.24, 0.26)[:channels]
    return Dataset(
        name="given", train=split, val=split, test=split, classes=2, mean=mean, std=std, augment=augment
    )  # fmt: skip


def reference_augmented(image_CHW: torch.Tensor, draw: torch.Tensor, augment: Augment) -> torch.Tensor:
    """Crop and mirror one image pixel by pixel: the definition that stored runs depend on."""
    _, height, width = image_CHW.shape
    dy, dx = (int(uniform * (2 * augment.pad + 1)) - augment.pad for uniform in draw[:2])
    cropped = torch.zeros_like(image_CHW)
    for y, x in product(range(height), range(width)):
        row, column = y + dy, dx + (width - 1 - x if augment.flip and draw[2] < 0.5 else x)
        if augment.replicate:
            row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        if 0 <= row < height and 0 <= column < width:
            cropped[:, y, x] = image_CHW[:, row, column]
    return cropped


def test_digits_equal_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    theirs, ours = load_digits(), digits.read()
    assert torch.equal(ours.images.squeeze(1).double() / 15, torch.from_numpy(theirs.images))
    assert torch.equal(ours.labels, torch.from_numpy(theirs.target))


def test_split_of_the_digits_is_fixed() -> None:
    data = digits.build()
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    assert len(data.test) == pytest.approx(1797 / 4, abs=5)
    assert len(data.val) == pytest.approx(0.1 * (1797 - len(data.test)), abs=5)
    assert data.shape == (1, 8, 8)
    parts = [{bytes(image.flatten().tolist()) for image in s.images} for s in (data.train, data.val, data.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)), "a split shares an image with another"
    assert data.test.labels.bincount().tolist() == digits.build(val=0.3).test.labels.bincount().tolist()
    assert digits.build(val=0.3).fingerprint()["test_sha256"] == data.fingerprint()["test_sha256"]
    assert digits.build(val=0.0).fingerprint()["val_images"] == 0


def test_validation_split_is_stratified_and_never_empty() -> None:
    split = Split(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), torch.arange(100) % 4)
    train, held = split_validation(split, 0.2)
    assert held.labels.bincount().tolist() == [5, 5, 5, 5]
    assert len(train) == 80
    for val, phrase in ((1.0, "below 1"), (-0.1, "from 0"), (0.999, "to train on"), (1e-6, "to validate on")):
        with pytest.raises(ValueError, match=phrase):
            split_validation(split, val)


def test_a_split_is_divided_in_its_memory_as_by_copying() -> None:
    for images in (random_images(3001, 3, 2, 2), random_images(3001, 3, 2, 2).to(memory_format=torch.channels_last)):
        copied, moved = (Split(images.clone(), torch.arange(3001) % 7) for _ in range(2))
        memory = moved.images.data_ptr()
        for theirs, ours in zip(
            split_validation(copied, 0.3), split_validation(moved, 0.3, in_place=True), strict=True
        ):
            assert torch.equal(theirs.images, ours.images)
            assert torch.equal(theirs.labels, ours.labels)
        assert moved.images.data_ptr() == memory
        train, val = split_validation(Split(images.clone(), moved.labels), 0.0, in_place=True)
        assert torch.equal(train.images, images)
        assert not len(val)


def test_the_fingerprint_does_not_depend_on_the_layout_in_memory() -> None:
    images = random_images(2500, 3, 4, 4)
    first, second = (
        dataset_of(x, Augment()).fingerprint() for x in (images, images.to(memory_format=torch.channels_last))
    )
    assert first == second
    whole = hashlib.sha256(f"torch.uint8{(2500, 3, 4, 4)}".encode() + images.numpy().tobytes())
    whole.update(f"torch.int64{(2500,)}".encode() + torch.arange(2500).numpy().tobytes())
    assert first["train_sha256"] == whole.hexdigest()


def test_order_and_augmentation_depend_on_seed_epoch_and_position() -> None:
    data = Dataset(**{**vars(small_dataset()), "augment": Augment(pad=2, flip=True)})
    loader = Loader(data, 16, 3, CPU)
    whole = list(loader.train(5))
    assert len(whole) == loader.steps == len(data.train) // 16
    torch.manual_seed(99)
    torch.rand(7)  # the global generator must not matter
    for (x, y), (x2, y2) in zip(whole[3:], Loader(data, 16, 3, CPU).train(5, start=3), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    for other in (Loader(data, 16, 4, CPU).train(5), loader.train(6)):
        assert not torch.equal(next(iter(other))[0], whole[0][0])
    labels = torch.cat([y for _, y in whole])
    assert not torch.equal(labels, data.train.labels[: len(labels)])


def test_augmentation_of_an_image_does_not_depend_on_the_batch_size() -> None:
    data = Dataset(**{**vars(small_dataset()), "augment": Augment(pad=2)})
    wide, narrow = (torch.cat([x for x, _ in Loader(data, size, 0, CPU).train(0)])[:30] for size in (30, 10))
    assert torch.equal(wide, narrow)


def test_augmentation_does_not_depend_on_the_number_of_threads() -> None:
    loader, found = Loader(dataset_of(random_images(300, 3, 32, 32), Augment(4, True)), 150, 0, CPU), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(torch.cat([x for x, _ in loader.train(0)]))
    assert torch.equal(*found)


def test_every_image_occurs_once_per_epoch() -> None:
    data = small_dataset(96, val=0.0)
    marked = Split(data.train.images, torch.arange(96))
    loader = Loader(Dataset(**{**vars(data), "train": marked}), 32, 0, CPU)
    assert torch.cat([y for _, y in loader.train(0)]).sort().values.tolist() == list(range(96))


def test_crop_and_flip_by_hand() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3)
    cases = {  # draws: vertical, horizontal, mirror; crop of an image padded by 1; place 0 is at the top left
        (0.0, 0.5, 0.9): [[0, 0, 0], [1, 2, 3], [4, 5, 6]],
        (0.5, 0.0, 0.9): [[0, 1, 2], [0, 4, 5], [0, 7, 8]],
        (0.99, 0.99, 0.9): [[5, 6, 0], [8, 9, 0], [0, 0, 0]],
        (0.5, 0.5, 0.1): [[3, 2, 1], [6, 5, 4], [9, 8, 7]],
    }
    for draws, expected in cases.items():
        cropped = crop_and_flip(image, torch.tensor([draws]), Augment(pad=1, flip=True))
        assert cropped[0, 0].tolist() == expected, draws
    repeated = crop_and_flip(image, torch.tensor([[0.0, 0.5, 0.9]]), Augment(pad=1, replicate=True))
    assert repeated[0, 0].tolist() == [[1, 2, 3], [1, 2, 3], [4, 5, 6]]
    assert crop_and_flip(image, torch.tensor([[0.0, 0.0, 0.0]]), Augment()) is image


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 3, 7])
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 4, 7)])
def test_crop_and_flip_equal_the_reference(shape: tuple[int, int, int], pad: int, flip: bool, replicate: bool) -> None:
    augment, images = Augment(pad, flip, replicate), random_images(12, *shape)
    draws = torch.rand(12, 3, generator=torch.Generator().manual_seed(pad))
    draws[0], draws[1] = 0.0, 1 - 2**-24  # the ends of torch.rand's range
    expected = torch.stack([reference_augmented(*pair, augment) for pair in zip(images, draws, strict=True)])
    for source in (images, images.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(crop_and_flip(source, draws, augment), expected)
    for count in (0, 1):
        assert torch.equal(crop_and_flip(images[:count], draws[:count], augment), expected[:count])


@pytest.mark.parametrize("augment", [Augment(), Augment(2, True), Augment(2, False, True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_batch_equals_the_reference_bit_for_bit(channels: int, augment: Augment) -> None:
    data = dataset_of(random_images(20, channels, 6, 5), augment)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"order 7 11").digest()[:8]) >> 1)
    order, draws = torch.randperm(20, generator=generator), torch.rand(20, 3, generator=generator)
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (data.mean, data.std))
    batches = list(Loader(data, 6, 7, CPU).train(11))
    assert torch.equal(torch.cat([y for _, y in batches]), order[:18])
    for x, labels in batches:
        assert x.stride() == torch.empty(x.shape, memory_format=torch.channels_last).stride()
        for got, n in zip(x, labels, strict=True):
            image = reference_augmented(data.train.images[n], draws[n], augment)
            assert torch.equal(got, (image.float() - 255 * mean) * (1 / (255 * std)))


@pytest.mark.parametrize("replicate", [False, True])
def test_augmentation_does_not_read_values_from_the_device(replicate: bool) -> None:
    images = torch.empty(4, 3, 6, 5, dtype=torch.uint8, device="meta")  # a device without values
    found = crop_and_flip(images, torch.empty(4, 3, device="meta"), Augment(2, True, replicate))
    assert (found.shape, found.dtype, found.device.type) == (images.shape, torch.uint8, "meta")


def test_shifts_are_uniform_and_differ_between_images() -> None:
    images = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    images[:, 0, 2, 2] = 1
    draws = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    found = crop_and_flip(images, draws, Augment(pad=1)).flatten(1).argmax(1).bincount(minlength=25)
    assert (found > 0).sum() == 9
    assert (found[found > 0] - 4000 / 9).abs().max() < 5 * (4000 / 9) ** 0.5


def test_batches_are_normalized_and_in_channels_last() -> None:
    data = small_dataset()
    x, _ = next(iter(Loader(data, 50, 0, CPU).unaugmented("train")))
    expected = (data.train.images.double() / 255 - torch.tensor(data.mean).reshape(1, -1, 1, 1)) / torch.tensor(
        data.std
    ).reshape(1, -1, 1, 1)
    torch.testing.assert_close(x.double(), expected[: len(x)], atol=1e-6, rtol=0)
    assert x.is_contiguous(memory_format=torch.channels_last)
    low, high = (torch.tensor(t).reshape(1, -1, 1, 1) for t in data.image_range)
    assert (x >= low - 1e-5).all()
    assert (x <= high + 1e-5).all()


@pytest.mark.parametrize("sorted_by_class", [False, True])
def test_a_sample_of_a_split_contains_all_classes(sorted_by_class: bool) -> None:
    """Methods are calibrated on such samples, and folders of images are sorted by class."""
    labels = torch.arange(300) // 30 if sorted_by_class else torch.arange(300) % 10
    images = torch.arange(300).remainder(256).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    data = small_dataset()
    data = replace(data, train=Split(images.contiguous(), labels), mean=(0.0,), std=(1.0,))
    batches = list(Loader(data, 10, 0, CPU).sample("train", 50))
    found = torch.cat([y for _, y in batches])
    assert sum(len(x) for x, _ in batches) == len(found) == 50
    assert found.unique().tolist() == list(range(10))
    pixels = (255 * torch.cat([x for x, _ in batches])[:, 0, 0, 0]).round().int()
    expected = range(0, 300, 6) if sorted_by_class else range(50)
    numbers = [number % 256 for number in expected]
    assert sorted(pixels.tolist()) == sorted(numbers)
    assert sorted_by_class or pixels.tolist() == numbers
    assert len(found[:10].unique()) >= 5, "a part of the sample has many classes too"


def test_a_sample_of_sorted_classes_has_the_shares_of_the_split() -> None:
    """Of 300 images, the first 256 would have all 250 of the first class."""
    labels = torch.cat([torch.zeros(250), torch.ones(50)]).long()
    data = small_dataset()
    data = replace(data, train=Split(torch.zeros(300, 1, 2, 2, dtype=torch.uint8), labels), mean=(0.0,), std=(1.0,))
    (batch,) = Loader(data, 10, 0, CPU).sample("train", 256)
    assert batch[1].sum() == pytest.approx(256 / 6, abs=1)
    assert 4 <= batch[1][:64].sum() <= 20
    (whole,) = Loader(data, 10, 0, CPU).sample("train", 300)
    assert 4 <= whole[1][:64].sum() <= 20


def test_a_split_in_random_order_is_not_sorted() -> None:
    for classes in (2, 10, 100):
        labels = torch.randint(classes, (1000,), generator=torch.Generator().manual_seed(classes))
        assert not is_sorted(labels)
        assert is_sorted(labels.sort().values)
    assert not is_sorted(torch.arange(300) % 10)
    assert not is_sorted(torch.zeros(9, dtype=torch.int64)), "one class has no order"
    assert not is_sorted(torch.zeros(0, dtype=torch.int64))


def test_images_keep_their_labels_in_any_order() -> None:
    """The first and the last index alone do not show that the images follow each other."""
    images = torch.arange(9, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    data = replace(small_dataset(), train=Split(images, torch.arange(9)), mean=(0.0,), std=(1.0,))
    loader = Loader(data, 3, 0, CPU)
    ((pixels, labels),) = loader._batches(loader.splits["train"], [torch.tensor([1, 4, 2, 8, 5])])
    assert (255 * pixels[:, 0, 0, 0]).round().tolist() == labels.tolist() == [1, 4, 2, 8, 5]


def test_batch_size_is_limited_to_the_number_of_images() -> None:
    loader = Loader(small_dataset(50, val=0.0), 64, 0, CPU)
    assert (loader.steps, len(next(iter(loader.train(0)))[1])) == (1, 50)


def test_unaugmented_batches_are_in_order_and_limited() -> None:
    data = small_dataset()
    loader = Loader(data, 16, 0, CPU)
    labels = torch.cat([y for _, y in loader.unaugmented("train", limit=33, size=10)])
    assert torch.equal(labels, data.train.labels[:33])
    assert len(list(islice(loader.unaugmented("test", size=8), 10))) == 3


def test_synthetic_refuses_values_out_of_range() -> None:
    for options in ({"train": 0}, {"signal": 2.0}):
        with pytest.raises(ValueError, match="must be"):
            synthetic.build(**options)  # type: ignore[arg-type]


def box(height: int, width: int, *attempts: float, area: float = 0.08, place: float = 0.0) -> tuple[int, int, int, int]:
    filled = [*attempts, *([1.0, 0.0] * BOX_ATTEMPTS)][: 2 * BOX_ATTEMPTS]
    return random_box(height, width, [place, place] + [0.0] * (CROP_DRAWS + COLOUR_DRAWS - 2) + filled, area)


def test_random_boxes_by_hand() -> None:
    """Szegedy et al. 2014, section 6: 8 % to 100 % of the area, aspect 3/4 to 4/3, uniform on a
    logarithmic scale.
    """
    assert box(100, 100, 1.0, 0.5) == (0, 0, 100, 100)  # the whole image, square: the middle of the scale
    assert box(100, 100, 0.0, 0.5) == (0, 0, 28, 28)  # 800 pixels
    assert box(100, 100, 0.0, 0.0) == (0, 0, 33, 24)  # sqrt(800 / 0.75) and sqrt(800 * 0.75)
    assert box(100, 100, 0.0, 1.0) == (0, 0, 24, 33)
    assert box(100, 100, 1.0, 0.0, 0.0, 0.5) == (0, 0, 28, 28)  # 115 rows do not fit: the second attempt
    assert box(100, 100, 0.0, 0.5, place=0.999) == (72, 72, 28, 28)
    # nothing fits: the largest box in the centre with an allowed aspect
    assert box(30, 300, *[1.0, 0.5] * 10) == (0, 130, 30, 40)
    assert box(300, 30, *[1.0, 0.5] * 10) == (130, 0, 40, 30)
    assert box(100, 100, *[1.0, 0.0] * 10, area=1.0) == (0, 0, 100, 100)


def test_random_boxes_have_the_stated_distribution() -> None:
    height, width, count = 300, 400, 4000
    draws = torch.rand(count, 26, generator=torch.Generator().manual_seed(0)).tolist()
    boxes = [random_box(height, width, draw, 0.08) for draw in draws]
    areas = np.array([rows * columns / (height * width) for _, _, rows, columns in boxes])
    aspects = np.array([columns / rows for _, _, rows, columns in boxes])
    assert all(0 <= top <= height - rows and 0 <= left <= width - columns for top, left, rows, columns in boxes)
    assert areas.min() == pytest.approx(0.08, abs=0.005)
    assert areas.max() == pytest.approx(1, abs=0.02)
    assert aspects.min() == pytest.approx(3 / 4, abs=0.02)
    assert aspects.max() == pytest.approx(4 / 3, abs=0.02)
    torchvision()
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(count)])
    for ours, other in (
        (areas, theirs.prod(1) / (height * width)),
        (np.log(aspects), np.log(theirs[:, 1] / theirs[:, 0])),
    ):
        for quantile in np.linspace(0.05, 0.95, 19):  # shares of both samples below it: 4 standard deviations apart
            bound = np.quantile(other, quantile)
            assert abs((ours <= bound).mean() - quantile) < 4 * math.sqrt(2 * quantile * (1 - quantile) / count)
    places = np.array([(top / (height - rows + 1), left / (width - columns + 1)) for top, left, rows, columns in boxes])
    assert np.abs(places[areas < 0.5].mean(0) - 0.5).max() < 0.03
    assert abs(np.mean([draw[2] < 0.5 for draw in draws]) - 0.5) < 0.03


def random_batch(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_brightness_and_contrast_equal_tensorpack() -> None:
    """x + v, then (x - mean) * factor + mean for each channel, both kept in 0 to 255 (its imgaug,
    see svhn.py).
    """
    batch, augment = random_batch(), Augment(brightness=30, contrast=0.5)
    draws = torch.rand(5, augment.draws, generator=torch.Generator().manual_seed(2))
    found = adjust_colours(batch, draws, augment)
    for i in range(5):
        v, factor = 30 * (2 * draws[i, CROP_DRAWS].item() - 1), 0.5 + draws[i, CROP_DRAWS + 1].item()
        shifted = np.clip(batch[i].numpy().astype(np.float64) + v, 0, 255)
        mean = shifted.mean((1, 2), keepdims=True)
        np.testing.assert_allclose(found[i], np.clip((shifted - mean) * factor + mean, 0, 255), atol=1e-3)
    extreme = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.5, 0.0, 0.0]])
    ends = adjust_colours(batch[:2], extreme, augment)
    torch.testing.assert_close(ends[0], (batch[0].float() - 30).clamp(0, 255))
    half = batch[1].float()
    torch.testing.assert_close(ends[1], (half + half.mean((1, 2), keepdim=True)) / 2)


def test_jitter_equals_torchvision() -> None:
    torchvision()
    from torchvision.transforms import functional as theirs

    batch, augment = random_batch(), Augment(jitter=0.4)
    draws = torch.rand(5, augment.draws, generator=torch.Generator().manual_seed(2))
    found = adjust_colours(batch, draws, augment) / 255
    for i in range(5):
        factors = [1 + 0.4 * (2 * u - 1) for u in draws[i, CROP_DRAWS:].tolist()]
        one = theirs.adjust_brightness(batch[i].float() / 255, factors[0])
        one = theirs.adjust_saturation(theirs.adjust_contrast(one, factors[1]), factors[2])
        torch.testing.assert_close(found[i], one, atol=2e-4, rtol=0)  # torchvision writes .2989 and .587 of grey


def test_images_are_returned_if_colours_do_not_change() -> None:
    batch = random_batch()
    assert adjust_colours(batch, torch.rand(5, 3), Augment(4, True)) is batch
    grey = batch[:, :1]
    assert adjust_colours(grey, torch.full((5, 6), 0.5), Augment(jitter=0.4)).shape == grey.shape


def test_svhn_at_40_pixels_with_brightness_and_contrast() -> None:
    split = Split(random_batch(12).repeat(1, 1, 8, 6)[:, :, :32, :32], torch.arange(12) % 10)
    found = svhn.resize_split(split, 40)
    assert found.images.shape == (12, 3, 40, 40)
    x, weights = split.images[3, 1].double(), torch.zeros(40, 32, dtype=torch.float64)
    for i in range(40):  # the centre of the new pixel is between two old centres
        place = (i + 0.5) * 32 / 40 - 0.5
        low = min(max(math.floor(place), 0), 31)
        share = min(max(place - low, 0.0), 1.0)
        weights[i, low] += 1 - share
        weights[i, min(low + 1, 31)] += share
    expected = weights @ x @ weights.T
    assert (found.images[3, 1].double() - expected).abs().max() <= 0.5 + 1e-3
    assert svhn.resize_split(split, 32) is split
    augment = Augment(brightness=30, contrast=0.5)
    mean, std = normalization("by256", found.images)
    data = Dataset(
        name="svhn", train=found, val=found.take(torch.arange(0)), test=found, classes=10, mean=mean, std=std,
        augment=augment,
    )  # fmt: skip
    x, _ = next(iter(Loader(data, 12, 0, CPU).unaugmented("test")))
    torch.testing.assert_close(x, found.images.float() / 256)
    trained = torch.cat([x for x, _ in Loader(data, 12, 0, CPU).train(0)])
    assert trained.min() >= 0
    assert trained.max() <= 255 / 256
    assert not torch.equal(trained, torch.cat([x for x, _ in Loader(data, 12, 0, CPU).train(1)]))
    for (x, y), (u, v) in zip(
        list(Loader(data, 4, 0, CPU).train(0))[1:], Loader(data, 4, 0, CPU).train(0, 1), strict=True
    ):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_named_normalizations() -> None:
    batch = random_batch()
    assert normalization("unit", batch) == ((0.0,) * 3, (1.0,) * 3)
    assert normalization("half", batch[:, :1]) == ((0.5,), (0.5,))
    assert normalization([[0.1, 0.2, 0.3], [1, 2, 3]], batch) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert normalization([[0.1], [0.5]], batch) == ((0.1,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="is for 3 channels, but the images have 1"):
        normalization("imagenet", batch[:, :1])
    torchvision()
    from torchvision.transforms._presets import ImageClassification

    theirs = ImageClassification(crop_size=224)
    assert FIXED["imagenet"] == (tuple(theirs.mean), tuple(theirs.std))


def test_crops_of_images_in_memory_equal_the_reference() -> None:
    batch = random_batch(8).repeat(1, 1, 3, 2)
    draws = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    found = crop_and_flip(batch, draws, Augment(1, True, size=7))
    for image, draw, got in zip(batch, draws, found, strict=True):
        wide = torch.nn.functional.pad(image, (1, 1, 1, 1))
        top, left = int(draw[0] * 8), int(draw[1] * 8)
        crop = wide[:, top : top + 7, left : left + 7]
        assert torch.equal(got, crop.flip(2) if draw[2] < 0.5 else crop)
    same = reference_augmented(batch[0], draws[0], Augment(1, True))
    assert torch.equal(crop_and_flip(batch[:1], draws[:1], Augment(1, True))[0], same)
    assert torch.equal(center_crop(batch, 7), batch[:, :, 2:9, 2:9])


def test_large_images_are_evaluated_in_small_batches() -> None:
    many = Split(torch.zeros(100, 1, 400, 400, dtype=torch.uint8), torch.arange(100))
    data = Dataset(name="big", train=many, val=many, test=many, classes=2, mean=(0.0,), std=(1.0,))
    sizes = [len(y) for _, y in Loader(data, 4, 0, CPU).unaugmented("test")]
    assert sizes == [MAX_EVALUATION_PIXELS // 160_000, 100 - MAX_EVALUATION_PIXELS // 160_000]
