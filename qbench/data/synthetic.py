"""Random images of any shape. Each class is a fixed random pattern with noise.

The images are only for tests of load and speed.
"""

import torch
from torch import Generator

from qbench.data.dataset import Dataset, Split, split_validation
from qbench.data.normalize import mean_and_std


def build(
    *,
    train: int = 2048,
    test: int = 512,
    classes: int = 10,
    channels: int = 3,
    size: int = 32,
    signal: float = 0.3,
    seed: int = 0,
    val: float = 0.1,
) -> Dataset:
    """Return a data set of random images of shape (channels, size, size).

    Args:
        train, test: number of training images (including validation images), and number of test images.
        signal: weight of the class pattern in each pixel value, 0 to 1. Noise has the weight 1 - signal.
        val: fraction of the training images that becomes the validation split.
    """
    if min(train, test, classes, channels, size) < 1:
        raise ValueError("train, test, classes, channels and size: must be 1 or more")
    if not 0 <= signal <= 1:
        raise ValueError(f"signal={signal}: must be 0 to 1")
    generator = Generator().manual_seed(seed)
    patterns = torch.rand(classes, channels, size, size, generator=generator)
    labels = torch.randint(classes, (train + test,), generator=generator)
    noise = torch.rand(train + test, channels, size, size, generator=generator)
    images = (255 * torch.lerp(noise, patterns[labels], signal)).to(torch.uint8)
    all_images = Split(images, labels)
    train_split, val_split = split_validation(all_images.take(torch.arange(train)), val)
    mean, std = mean_and_std(train_split.images)
    return Dataset(
        name="synthetic",
        train=train_split,
        val=val_split,
        test=all_images.take(torch.arange(train, train + test)),
        classes=classes,
        mean=mean,
        std=std,
        synthetic=True,
    )
