"""Makes batches of a data set's images for the network.

Images in memory are augmented in batches. Other images are read for each batch.

The order of the training images depends only on (seed, epoch). The augmentation of an image depends only on (seed,
epoch, index of the image). A run that stops at any batch therefore resumes with the same images. This holds for images
in memory and for images in files.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from qbench.data.augment import adjust_colours, center_crop, crop_and_flip
from qbench.data.dataset import Dataset, Split, StoredSplit, evenly_spaced
from qbench.data.drawn_split import DrawnSplit
from qbench.data.file_stream import FileSplit, decoded_batches

MAX_EVALUATION_PIXELS = 2**23
"""Maximum number of pixels in an evaluation batch: 500 images of 129x129, or 167 of 224x224."""


class Loader:
    """Makes batches for the network.

    A batch consists of normalized images (N, C, H, W), float32 in channels_last, and labels (N,).

    Args:
        data: the data set. The loader copies splits in memory to `device` and converts them to channels_last, if
            needed.
        batch_size: number of images per training batch. An epoch contains only full batches. The remaining images are
            not used in that epoch.
        seed: seed of the order and of the augmentation. Each epoch combines this seed with the number of the epoch.
        device: the device of the batches.
        workers: number of processes that decode images from files. The batches do not depend on this number.
        shards: number of equal shards into which each training batch is divided.
        own: the indices of the shards that this loader makes.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device,
        workers: int = 0,
        shards: int = 1,
        own: range = range(1),
    ) -> None:
        self.splits: dict[str, StoredSplit] = {
            "train": data.train.to(device), "val": data.val.to(device), "test": data.test.to(device),
        }  # fmt: skip
        self.augment = data.augment
        self.batch_size, self.steps = batch_size_and_steps(data, batch_size)
        self.seed, self.device, self.workers = seed, device, workers
        self._shards, self._own = shards, own
        # Each constant has the full shape of an image. Broadcasting one number per channel in channels_last is eight
        # times slower.
        channels, height, width = data.shape
        mean, std = (torch.tensor(v, device=device).expand(height, width, channels) for v in (data.mean, data.std))
        self._mean = (data.white * mean).contiguous().movedim(2, 0)
        self._scale = (1 / (data.white * std)).contiguous().movedim(2, 0)

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the shards of an epoch's training batches, beginning with batch number `start`.

        Each shard is computed separately. The images of a shard are therefore bit-identical in every process that makes
        this shard.
        """
        split, size = self.splits["train"], self.batch_size // self._shards
        generator = Generator().manual_seed(epoch_seed(self.seed, epoch))
        order = torch.randperm(len(split), generator=generator)
        draws = torch.rand(len(split), self.augment.draws, generator=generator)  # row i belongs to image i of the split
        draws_device = self.device if isinstance(split, Split) else torch.device("cpu")
        order, draws = order.to(draws_device), draws.to(draws_device)
        numbers = [step * self._shards + shard for step in range(start, self.steps) for shard in self._own]
        indices = [order[number * size : (number + 1) * size] for number in numbers]
        for index, images in zip(indices, self._crops(split, indices, draws), strict=True):
            images = adjust_colours(images, draws[index].to(self.device), self.augment)
            yield self.normalize(images), split.labels[index]

    def unaugmented(
        self, name: str, limit: int | None = None, size: int = 500, *, first: int = 0, every: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of the images of a split in order, without augmentation.

        Args:
            name: "train", "val" or "test".
            limit: maximum number of images, or None for all images.
            size: number of images per batch. Batches are smaller if the images are large.
            first, every: yield only the batches with the indices first, first + every, first + 2 every, .... Several
                processes can thus divide the batches of a split among themselves.
        """
        split = self.splits[name]
        count = len(split) if limit is None else min(limit, len(split))
        size = self._evaluation_size(size)
        starts = range(0, count, size)[first::every]
        yield from self._batches(split, [torch.arange(start, min(start + size, count)) for start in starts])

    def sample(self, name: str, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of at most `limit` images of a split, without augmentation.

        These are the first images. If the split is sorted by class, as in a folder, or if a class of the split is not
        among the first images, these are evenly spaced images instead, in a fixed random order. Each batch then has
        images of many classes.
        """
        split = self.splits[name]
        count = min(limit, len(split))
        index = torch.arange(count)
        lacks_classes = len(set(split.labels[:count].tolist())) < len(set(split.labels.tolist()))
        if lacks_classes or is_sorted(split.labels):
            index = evenly_spaced(count, len(split))[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
        yield from self._batches(split, list(torch.split(index, self._evaluation_size(500))))

    def _batches(self, split: StoredSplit, indices: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized images and labels, one batch for each index tensor."""
        for index, images in zip(indices, self._crops(split, indices, None), strict=True):
            yield self.normalize(images), split.labels[index]

    def batch_count(self, name: str, size: int = 500) -> int:
        """Return the number of batches that `unaugmented` yields for all images of a split."""
        return -(-len(self.splits[name]) // self._evaluation_size(size))

    def _evaluation_size(self, size: int) -> int:
        _, height, width = self._mean.shape
        return min(size, max(1, MAX_EVALUATION_PIXELS // (height * width)))

    def _crops(self, split: StoredSplit, indices: list[Tensor], draws: Tensor | None) -> Iterator[Tensor]:
        """Yield one batch of cropped images for each index tensor.

        `draws` contains the random numbers of the augmentation, one row per image of the split. None means centre
        crops.
        """
        if isinstance(split, FileSplit):
            yield from decoded_batches(split, indices, draws, self.augment, self.workers, self.device)
            return
        if isinstance(split, DrawnSplit):  # its own transform has augmented the images
            for index in indices:
                yield split.read(index, None if draws is None else draws[index]).to(self.device)
            return
        for index in indices:
            if draws is None and torch.equal(index, index[0] + torch.arange(len(index))):  # a slice instead of a copy
                yield center_crop(split.images[index[0] : index[-1] + 1], self.augment.size)
                continue
            # channels last, so that index_select copies whole rows of memory
            images = split.images.movedim(1, 3).index_select(0, index.to(split.images.device)).movedim(3, 1)
            if draws is None:
                yield center_crop(images, self.augment.size)
            else:
                yield crop_and_flip(images, draws[index], self.augment)

    def normalize(self, images_NCHW: Tensor) -> Tensor:
        """Return (x / data.white - mean) / std as float32 in channels_last, with the constants of the data set."""
        floats = images_NCHW.to(torch.float32, memory_format=torch.channels_last)
        if floats is images_NCHW:  # perhaps the stored images, which must not change
            return (floats - self._mean).mul_(self._scale)
        return floats.sub_(self._mean).mul_(self._scale)


def is_sorted(labels: Tensor) -> bool:
    """Return whether images of the same class follow each other much more often than in a random order.

    Args:
        labels: the labels of a split (N,), of any number of classes.
    """
    shares = labels.bincount().double() / max(len(labels), 1)
    changes = (labels[1:] != labels[:-1]).sum().item()
    return changes < (len(labels) - 1) * (1 - shares.square().sum().item()) / 2


def batch_size_and_steps(data: Dataset, batch_size: int) -> tuple[int, int]:
    """Return the size of a training batch and the number of full batches per epoch.

    The size is at most the number of training images.
    """
    size = min(batch_size, len(data.train))
    return size, len(data.train) // size


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a 63-bit generator seed for (seed, epoch).

    Neighbouring epochs and neighbouring seeds give unrelated results.
    """
    return int.from_bytes(hashlib.sha256(f"order {seed} {epoch}".encode()).digest()[:8]) >> 1
