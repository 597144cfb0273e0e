"""Measures how many images per second are cropped (pad 4), mirrored and normalized (3x32x32 uint8, one thread).

    .venv/bin/python scripts/bench/pipeline.py

Several implementations are compared. In every round, each implementation makes the same number of images from 50,000
random images. torchvision transforms tensors (not PIL images) one by one in two persistent workers of a DataLoader. The
table also states processor time, because other programs may slow down the machine. The processor time of the
DataLoader's workers is not known.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, count, islice

import torch
import torch.nn.functional as F
from measure import Ratio, Work, interleaved, machine, markdown, versions
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Split
from qbench.data.loader import Loader
from qbench.system.torchvision import torchvision

IMAGES, BATCH, BATCHES, PAD, SIZE = 50_000, 128, 48, 4, 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
OURS, THEIRS = "ours: crop, mirror, normalise", "torchvision v2, DataLoader, 2 workers"
TARGETS = {OURS: ">= 150,000 images/s", THEIRS: ">= 5"}


def main() -> None:
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    split = Split(images, torch.zeros(IMAGES, dtype=torch.int64)).to(torch.device("cpu"))
    ways: dict[str, Work] = {
        OURS: ours(split, Augment(PAD, flip=True)),
        "the same, the border repeated instead of zeros": ours(split, Augment(PAD, flip=True, replicate=True)),
        "the same, normalised only": ours(split, Augment()),
        THEIRS: theirs(images, split.labels),
        "plain torch, image by image": partial(by_image, images),
    }
    processor_times: dict[str, list[float]] = {name: [] for name in ways}
    ratios = interleaved({name: partial(clocked, ways[name], processor_times[name]) for name in ways})
    print(f"{machine()}, {versions('torchvision')}; 1 thread, batches of {BATCH}, {BATCHES} in a round\n")
    columns = ("way", "images/s", "images/s of processor time", "time over ours (quartiles)", "target")
    print(markdown(columns, [row(name, ratios[name], processor_times[name]) for name in ways]))
    print(f"\nMemory: {split.images.nbytes / 1e6:.0f} MB of images. The loader copies them once if they are not in")
    print("channels_last. CIFAR-10 and CIFAR-100 are read in channels_last.")


def ours(split: Split, augment: Augment) -> Work:
    """Return a function that reads the next batches of qbench's loader. After an epoch ends, the next epoch begins."""
    none = split.take(torch.arange(0))
    data = Dataset(
        name="random", train=split, val=none, test=none, classes=1, mean=MEAN, std=STD, augment=augment
    )  # fmt: skip
    batches = chain.from_iterable(map(Loader(data, BATCH, 0, torch.device("cpu")).train, count()))
    return lambda: drain(islice(batches, BATCHES))


def theirs(images: Tensor, labels: Tensor) -> Work:
    """Return a function that reads the same number of batches from a DataLoader with torchvision's transforms."""
    torchvision()
    from torchvision.transforms import v2

    crop, mirror = v2.RandomCrop(SIZE, padding=PAD), v2.RandomHorizontalFlip()
    transform = v2.Compose([crop, mirror, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    data = TensorDataset(images, labels)
    batches = DataLoader(
        data, BATCH, sampler=RandomSampler(data, num_samples=BATCH * BATCHES), num_workers=2, persistent_workers=True,
        collate_fn=partial(collated, transform),
    )  # fmt: skip
    return lambda: drain(batches)


def collated(transform: Callable[[Tensor], Tensor], samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return a batch of a worker's samples, after each sample was transformed separately."""
    return torch.stack([transform(image) for image, _ in samples]), torch.stack([label for _, label in samples])


def by_image(images: Tensor) -> None:
    """Make the batches of one round, one image at a time, with plain torch operations."""
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (MEAN, STD))
    for index in torch.randint(IMAGES, (BATCHES, BATCH)):
        batch = []
        for image in images[index]:
            y, x = torch.randint(2 * PAD + 1, (2,)).tolist()
            crop = F.pad(image, (PAD, PAD, PAD, PAD))[:, y : y + SIZE, x : x + SIZE]
            batch.append(((crop.flip(2) if torch.rand(()) < 0.5 else crop) / 255 - mean) / std)
        torch.stack(batch)


def drain(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Read all batches, and check that none is missing."""
    assert sum(len(labels) for _, labels in batches) == BATCH * BATCHES


def clocked(work: Work, processor_times: list[float]) -> None:
    """Run the work and record its processor time."""
    began = time.process_time()
    work()
    processor_times.append(time.process_time() - began)


def row(name: str, ratio: Ratio, processor_times: list[float]) -> tuple[str, ...]:
    """Return the row of the table for one implementation."""
    images = BATCH * BATCHES
    processor = "-" if name == THEIRS else f"{images / statistics.median(processor_times):,.0f}"
    return name, f"{images / ratio.seconds:,.0f}", processor, str(ratio), TARGETS.get(name, "")


if __name__ == "__main__":
    main()
