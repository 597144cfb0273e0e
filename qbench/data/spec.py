"""Data sets without their images: shapes, classes and counts, for what is planned where the files are not at hand."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from qbench.data.dataset import Dataset, Split

SVHN = {"train": 73_257, "extra": 531_131, "both": 604_388}


class DatasetSpec(NamedTuple):
    """Channels, height and width as the network gets them; classes; images to train on, val among them, and to test."""

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int
    made: bool = False


def outline(node: Mapping[str, Any]) -> Dataset | None:
    """Return a data set of black images that take no memory, from its node's keys; None for one not known here.

    Raises:
        ValueError: `val` out of range.
    """
    known = _known(node)
    if known is None:
        return None
    if not 0 <= node["val"] < 1:
        raise ValueError(f"val={node['val']}: allowed is a part of the training images, from 0 to below 1")
    held = round(node["val"] * known.train)
    channels = known.shape[0]
    return Dataset(
        name=str(node["name"]), train=_black(known.shape, known.train - held), val=_black(known.shape, held),
        test=_black(known.shape, known.test), classes=known.classes, mean=(0.0,) * channels, std=(1.0,) * channels,
        made=known.made,
    )  # fmt: skip


def _known(node: Mapping[str, Any]) -> DatasetSpec | None:
    """Return what a node's data set looks like; the counts are those of each set's own paper or site."""
    name, side = str(node["name"]), int(node.get("size", 0))
    fixed = {
        "cifar10": DatasetSpec((3, 32, 32), 10, 50_000, 10_000),
        "cifar100": DatasetSpec((3, 32, 32), 100, 50_000, 10_000),
        "fashion_mnist": DatasetSpec((1, 28, 28), 10, 60_000, 10_000),
        "mnist": DatasetSpec((1, 28, 28), 10, 60_000, 10_000),
        "tiny_imagenet": DatasetSpec((3, 64, 64), 200, 100_000, 10_000),
        "imagenet": DatasetSpec((3, side, side), 1000, 1_281_167, 50_000),
        "svhn": DatasetSpec((3, side, side), 10, SVHN.get(str(node.get("split")), 0), 26_032),
    }
    if name == "glyphs":
        return DatasetSpec((3, side, side), 34, node["train"], node["test"], made=True)
    if name == "synthetic":
        return DatasetSpec((node["channels"], side, side), node["classes"], node["train"], node["test"], made=True)
    return fixed.get(name)


def _black(shape: tuple[int, int, int], count: int) -> Split:
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(count, *shape)
    return Split(images, torch.zeros(1, dtype=torch.int64).expand(count))
