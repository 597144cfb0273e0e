"""Random images of any shape, each class a fixed random pattern under noise: for load and speed tests, not science."""

import torch
from torch import Generator

from qbench.data.dataset import Dataset, Split, mean_and_std, split_validation


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
    """Return `train` + `test` images (channels, size, size); `signal` in [0, 1] is the pattern's share of a pixel."""
    if min(train, test, classes, channels, size) < 1:
        raise ValueError("train, test, classes, channels and size: allowed is 1 or more")
    if not 0 <= signal <= 1:
        raise ValueError(f"signal={signal}: allowed is 0 to 1")
    generator = Generator().manual_seed(seed)
    patterns = torch.rand(classes, channels, size, size, generator=generator)
    labels = torch.randint(classes, (train + test,), generator=generator)
    noise = torch.rand(train + test, channels, size, size, generator=generator)
    images = (255 * torch.lerp(noise, patterns[labels], signal)).to(torch.uint8)
    everything = Split(images, labels)
    rest = everything.take(torch.arange(train))
    kept, held = split_validation(rest, val)
    mean, std = mean_and_std(kept.images)
    return Dataset(
        name="synthetic",
        train=kept,
        val=held,
        test=everything.take(torch.arange(train, train + test)),
        classes=classes,
        mean=mean,
        std=std,
        made=True,
    )
