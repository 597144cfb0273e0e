"""Defines splits whose images are read again in every epoch, because a random transform changes them.

The images come from a map-style torch data set, one at a time, in the main process. Before an image is read, the random
number generators of torch, NumPy and Python are seeded from (seed, epoch, index of the image). A run that stops at any
batch therefore resumes with the same images. In evaluation, the seed of an image is fixed.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self, SupportsInt, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from qbench.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Ends = tuple[tuple[float, ...], tuple[float, ...]]
"""Lowest values and highest values of the images, each with one number per channel."""


@runtime_checkable
class MapDataset(Protocol):
    """A map-style torch data set whose items are (image, label)."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> object:
        """Return (image, label)."""


@dataclass(frozen=True, eq=False)
class DrawnSplit:
    """A split of N images, each of which is read from a torch data set when it is needed.

    Args:
        source: the torch data set.
        index: positions of the split's images in `source`, (N,) int64.
        labels: the labels, (N,) int64.
        first: one image, read as in evaluation, (1, C, H, W). It gives the shape and the type of all images.
        digests: sha256 of each image, read as in evaluation.
        ends: lowest and highest pixel value per channel over all images, read as in evaluation.
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
        """Return the split with its labels on a device. The images stay where they are."""
        return replace(self, labels=self.labels.to(device))

    def take(self, index: Tensor) -> Self:
        """Return a split with only the images that an index tensor (n,) selects."""
        digests = tuple(self.digests[i] for i in index.tolist())
        return replace(self, index=self.index[index], labels=self.labels[index], digests=digests)

    def read(self, index: Tensor, draws: Tensor | None) -> Tensor:
        """Return images (n, C, H, W) of the split.

        Args:
            index: positions in this split, (n,).
            draws: uniform random numbers in [0, 1), of shape (n, 2 or more). They give the seed of each image's
                transform. None means the fixed seeds of evaluation.
        """
        places = self.index[index].tolist()
        seeds = places if draws is None else _seeds(draws)
        with own_random_state():
            images = [read_item(self.source, place, seed)[0] for place, seed in zip(places, seeds, strict=True)]
        return torch.stack(images)


def _seeds(draws: Tensor) -> list[int]:
    """Return a 48-bit seed for each row of random numbers. Each random number contributes 24 bits."""
    bits = (draws[:, :2].double() * 2**24).long()
    return (bits[:, 0] * 2**24 + bits[:, 1]).tolist()


@contextmanager
def own_random_state() -> Iterator[None]:
    """Restore the states of the CPU's random number generators on exit."""
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
    """Seed the CPU's random number generators.

    `torch.manual_seed` is not used, because it would also seed the generators of the GPU.
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def read_item(source: MapDataset, place: int, seed: int | None) -> tuple[Tensor, int]:
    """Return one item of a torch data set: the image (C, H, W), uint8 or float32, and the label.

    Args:
        seed: seed for a random transform. None means that the generators are not seeded.

    Raises:
        DataError: the item is not (image, label), or the image or label has an unsupported type.
    """
    if seed is not None:
        seed_cpu(seed)
    item = source[place]
    if not isinstance(item, Sequence) or len(item) != 2:
        found = f"{len(item)} values" if isinstance(item, Sequence) else f"a {type(item).__name__}"
        raise DataError(f"item {place} is {found}: must be (image, label)")
    return _image(item[0], place), _label(item[1], place)


def _image(image: "Tensor | Image", place: int) -> Tensor:
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
        f"image {place} is {found}: must be a tensor (C, H, W), uint8 or float, or a PIL image\n"
        "add torchvision's transforms.ToTensor() to the transform"
    )


def seem_channels_last(shape: Sequence[int]) -> bool:
    """Return whether the last dimension of a three-dimensional image probably contains the channels.

    There are three such cases. First, the last dimension is a usual number of channels (1, 3 or 4), and the first
    dimension is not. Second, the first dimension is above 4, and the last dimension is 2. Third, the first dimension is
    above 4, and only the first two dimensions are equal, as height and width often are.
    """
    first, second, last = shape
    if last in (1, 3, 4) and first not in (1, 3, 4):
        return True
    return first > 4 and (last == 2 or first == second != last)


def _tensor_of_pil(image: "Image", place: int) -> Tensor:
    """Return a PIL image as a tensor (C, H, W).

    8-bit images in the modes L, LA, RGB and RGBA keep their channels. Images in other 8-bit modes are converted to RGB,
    for example palette images, whose pixels are indices into a list of colours.
    """
    array = np.array(image)
    if array.dtype == np.uint8 and image.mode not in ("L", "LA", "RGB", "RGBA"):
        from qbench.data.images import to_rgb  # imported late, because not all runs need PIL

        try:
            array = np.array(to_rgb(image))
        except ValueError as error:
            raise DataError(f"image {place}: {error}\nconvert it to RGB or L") from None
    return torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).movedim(2, 0)


def _label(label: SupportsInt, place: int) -> int:
    try:
        if int(label) == label:
            return int(label)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise DataError(f"label {place} is {label!r}: must be a whole number of 0 or more")
