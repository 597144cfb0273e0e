"""Defines the description that every exported file contains: its run, and the images that its network expects."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from qbench.errors import CheckpointError


class About(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Description of an exported file: the run that it comes from, and the images that its network expects.

    The input of the network is x = (pixel / white - mean) / std, with one mean and std per channel.

    Args:
        form: packed, onnx, int8, qonnx or integer.
        title: method, widths, network and data set, in words.
        identity: the run's identity.
        weights: the run's checkpoint, `last` or `best`.
        dataset: the configuration of the run's data set.
        shape: channels, height and width of an image.
        white: the pixel value of white: 255 for 8-bit images, 1 for float images.
        threads: number of torch threads that were used to verify the export.
        data_sha256: the digest of the run's images (`Result.data_sha256`), or None if the digest is not known. A debug
            run has no digest, because it used only a few of the images that `dataset` describes.
        debug: whether the run had debug=true. The accuracy of such a run is meaningless.
        class_names: the name of each class, or empty if the data set has no names.
        weights_sha256: the digest of the checkpoint's weights (`Result.weights_sha256`), or None in older files.
    """

    form: str
    title: str
    identity: str
    weights: str
    dataset: dict[str, Any]
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    threads: int
    white: int = 255
    data_sha256: str | None = None
    debug: bool = False
    class_names: tuple[str, ...] = ()
    weights_sha256: str | None = None


IMAGE_ROUNDING = 1e-5
"""Largest rounding error of the pixel values of a normalized float32 image."""


def image_range(about: About) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest value of normalized 8-bit images, (C, 1, 1)."""
    mean, std = (np.array(values).reshape(-1, 1, 1) for values in (about.mean, about.std))
    return (0 - mean) / std - IMAGE_ROUNDING, (1 - mean) / std + IMAGE_ROUNDING


def about_fields(about: About) -> dict[str, object]:
    """Return the fields of a description as a file contains them. Empty class names and digests are left out."""
    fields: dict[str, object] = msgspec.to_builtins(about)
    return {name: value for name, value in fields.items() if value or name not in ("class_names", "weights_sha256")}


def read_about(values: Mapping[str, object], source: str) -> About:
    """Return the description that an exported file contains.

    Raises:
        CheckpointError: fields are missing, unknown or have another type.
    """
    try:
        about = msgspec.convert(values, About)
        if min(*about.shape, about.classes, about.threads, about.white) < 1:
            raise ValueError("sizes must be 1 or more")
        if not len(about.mean) == len(about.std) == about.shape[0]:
            raise ValueError("mean and std need one number per channel")
        if len(about.class_names) not in (0, about.classes):
            raise ValueError("class_names needs one name per class")
    except (msgspec.ValidationError, ValueError) as error:
        raise CheckpointError(f"{source} is damaged: {error}") from None
    return about
