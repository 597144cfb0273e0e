"""What a data set is: three splits of uint8 images in memory, and how a batch of them becomes the network's input.

The order of the training images is a function of (seed, epoch), the augmentation of (seed, epoch, index): a run that
stops anywhere resumes with the same images, however they are fetched.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# Shapes: N images, C channels, H height, W width.


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W) and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """Return the split on a device, its images in channels_last."""
        return Split(self.images.to(device, memory_format=torch.channels_last), self.labels.to(device))

    def take(self, index: Tensor) -> "Split":
        """Return the images of an index tensor (n,)."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Augment:
    """Random crop out of an image padded on each side by `pad` pixels (zeros, or the border), and mirroring."""

    pad: int = 0
    flip: bool = False
    replicate: bool = False


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three splits and what a network must know of them.

    Args:
        val: held out of the training images, for selection; empty where `dataset.val=0`.
        mean, std: per channel, of images scaled to [0, 1].
        made: rendered or random images, to be kept out of tables of papers.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = Augment()
    made: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def image_range(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lowest and highest value per channel that the network can get."""
        pairs = list(zip(self.mean, self.std, strict=True))
        return tuple(-m / s for m, s in pairs), tuple((1 - m) / s for m, s in pairs)

    def fingerprint(self) -> dict[str, str | int]:
        """Return counts and sha256 of the splits: images, labels and their order."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        counts: dict[str, str | int] = {f"{name}_images": len(split) for name, split in splits.items()}
        return counts | {f"{name}_sha256": _sha256(split) for name, split in splits.items()}


def _sha256(split: Split) -> str:
    digest = hashlib.sha256()
    for tensor in (split.images, split.labels):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def hold_out(split: Split, val: float) -> tuple[Split, Split]:
    """Part a training split into (train, val), stratified, always the same way.

    Args:
        val: the part held out, 0 <= val < 1.

    Raises:
        ValueError: nothing would be left to train on, or nothing held out although val > 0.
    """
    if not 0 <= val < 1:
        raise ValueError(f"val={val}: allowed is a part of the training images, from 0 to below 1")
    order = torch.randperm(len(split), generator=Generator().manual_seed(0))
    held = torch.zeros(len(split), dtype=torch.bool)
    for label in split.labels.unique():  # type: ignore[no-untyped-call]
        members = order[split.labels[order] == label]
        held[members[: round(val * len(members))]] = True
    train, rest = torch.arange(len(split))[~held], torch.arange(len(split))[held]
    if not len(train) or (val and not len(rest)):
        where = "to train on" if not len(train) else "to validate on"
        raise ValueError(f"val={val} leaves no image {where} out of {len(split)}; try val=0.1")
    return split.take(train), split.take(rest)


def mean_and_std(images_NCHW: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 images, on the scale [0, 1].

    Counted by grey value: exact for any number of images, without a float copy of them.
    """
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images_NCHW.unbind(1)])
    weights = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (weights * values).sum(1)
    std = (weights * (values - mean[:, None]).square()).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())


class Loader:
    """Makes batches: the network's input float32 (N, C, H, W) in channels_last, and labels.

    Args:
        data: the data set; its splits are moved to `device` whole, copied unless they are there in channels_last.
        batch_size: images per training batch; images beyond the last full batch of an epoch wait for the next one.
        seed: the order and the augmentation follow from (seed, epoch).
    """

    def __init__(self, data: Dataset, batch_size: int, seed: int, device: torch.device) -> None:
        self.splits = {name: getattr(data, name).to(device) for name in ("train", "val", "test")}
        self.augment = data.augment
        self.batch_size = min(batch_size, len(data.train))
        self.steps = len(data.train) // self.batch_size
        self.seed, self.device = seed, device
        # Whole images: numbers per channel, broadcast in channels_last, are eight times slower.
        channels, height, width = data.shape
        mean, std = (torch.tensor(v, device=device).expand(height, width, channels) for v in (data.mean, data.std))
        self._mean = (255 * mean).contiguous().movedim(2, 0)
        self._scale = (1 / (255 * std)).contiguous().movedim(2, 0)

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the epoch's training batches from number `start` on."""
        split = self.splits["train"]
        generator = Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(len(split), generator=generator).to(self.device)
        draws = torch.rand(len(split), 3, generator=generator).to(self.device)  # by image, whatever its place
        for step in range(start, self.steps):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            images = split.images.movedim(1, 3).index_select(0, index).movedim(3, 1)  # rows of memory, copied whole
            yield self.normalize(augmented(images, draws[index], self.augment)), split.labels[index]

    def plain(self, name: str, limit: int | None = None, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a split's images (the first `limit`) in order, not augmented."""
        split = self.splits[name]
        count = len(split) if limit is None else min(limit, len(split))
        for start in range(0, count, size):
            stop = min(start + size, count)
            yield self.normalize(split.images[start:stop]), split.labels[start:stop]

    def normalize(self, images_NCHW: Tensor) -> Tensor:
        """Return (x / 255 - mean) / std as float32 in channels_last."""
        floats = images_NCHW.to(torch.float32, memory_format=torch.channels_last)
        return floats.sub_(self._mean).mul_(self._scale)


def augmented(images_NCHW: Tensor, draws: Tensor, augment: Augment) -> Tensor:
    """Crop and mirror every image by its own draws.

    Args:
        draws: uniform numbers in [0, 1), (N, 3): vertical place, horizontal place, mirroring.
    """
    if not augment.pad and not augment.flip:
        return images_NCHW
    pad, (count, _, height, width) = augment.pad, images_NCHW.shape
    image = torch.arange(count, device=draws.device)
    dy, dx = (draws[:, :2] * (2 * pad + 1)).long().unbind(1)
    images = images_NCHW.movedim(1, 3)
    if augment.flip:  # the mirror image of a crop is the crop, at the mirrored place, of the mirror image
        mirrored = draws[:, 2] < 0.5
        images = torch.cat([images, images.flip(2)])
        image, dx = image + count * mirrored, torch.where(mirrored, 2 * pad - dx, dx)
    windows = _padded(images, pad, augment.replicate).unfold(1, height, 1).unfold(2, width, 1)
    return windows[image, dy, dx]


def _padded(images_NHWC: Tensor, pad: int, replicate: bool) -> Tensor:
    if not replicate:
        return F.pad(images_NHWC, (0, 0, pad, pad, pad, pad))
    for axis in (1, 2):  # torch's own replication of uint8 is five times slower
        first, last = (images_NHWC.narrow(axis, at, 1) for at in (0, images_NHWC.shape[axis] - 1))
        images_NHWC = torch.cat([first] * pad + [images_NHWC] + [last] * pad, axis)
    return images_NHWC


def _mix(seed: int, epoch: int) -> int:
    """Return a 63-bit generator seed that (seed, epoch) alone decide; neighbouring pairs give unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"order {seed} {epoch}".encode()).digest()[:8]) >> 1
