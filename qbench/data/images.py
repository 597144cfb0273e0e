"""One image file: decoding, conversion to RGB, resizing, cropping, and what is wrong with it.

Resizing is PIL's bilinear filter, which averages where it shrinks; sizes and centre crops are rounded as torchvision
rounds them. EXIF's orientation is ignored, as torchvision ignores it.
"""

import errno
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from qbench.data.augment import Augment, augmented, centred, random_box
from qbench.errors import DataError

Bytes = npt.NDArray[np.uint8]
SHOWN = 20
"""Bad files that a message names."""

NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def rgb(image: Image.Image) -> Image.Image:
    """Return an image with three channels of 8 bits: grey ones repeated, 16 bits cut to the upper 8, alpha left out.

    Raises:
        ValueError: pixels are floats, of which nobody knows what is white.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats")
    if image.mode.startswith("I"):  # PIL itself would make white of all that exceeds 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """Return an image whose shorter side has `side` pixels; 0 leaves it as it is."""
    width, height = image.size
    short, long = sorted((width, height))
    if not side or short == side:
        return image
    long = int(side * long / short)
    return image.resize((side, long) if width <= height else (long, side), Image.Resampling.BILINEAR)


def decoded(path: str | Path, side: int = 0) -> Bytes:
    """Return a file's image as uint8 (H, W, 3), its shorter side resized to `side` unless that is 0."""
    with Image.open(path) as image:
        return np.array(shrunk(rgb(image), side))


def cropped(path: str | Path, side: int, augment: Augment, draws: Sequence[float] | None) -> Tensor:
    """Return a file's image as uint8 (size, size, 3): augmented by its draws, or the centre crop where there are none.

    Args:
        side: what the shorter side is resized to before a crop of fixed size.
        augment: its `size` is set.
    """
    if draws is not None and augment.area:
        with Image.open(path) as image:
            whole = rgb(image)
        top, left, rows, columns = random_box(whole.height, whole.width, draws, augment.area)
        box = whole.crop((left, top, left + columns, top + rows))
        found = torch.from_numpy(np.array(box.resize((augment.size, augment.size), Image.Resampling.BILINEAR)))
        return found.flip(1) if augment.flip and draws[2] < 0.5 else found
    one = torch.from_numpy(decoded(path, side)).movedim(2, 0)[None]
    found = centred(one, augment.size) if draws is None else augmented(one, torch.tensor([draws]), augment)
    return found[0].movedim(0, 2)


def reason(error: Exception) -> str:
    """Return in a few words why an image cannot be read; raise the error anew if that is not the file's fault."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in NOT_THE_FILES_FAULT):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return "no image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:80] or type(error).__name__


def damaged(bad: Iterable[tuple[str, str]], looked_at: int, where: str) -> DataError:
    """Return the error that names bad files, twenty at most, with the reasons.

    Args:
        bad: paths and reasons.
        looked_at: files among which they were found.
        where: their folder.
    """
    bad = sorted(bad)
    named = ", ".join(f"{path} ({why})" for path, why in bad[:SHOWN])
    more = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return DataError(
        f"{len(bad)} of {looked_at} image files in {where} cannot be used\n{named}{more}\n"
        "put whole files in their place, or remove them: another set of files is another data set"
    )
