"""Chooses the constants that normalize images per channel: (x / 255 - mean) / deviation.

`dataset.normalize` selects the mean and the standard deviation. With `own`, they are computed from the training images.
Every other name stands for fixed numbers.
"""

import torch
from torch import Tensor

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


def normalization(name: str, images_NCHW: Tensor) -> MeanAndStd:
    """Return (mean, std) per channel for a value of `normalize`.

    Raises:
        ValueError: the name is unknown, or its constants are for another number of channels.
    """
    if name == "own":
        return mean_and_std(images_NCHW)
    if name not in FIXED:
        raise ValueError(f"normalize={name}: must be one of own, {', '.join(FIXED)}")
    mean, std = FIXED[name]
    channels = images_NCHW.shape[1]
    if len(mean) not in (1, channels):
        raise ValueError(
            f"normalize={name} is for {len(mean)} channels, but the images have {channels}; use normalize=own"
        )
    return (mean, std) if len(mean) == channels else (mean * channels, std * channels)


def mean_and_std(images_NCHW: Tensor) -> MeanAndStd:
    """Return mean and standard deviation per channel of uint8 images, on the scale [0, 1].

    They are computed from the histogram of grey values. This is exact for any number of images and needs no float copy
    of the images.
    """
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images_NCHW.unbind(1)])
    weights = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (weights * values).sum(1)
    std = (weights * (values - mean[:, None]).square()).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())
