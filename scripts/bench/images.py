"""Measures how many photographs of 500 x 375 pixels are decoded and cropped to 224 x 224 per second on one core.

    .venv/bin/python scripts/bench/images.py [--count 256]

The files are random JPEG images of about 77 kB (quality 90). The uint8 batches of one epoch are made
in two ways: from the files, and from `dataset.cache`. Every round times both ways in this process,
with one thread. Times are processor times. The row `decoded only` has the speed of PIL without a crop. Normalization to
float32 takes place on the run's device, and has a separate row.

The last line has the time in which one decoding process starts. A run starts its decoding processes in every epoch.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import machine, markdown, versions
from PIL import Image

from qbench.data import folder
from qbench.data.dataset import Dataset
from qbench.data.file_stream import FileSplit, decoded_batches
from qbench.data.loader import Loader

BATCH, CLASSES = 32, 4
TARGETS = {"files, plain": "900", "files, inception": "900", "cache, plain": "4,000"}


def write_photographs(root: Path, count: int) -> None:
    """Write `count` training images and a few test images with structures of several scales and some noise."""
    draw = np.random.default_rng(0)
    for part, many in (("train", count), ("val", CLASSES)):
        for i in range(many):
            path = root / part / f"class{i % CLASSES}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            height = 375 - (i == 0)  # images of one size would be kept in memory
            rough = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(rough.resize((500, height), Image.Resampling.BICUBIC)).astype(float)
            noisy = smooth + draw.normal(0, 12, smooth.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def dataset(root: Path, augment: str, cache: str) -> Dataset:
    """Return the data set, whose images stream from their files or from the cache."""
    return folder.build(root=str(root), augment=augment, val=0.0, cache=cache)


def epoch_of(data: Dataset) -> Callable[[int], int]:
    """Return a function that makes the batches of an epoch, and returns the number of their images."""
    split = data.train
    assert isinstance(split, FileSplit)

    def run(epoch: int) -> int:
        generator = torch.Generator().manual_seed(epoch)
        shuffled = torch.randperm(len(split), generator=generator)
        order = [shuffled[start : start + BATCH] for start in range(0, len(split), BATCH)]
        draws = torch.rand(len(split), data.augment.draws, generator=generator)
        return sum(map(len, decoded_batches(split, order, draws, data.augment, 0, torch.device("cpu"))))

    return run


def normalization_of(data: Dataset, count: int) -> Callable[[int], int]:
    """Return a function that normalizes batches, and returns the number of their images."""
    loader = Loader(data, BATCH, 0, torch.device("cpu"))
    batch = torch.randint(256, (BATCH, 224, 224, 3), dtype=torch.uint8).movedim(3, 1)
    return lambda epoch: sum(len(loader.normalize(batch)) for _ in range(count // BATCH))


def decode(root: Path) -> int:
    """Decode all training images."""
    paths = sorted((root / "train").rglob("*.jpg"))
    for path in paths:
        with Image.open(path) as image:
            image.load()
    return len(paths)


def start_seconds(data: Dataset) -> float:
    """Return the seconds in which a decoding process starts and decodes one image, once the fork server runs."""
    split, seconds = data.train, []
    assert isinstance(split, FileSplit)
    for _ in range(6):
        began = time.perf_counter()
        list(decoded_batches(split, [torch.tensor([0])], None, data.augment, 1, torch.device("cpu")))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])  # the first start also starts the fork server


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root, cache = Path(scratch) / "set", str(Path(scratch) / "cache")
        write_photographs(root, options.count)
        ways: dict[str, Callable[[int], int]] = {"decoded only": lambda epoch: decode(root)}
        for source, place in (("files", ""), ("cache", cache)):
            for augment in ("plain", "inception"):
                data = dataset(root, augment, place)
                ways[f"{source}, {augment}"] = epoch_of(data)
        ways["normalization on the CPU"] = normalization_of(data, options.count)
        start = start_seconds(dataset(root, "plain", ""))
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for epoch in range(options.rounds):
            for name, run in ways.items():
                began = time.process_time()
                speeds[name].append(run(epoch) / (time.process_time() - began))
    rows = [
        (name, f"{statistics.median(each):,.0f}", f"{max(each):,.0f}", TARGETS.get(name, ""))
        for name, each in speeds.items()
    ]
    print(f"{machine()}, {versions('pillow')}; batches of {BATCH}, {options.rounds} rounds of {options.count} images\n")
    print(markdown(("way", "images/s of one core, median", "best", "target"), rows))
    print(f"\nOne decoding process starts in {start:.2f} s (wall time).")


if __name__ == "__main__":
    main()
