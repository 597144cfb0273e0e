"""Provides data sets without their images.

`qbench plan` uses the published shapes, classes and numbers of images. A finished run's network is rebuilt from the
input format that its checkpoint contains.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch

from qbench.data.dataset import Dataset, Split, value_ends

SVHN_IMAGES = {"train": 73_257, "extra": 531_131, "both": 604_388}
"""Maps a value of `dataset.split` to the number of SVHN's training images."""


class DatasetSpec(NamedTuple):
    """The properties of a data set that are known without its files.

    Args:
        shape: channels, height and width of an image as the network gets it.
        train: number of training images, validation images included.
        test: number of test images.
        balanced: whether the numbers of training images per class differ by at most one.
    """

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int
    synthetic: bool = False
    balanced: bool = False


def placeholder_dataset(node: Mapping[str, Any]) -> Dataset | None:
    """Return a data set of black images that use no memory. Return None if the data set has no specification.

    `node` contains the keys of `dataset`.

    Raises:
        ValueError: `val` is out of range.
    """
    spec = _dataset_spec(node)
    if spec is None:
        return None
    if not 0 <= node["val"] < 1:
        raise ValueError(f"val={node['val']}: must be a fraction of the training images, from 0 to below 1")
    val_images = _val_images(spec, node["val"])
    channels = spec.shape[0]
    return Dataset(
        name=str(node["name"]), train=_black_images(spec.shape, spec.train - val_images),
        val=_black_images(spec.shape, val_images), test=_black_images(spec.shape, spec.test), classes=spec.classes,
        mean=(0.0,) * channels, std=(1.0,) * channels, synthetic=spec.synthetic,
    )  # fmt: skip


def _val_images(spec: DatasetSpec, val: float) -> int:
    """Return the number of validation images.

    A run rounds the share of each class (`stratified_share`). If the numbers of images per class are not known, the
    share of all images is rounded.
    """
    if not spec.balanced:
        return round(val * spec.train)
    images, more = divmod(spec.train, spec.classes)
    return more * round(val * (images + 1)) + (spec.classes - more) * round(val * images)


def _dataset_spec(node: Mapping[str, Any]) -> DatasetSpec | None:
    """Return the specification of a data set, or None.

    The numbers of images come from the data set's paper or web site.
    """
    name, side = str(node["name"]), int(node.get("size", 0))
    if name == "glyphs":
        return DatasetSpec((3, side, side), 34, node["train"], node["test"], synthetic=True, balanced=True)
    if name == "synthetic":
        return DatasetSpec((node["channels"], side, side), node["classes"], node["train"], node["test"], synthetic=True)
    published = {
        "cifar10": DatasetSpec((3, 32, 32), 10, 50_000, 10_000, balanced=True),
        "cifar100": DatasetSpec((3, 32, 32), 100, 50_000, 10_000, balanced=True),
        "fashion_mnist": DatasetSpec((1, 28, 28), 10, 60_000, 10_000, balanced=True),
        "mnist": DatasetSpec((1, 28, 28), 10, 60_000, 10_000),
        "tiny_imagenet": DatasetSpec((3, 64, 64), 200, 100_000, 10_000, balanced=True),
        "imagenet": DatasetSpec((3, side, side), 1000, 1_281_167, 50_000),
        "svhn": DatasetSpec((3, side, side), 10, SVHN_IMAGES.get(str(node.get("split")), 0), 26_032),
    }
    return published.get(name)


class InputFormat(TypedDict):
    """What a network must know about the images of its data set. Checkpoints contain it.

    `shape` is (C, H, W). `mean` and `std` normalize uint8 images divided by 255, or float images as they are. For float
    images, `ends` contains the lowest and the highest pixel value per channel. For uint8 images, it is empty. If the
    classes have no names, there is no key `class_names`.
    """

    dataset: str
    shape: list[int]
    classes: int
    mean: list[float]
    std: list[float]
    ends: list[list[float]]
    class_names: NotRequired[list[str]]


def input_format(data: Dataset) -> InputFormat:
    """Return the input format of a data set."""
    ends = [] if data.train.dtype == torch.uint8 else [list(end) for end in value_ends(data.train)]
    stored: InputFormat = {
        "dataset": data.name, "shape": list(data.shape), "classes": data.classes,
        "mean": list(data.mean), "std": list(data.std), "ends": ends,
    }  # fmt: skip
    if data.class_names:
        stored["class_names"] = list(data.class_names)
    return stored


def dataset_from_format(stored: InputFormat) -> Dataset:
    """Return a data set with a given input format. Each split has only two images, of one colour each."""
    channels, height, width = stored["shape"]
    images = torch.zeros(2, channels, height, width, dtype=torch.float32 if stored["ends"] else torch.uint8)
    for image, end in zip(images, stored["ends"], strict=False):
        image += torch.tensor(end)[:, None, None]
    split = Split(images, torch.zeros(2, dtype=torch.int64))
    return Dataset(
        name=stored["dataset"], train=split, val=split, test=split, classes=stored["classes"],
        mean=tuple(stored["mean"]), std=tuple(stored["std"]), class_names=tuple(stored.get("class_names", ())),
    )  # fmt: skip


def _black_images(shape: tuple[int, int, int], count: int) -> Split:
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(count, *shape)
    return Split(images, torch.zeros(1, dtype=torch.int64).expand(count))
