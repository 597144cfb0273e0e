"""Augments images: crops, mirrors and changes of colour.

Crops keep the type of the images. Changes of colour return float32 images. Each image has its own random numbers, which
are called draws. The functions take whole batches of images in memory. Images in files are cropped one at a time, when
the file is decoded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: N images, C channels, H height, W width.

CROP_DRAWS = 3
"""Number of random numbers per image for crops: vertical position, horizontal position and mirroring."""

COLOUR_DRAWS = 3
"""Number of random numbers per image for changes of colour."""

BOX_ATTEMPTS = 10
"""Number of attempts to find a random box that fits into the image. Each attempt needs two random numbers."""

ASPECT = (3 / 4, 4 / 3)
"""Smallest and largest width / height of a random crop (Szegedy et al. 2014, arXiv 1409.4842, section 6)."""

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma (ITU-R BT.601)."""


@dataclass(frozen=True)
class Augment:
    """The augmentation of training images. Evaluation images only get a centre crop of the same size.

    Args:
        pad: number of pixels that are added on each side before the random crop.
        replicate: whether the added pixels repeat the border pixels of the image. If false, the added pixels are black.
        flip: whether images are mirrored left to right, each with probability 1/2.
        size: height and width of the crop in pixels. 0 means the height and width of the image.
        area: smallest fraction of the image that a crop of random area and aspect ratio covers. 0 means crops of the
            fixed size `size`.
        brightness: largest change of brightness in either direction, in grey values (0 to 255).
        contrast: largest relative change of contrast. The difference between a pixel and the mean of its channel is
            multiplied by a random factor from 1 - contrast to 1 + contrast.
        jitter: largest relative change of brightness, contrast and saturation. Each of these three properties is
            multiplied by its own random factor from 1 - jitter to 1 + jitter.
    """

    pad: int = 0
    flip: bool = False
    replicate: bool = False
    size: int = 0
    area: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "brightness": (self.brightness, 255), "contrast": (self.contrast, 1), "jitter": (self.jitter, 1),
            "area": (self.area, 1),
        }  # fmt: skip
        for name, (value, highest) in limits.items():
            if not 0 <= value <= highest:
                raise ValueError(f"{name}={value}: must be 0 to {highest}")

    @property
    def changes_colours(self) -> bool:
        """Whether the augmentation changes colours."""
        return bool(self.brightness or self.contrast or self.jitter)

    @property
    def draws(self) -> int:
        """Number of uniform random numbers that an image needs."""
        if self.area:
            return CROP_DRAWS + COLOUR_DRAWS + 2 * BOX_ATTEMPTS
        return CROP_DRAWS + COLOUR_DRAWS if self.changes_colours else CROP_DRAWS


def crop_and_flip(images_NCHW: Tensor, draws: Tensor, augment: Augment) -> Tensor:
    """Return a random crop of each image; some crops are mirrored.

    Args:
        images_NCHW: the images.
        draws: uniform random numbers in [0, 1), of shape (N, 3 or more). The first three numbers of an image determine
            the vertical position of the crop, the horizontal position of the crop, and whether the crop is mirrored.
        augment: the augmentation.
    """
    pad, (count, _, height, width) = augment.pad, images_NCHW.shape
    rows, columns = augment.size or height, augment.size or width
    if not pad and not augment.flip and (rows, columns) == (height, width):
        return images_NCHW
    last_top, last_left = height + 2 * pad - rows, width + 2 * pad - columns
    image = torch.arange(count, device=draws.device)
    top, left = (draws[:, 0] * (last_top + 1)).long(), (draws[:, 1] * (last_left + 1)).long()
    images = images_NCHW.movedim(1, 3)
    if augment.flip:
        # A mirrored crop equals a crop of the mirrored image at the mirrored position.
        mirrored = draws[:, 2] < 0.5
        images = torch.cat([images, images.flip(2)])
        image, left = image + count * mirrored, torch.where(mirrored, last_left - left, left)
    windows = _padded(images, pad, augment.replicate).unfold(1, rows, 1).unfold(2, columns, 1)
    return windows[image, top, left]


def _padded(images_NHWC: Tensor, pad: int, replicate: bool) -> Tensor:
    if not replicate:
        return F.pad(images_NHWC, (0, 0, pad, pad, pad, pad))
    for axis in (1, 2):  # torch's own replication of uint8 is five times slower
        first, last = (images_NHWC.narrow(axis, at, 1) for at in (0, images_NHWC.shape[axis] - 1))
        images_NHWC = torch.cat([first] * pad + [images_NHWC] + [last] * pad, axis)
    return images_NHWC


def center_crop(images_NCHW: Tensor, size: int) -> Tensor:
    """Return the centre crop of `size` x `size` pixels, or the whole image if `size` is 0.

    The position is rounded as in torchvision.
    """
    height, width = images_NCHW.shape[2:]
    if not size or (size, size) == (height, width):
        return images_NCHW
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images_NCHW[:, :, top : top + size, left : left + size]


def random_box(height: int, width: int, draws: Sequence[float], area: float) -> tuple[int, int, int, int]:
    """Return (top, left, rows, columns) of a crop with random area and aspect ratio, in pixels.

    The crop covers a fraction of the image that is drawn uniformly from `area` to 1. The logarithm of the aspect ratio
    is drawn uniformly, as in torchvision. The function draws up to ten shapes until one fits into the image. If none
    fits, the crop is the largest centred box with an allowed aspect ratio.

    Args:
        height, width: size of the image in pixels.
        draws: the image's uniform random numbers in [0, 1).
        area: smallest fraction of the image that the crop covers.
    """
    low, high = map(math.log, ASPECT)
    for share_draw, aspect_draw in zip(*[iter(draws[CROP_DRAWS + COLOUR_DRAWS :])] * 2, strict=True):
        pixels = height * width * (area + (1 - area) * share_draw)
        aspect = math.exp(low + (high - low) * aspect_draw)
        rows, columns = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            return int(draws[0] * (height - rows + 1)), int(draws[1] * (width - columns + 1)), rows, columns
    rows, columns = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def adjust_colours(images_NCHW: Tensor, draws: Tensor, augment: Augment) -> Tensor:
    """Return the images with changed brightness, contrast and saturation. All values stay between 0 and 255.

    The changes are made in this order:

    1. `brightness` shifts all values.

    2. `contrast` scales the differences between values and the mean of their channel.

    3. `jitter` changes brightness, contrast (differences from the mean grey value) and saturation.

    DoReFa's training script for SVHN makes changes 1 and 2 (tensorpack, examples/DoReFa-Net/svhn-digit-dorefa.py). The
    ImageNet training code of He et al. (fb.resnet.torch) makes change 3, with its three parts in random order.

    Returns:
        float32 images of the same shape. If the augmentation does not change colours, the input itself is returned.
    """
    if not augment.changes_colours:
        return images_NCHW
    x = images_NCHW.to(torch.float32)
    u = 2 * draws[:, CROP_DRAWS : CROP_DRAWS + COLOUR_DRAWS, None, None, None] - 1  # in [-1, 1)
    if augment.brightness:
        x = (x + augment.brightness * u[:, 0]).clamp_(0, 255)
    if augment.contrast:
        x = _blend(x, x.mean((2, 3), keepdim=True), 1 + augment.contrast * u[:, 1])
    if augment.jitter:
        x = (x * (1 + augment.jitter * u[:, 0])).clamp_(0, 255)
        x = _blend(x, _grey(x).mean((2, 3), keepdim=True), 1 + augment.jitter * u[:, 1])
        x = _blend(x, _grey(x), 1 + augment.jitter * u[:, 2])
    return x


def _blend(x_NCHW: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return ((x_NCHW - other) * factor + other).clamp_(0, 255)


def _grey(x_NCHW: Tensor) -> Tensor:
    """Return the luma (grey value) of each pixel, of shape (N, 1, H, W)."""
    if x_NCHW.shape[1] != 3:
        return x_NCHW.mean(1, keepdim=True)
    return sum((c * x_NCHW[:, i : i + 1] for i, c in enumerate(GREY)), torch.zeros_like(x_NCHW[:, :1]))
