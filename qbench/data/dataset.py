"""What a data set is: three splits of uint8 images in memory, and how a batch of them becomes the network's input.

The order of the training images is a function of (seed, epoch), the augmentation of (seed, epoch, index): a run that
stops anywhere resumes with the same images, however they are fetched.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
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
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))

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
        data: the data set; its splits are moved to `device` whole.
        batch_size: images per training batch; images beyond the last full batch of an epoch wait for the next one.
        seed: the order and the augmentation follow from (seed, epoch).
    """

    def __init__(self, data: Dataset, batch_size: int, seed: int, device: torch.device) -> None:
        self.splits = {name: getattr(data, name).to(device) for name in ("train", "val", "test")}
        self.augment = data.augment
        self.batch_size = min(batch_size, len(data.train))
        self.steps = len(data.train) // self.batch_size
        self.seed, self.device = seed, device
        self._mean = 255 * torch.tensor(data.mean, device=device).reshape(1, -1, 1, 1)
        self._scale = 1 / (255 * torch.tensor(data.std, device=device).reshape(1, -1, 1, 1))

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the epoch's training batches from number `start` on."""
        split = self.splits["train"]
        generator = Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(len(split), generator=generator).to(self.device)
        draws = torch.rand(len(split), 3, generator=generator).to(self.device)  # by image, whatever its place
        for step in range(start, self.steps):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            batch = split.take(index)
            yield self.normalize(augmented(batch.images, draws[index], self.augment)), batch.labels

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
    count, _, height, width = images_NCHW.shape
    places = 2 * augment.pad + 1
    dy, dx = ((draws[:, :2] * places).long() - augment.pad).unbind(1)
    rows = torch.arange(height, device=draws.device) + dy[:, None]
    columns = torch.arange(width, device=draws.device).expand(count, -1)
    if augment.flip:
        columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    columns = columns + dx[:, None]
    inside = _inside(rows, height)[:, None, :, None] & _inside(columns, width)[:, None, None, :]
    image = torch.arange(count, device=draws.device)[:, None, None]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    picked = images_NCHW.movedim(1, 3)[image, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    return picked if augment.replicate else picked * inside


def _inside(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


def _mix(seed: int, epoch: int) -> int:
    """Return a 63-bit generator seed that (seed, epoch) alone decide; neighbouring pairs give unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"order {seed} {epoch}".encode()).digest()[:8]) >> 1
