"""Chooses the constants that normalize images per channel: (x / 255 - mean) / deviation.

`dataset.normalize` selects the mean and the standard deviation. With `own`, both are computed from the training images.
Every other name stands for fixed numbers. The value can also be two lists, the means and the standard deviations, such
as [[0.49, 0.48, 0.45], [0.25, 0.24, 0.26]].
"""

import math

import torch
from torch import Tensor

Normalize = str | list[list[float]]
"""A value of `dataset.normalize`: a name, or mean and standard deviation."""

MeanAndStd = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, each with one number per channel."""

FIXED: dict[str, MeanAndStd] = {
    "unit": ((0.0,), (1.0,)),  # [0, 1]: Gupta et al.
    "half": ((0.5,), (0.5,)),  # [-1, 1]: Polino et al.'s code for CIFAR
    "by256": ((0.0,), (256 / 255,)),  # x / 256: DoReFa's training script for SVHN
    # used to train all of torchvision's ImageNet weights: pytorch.org/vision, "Models and
    # pre-trained weights"
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

COUNTED = 1000
"""Number of images whose grey values are counted at once."""


def normalization(normalize: Normalize, images_NCHW: Tensor) -> MeanAndStd:
    """Return (mean, std) per channel for a value of `normalize`. If a list has one number, all channels use it.

    Raises:
        ValueError: the name is unknown, the lists are invalid, or the number of constants is not the number of
            channels.
    """
    if normalize == "own":
        return mean_and_std(images_NCHW)
    if isinstance(normalize, str) and normalize not in FIXED:
        raise ValueError(f"normalize={normalize}: must be one of own, {', '.join(FIXED)}, or [MEANS,DEVIATIONS]")
    mean, std = FIXED[normalize] if isinstance(normalize, str) else _numbers(normalize)
    channels = images_NCHW.shape[1]
    if len(mean) not in (1, channels):
        raise ValueError(
            f"normalize={normalize} is for {len(mean)} channels, but the images have {channels}; use normalize=own"
        )
    return (mean, std) if len(mean) == channels else (mean * channels, std * channels)


def _numbers(lists: list[list[float]]) -> MeanAndStd:
    """Return the means and the standard deviations that two lists of equal length contain.

    Raises:
        ValueError: the lists differ in length, or contain a value that is not a number or is out of range.
    """
    if len(lists) == 2 and all(isinstance(numbers, list) and numbers for numbers in lists):
        mean, std = lists
        numbers = [x for x in (*mean, *std) if isinstance(x, int | float) and math.isfinite(x)]
        if len(mean) == len(std) and len(numbers) == 2 * len(mean) and min(std) > 0:
            return tuple(map(float, mean)), tuple(map(float, std))
    raise ValueError(
        f"normalize={lists}: must be means and deviations above 0, for images from 0 to 1, one number per channel\n"
        "write normalize=[[0.49,0.48,0.45],[0.25,0.24,0.26]]"
    )


def mean_and_std(images_NCHW: Tensor) -> MeanAndStd:
    """Return mean and standard deviation per channel of uint8 images, on the scale [0, 1].

    Both are computed from the histogram of pixel values. The histogram gives exact results for any number of images and
    needs no float copy of the images.
    """
    counts = torch.zeros(images_NCHW.shape[1], 256, dtype=torch.int64)
    for images in torch.split(images_NCHW, COUNTED):
        counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    weights = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (weights * values).sum(1)
    std = (weights * (values - mean[:, None]).square()).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())
