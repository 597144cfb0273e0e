"""Decodes, converts, resizes and crops the image of one file.

Resizing uses PIL's bilinear filter, which averages pixels when an image shrinks. Sizes and centre crops are rounded as
in torchvision. The EXIF orientation is ignored, as in torchvision.
"""

import errno
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from qbench.data.augment import Augment, random_box
from qbench.errors import DataError

Pixels = npt.NDArray[np.uint8]

MAX_NAMED = 20
"""Maximum number of bad files that a message names."""

MAX_DEEP = 2**16 - 1
"""Value of white in an image with more than 8 bits per channel."""

SYSTEM_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""System error numbers for too many open files and for lack of memory. They do not mean that a file is damaged."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image with three channels of 8 bits.

    A grey channel is repeated three times. Only the upper 8 bits of 16-bit values are kept. An alpha channel is
    dropped.

    Raises:
        ValueError: the pixels are floats, or integers that do not fit into 16 bits. Such pixels cannot be converted,
            because the value of white is not known.
    """
    if image.mode == "F":
        raise ValueError("the pixels are floats")
    if image.mode.startswith("I"):  # PIL's own conversion would make every value above 255 white
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > MAX_DEEP:
            raise ValueError(f"the pixel values are {low} to {high}: must be 0 to {MAX_DEEP}")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGB":  # a conversion would copy the pixels
        image.load()
        return image
    return image.convert("RGB")


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Return whether an image has more than 8 bits per channel, before the image is decoded.

    PPM and PGM files count as 8-bit images. Such a file states its value of white, and PIL scales the pixels by it.
    """
    raw_modes = " ".join(str(tile[3]) for tile in image.tile)
    return image.format != "PPM" and (image.mode.startswith("I") or bool(re.search(";16[BLNS]", raw_modes)))


def resize_shorter_side(image: Image.Image, side: int) -> Image.Image:
    """Resize an image so that its shorter side has `side` pixels. If `side` is 0, return the image unchanged."""
    width, height = image.size
    short, long = sorted((width, height))
    if not side or short == side:
        return image
    long = int(side * long / short)
    return image.resize((side, long) if width <= height else (long, side), Image.Resampling.BILINEAR)


def decode_image(path: str | Path, side: int = 0) -> Pixels:
    """Return the image of a file as uint8 (H, W, 3). If `side` is above 0, the shorter side gets `side` pixels."""
    with Image.open(path) as image:
        return np.array(resize_shorter_side(to_rgb(image), side))


def load_crop(path: str | Path, side: int, augment: Augment, draws: Sequence[float] | None) -> Tensor:
    """Return a crop of the image of a file as uint8 (size, size, 3).

    Args:
        path: the path of the file.
        side: size in pixels to which the shorter side is resized before a crop of fixed size.
        augment: the augmentation. Its `size` must be above 0, and its padding is black.
        draws: the image's uniform random numbers in [0, 1), or None for the centre crop.
    """
    with Image.open(path) as image:
        whole = to_rgb(image)
    return crop_of(whole, side, augment, draws)


def crop_of(whole: Image.Image, side: int, augment: Augment, draws: Sequence[float] | None) -> Tensor:
    """Return a crop of an RGB image as uint8 (size, size, 3). The other arguments are as in `load_crop`.

    PIL copies only the pixels of the crop. The result is the same as the result of `crop_and_flip` on images in memory.
    """
    if draws is not None and augment.area:
        size = augment.size
        top, left, rows, columns = random_box(whole.height, whole.width, draws, augment.area)
        box = whole.crop((left, top, left + columns, top + rows))
        crop = box.resize((size, size), Image.Resampling.BILINEAR)
    else:
        resized = resize_shorter_side(whole, side)
        crop = resized.crop(fixed_crop(resized.height, resized.width, augment, draws))
    if draws is not None and augment.flip and draws[2] < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(crop))


def crop_of_pixels(pixels: Pixels, side: int, augment: Augment, draws: Sequence[float] | None) -> Tensor:
    """Return the same crop as `crop_of`, from pixels uint8 (H, W, 3).

    If the image needs no resizing, only the pixels of the crop are read.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = fixed_crop(height, width, augment, draws)
    inside = min(left, top) >= 0 and right <= width and bottom <= height
    if (draws is not None and augment.area) or min(height, width) != side or not inside:
        return crop_of(Image.fromarray(pixels), side, augment, draws)
    crop = torch.from_numpy(np.array(pixels[top:bottom, left:right]))
    return crop.flip(1) if draws is not None and augment.flip and draws[2] < 0.5 else crop


def fixed_crop(height: int, width: int, augment: Augment, draws: Sequence[float] | None) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop of fixed size. Pixels outside the image are black.

    Args:
        height, width: size in pixels of the image after resizing.
        draws: the image's uniform random numbers in [0, 1), or None for the centre crop.
    """
    size, pad = augment.size, augment.pad
    if draws is None:
        top, left = round((height - size) / 2), round((width - size) / 2)
    else:  # multiplied in float32, as in `crop_and_flip`
        top, left = (
            int(np.float32(u) * np.float32(length + 2 * pad - size + 1)) - pad
            for u, length in zip(draws, (height, width), strict=False)
        )
    return left, top, left + size, top + size


def prepare_image(
    image: str | Path | Image.Image,
    *,
    shape: tuple[int, int, int],
    side: int | None,
    mean: Tensor,
    std: Tensor,
    prepared_by: str = "",
) -> Tensor:
    """Return an image as a normalized batch of one, (1, C, H, W), as a run prepares its test images.

    Args:
        image: a file, or an image.
        shape: (C, H, W) of the run's images, with one or three channels.
        side: size in pixels to which the shorter side is resized before the crop of the centre. With None, the whole
            image is resized to (H, W).
        mean, std: constants of the normalization, (C, 1, 1), for pixels divided by 255.
        prepared_by: the data set whose own code resizes and crops images, or an empty text. Only images of H x W pixels
            are then accepted, because the sizes of this code are not known.

    Raises:
        OSError: the file cannot be read.
        ValueError: the pixels are floats or too large, or integers of 16 bits that use at most 12 bits. Or the image
            has another size than a data set with its own code needs.
    """
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            opened.load()
            return prepare_image(opened, shape=shape, side=side, mean=mean, std=std, prepared_by=prepared_by)
    channels, height, width = shape
    if prepared_by and image.size != (width, height):
        raise ValueError(
            f"the image has {image.width} x {image.height} pixels, but the network reads {width} x {height}\n"
            f"resize and crop the image as the code of dataset={prepared_by} does with test images"
        )
    deep = is_deep(image) if isinstance(image, ImageFile.ImageFile) else image.mode.startswith("I")
    whole = to_rgb(image)
    if deep and (brightest := int(np.asarray(whole).max())) < 16:
        raise ValueError(
            f"an image of 16 bits in which no value is above {(brightest << 8) + 255}: its values seem to have 12 bits "
            f"or fewer\nwhite must have the value {MAX_DEEP}: scale the values, or convert the image to 8 bits"
        )
    whole = whole if channels == 3 else whole.convert("L")
    if side is None:
        crop = whole.resize((width, height), Image.Resampling.BILINEAR)
    else:
        resized = resize_shorter_side(whole, side)
        crop = resized.crop(fixed_crop(resized.height, resized.width, Augment(size=height), None))
    pixels = torch.from_numpy(np.array(crop)).reshape(height, width, channels).permute(2, 0, 1)
    batch: Tensor = ((pixels.to(mean.device) / 255 - mean) / std)[None]
    return batch


def describe_error(error: Exception) -> str:
    """Return a short reason why an image cannot be read. If the file did not cause the error, raise the error again."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SYSTEM_ERRORS):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:80] or type(error).__name__


def damaged_files_error(bad: Iterable[tuple[str, str]], checked: int, folder: str) -> DataError:
    """Return an error that names up to `MAX_NAMED` bad files with their reasons.

    Args:
        bad: (path, reason) of each bad file.
        checked: number of files that were checked.
        folder: the folder that contains the files.
    """
    bad = sorted(bad)
    named = ", ".join(f"{path} ({why})" for path, why in bad[:MAX_NAMED])
    more = f", and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    return DataError(
        f"{len(bad)} of {checked} image files in {folder} cannot be used\n{named}{more}\n"
        "replace them by complete files, or remove them (removing files changes the data set)"
    )
