"""Defines splits whose images are read again in every epoch, because a random transform changes them.

The images come from a map-style torch data set, one at a time, in the main process. Before each image, the random
number generators of torch, NumPy and Python are seeded from (seed, epoch, index of the image). A run that stops at any
batch therefore resumes with the same images. In evaluation, each image has one fixed seed.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from qbench.errors import DataError

Ends = tuple[tuple[float, ...], tuple[float, ...]]
"""Lowest and highest value of the images, per channel."""


@runtime_checkable
class MapDataset(Protocol):
    """A map-style torch data set of (image, label)."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> Any:
        """Return (image, label)."""


@dataclass(frozen=True, eq=False)
class DrawnSplit:
    """A split of images that a torch data set returns, with labels int64 (N,).

    Args:
        source: the torch data set.
        index: int64 (N,), the images of `source` in this split.
        labels: the labels.
        first: the images as evaluation reads them, for their shape and type: (1, C, H, W).
        digests: sha256 of each image as evaluation reads it.
        ends: lowest and highest values of the images as evaluation reads them, per channel.
    """

    source: MapDataset
    index: Tensor
    labels: Tensor
    first: Tensor
    digests: tuple[bytes, ...]
    ends: Ends

    @property
    def dtype(self) -> torch.dtype:
        """uint8 or float32."""
        return self.first.dtype

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        channels, height, width = self.first.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> "DrawnSplit":
        """Return the split with its labels on a device."""
        return replace(self, labels=self.labels.to(device))

    def take(self, index: Tensor) -> Self:
        """Return the split of the images that an index tensor (n,) selects."""
        digests = tuple(self.digests[i] for i in index.tolist())
        return replace(self, index=self.index[index], labels=self.labels[index], digests=digests)

    def read(self, index: Tensor, draws: Tensor | None) -> Tensor:
        """Return images (n, C, H, W) of the split.

        Args:
            index: (n,).
            draws: uniform random numbers in [0, 1), (n, 2 or more), that seed the transform of each image. None means
                the fixed seeds of evaluation.
        """
        places = self.index[index].tolist()
        seeds = places if draws is None else _seeds(draws)
        with own_random_state():
            images = [read_item(self.source, place, seed)[0] for place, seed in zip(places, seeds, strict=True)]
        return torch.stack(images)


def _seeds(draws: Tensor) -> list[int]:
    """Return a seed of 48 bits for each row of uniform random numbers, which have 24 bits each."""
    bits = (draws[:, :2].double() * 2**24).long()
    return (bits[:, 0] * 2**24 + bits[:, 1]).tolist()


@contextmanager
def own_random_state() -> Iterator[None]:
    """Restore the state of the random number generators of the CPU on exit."""
    torch_state, numpy_state, python_state = (
        torch.default_generator.get_state(),
        np.random.get_state(),
        random.getstate(),
    )
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def seed_cpu(seed: int) -> None:
    """Seed the generators of the CPU. `torch.manual_seed` would also seed those of a GPU."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def read_item(source: MapDataset, place: int, seed: int | None) -> tuple[Tensor, int]:
    """Return the image (C, H, W), uint8 or float32, and the label of one item of a torch data set.

    Args:
        seed: seed of a random transform, or None to draw from the generators as they are.

    Raises:
        DataError: the item is not (image, label) of these types.
    """
    if seed is not None:
        seed_cpu(seed)
    item = source[place]
    if not isinstance(item, Sequence) or len(item) != 2:
        found = f"{len(item)} values" if isinstance(item, Sequence) else f"a {type(item).__name__}"
        raise DataError(f"item {place} is {found}: must be (image, label)")
    return _image(item[0], place), _label(item[1], place)


def _image(image: object, place: int) -> Tensor:
    if not isinstance(image, Tensor) and hasattr(image, "getbands"):
        image = _tensor_of_pil(image, place)
    elif isinstance(image, Tensor) and image.dim() == 3 and seem_channels_last(image.shape):
        raise DataError(
            f"image {place} is {tuple(image.shape)}: must be (C, H, W)\nto move the channels: image.permute(2, 0, 1)"
        )
    if isinstance(image, Tensor) and image.dim() == 3 and (image.dtype == torch.uint8 or image.is_floating_point()):
        return image.detach() if image.dtype == torch.uint8 else image.detach().float()
    found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
    raise DataError(
        f"image {place} is {found}: must be a tensor (C, H, W), uint8 or float, or an image of PIL\n"
        "add torchvision's transforms.ToTensor() to the transform"
    )


def seem_channels_last(shape: Sequence[int]) -> bool:
    """Return whether the channels of an image of three dimensions are probably the last dimension.

    They are if it is a usual number of channels and the first is not, or if only the first two dimensions are equal, as
    height and width often are.
    """
    first, second, last = shape
    if last in (1, 3, 4) and first not in (1, 3, 4):
        return True
    return first > 4 and (last == 2 or first == second != last)


def _tensor_of_pil(image: Any, place: int) -> Tensor:
    """Return an image of PIL as a tensor (C, H, W). Colours of 8 bits that are not RGB become RGB.

    Pixels of a palette image are numbers of colours, which have no order.
    """
    array = np.array(image)
    if array.dtype == np.uint8 and image.mode not in ("L", "LA", "RGB", "RGBA"):
        from qbench.data.images import to_rgb  # imported late, because not all runs need PIL

        try:
            array = np.array(to_rgb(image))
        except ValueError as error:
            raise DataError(f"image {place}: {error}\nconvert it to RGB or L") from None
    return torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).movedim(2, 0)


def _label(label: Any, place: int) -> int:
    try:
        if int(label) == label:
            return int(label)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise DataError(f"label {place} is {label!r}: must be a whole number from 0")
