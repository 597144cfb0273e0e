"""Makes a data set from what a user's function returns: tensors, NumPy arrays, or torch data sets.

The function returns (train, test) or (train, val, test). Each part is (images, labels), or a map-style torch data set
whose items are (image, label). If val is missing, a fraction of the training images becomes the validation split.

uint8 images are normalized with the mean and the standard deviation of the training images. Float images are used as
they are, because a transform usually has normalized them.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Split, evenly_spaced, split_validation
from qbench.data.drawn_split import DrawnSplit, MapDataset, own_random_state, read_item, seed_cpu, seem_channels_last
from qbench.data.normalize import MeanAndStd, mean_and_std
from qbench.errors import DataError

MAX_MEMORY = 2**32
"""Maximum size in bytes of a torch data set that is kept in memory. A larger data set is read again in every epoch."""

STATISTICS_IMAGES = 1000
"""If images are read again in every epoch, the mean and standard deviation come from this number of images."""

COMPARED = 256
"""Maximum number of images that are read twice with the same seed, to check that both readings are equal.

One image is not enough, because some transforms change only a few images.
"""

FORMS = "expected: a Dataset, or (train, test) or (train, val, test), each of them (images, labels) or a torch data set"


def has_validation(returned: object) -> bool:
    """Return whether the value that a user's function returned contains a validation split."""
    return isinstance(returned, Dataset) or (isinstance(returned, tuple | list) and len(returned) == 3)


def as_dataset(name: str, returned: object, val: float) -> Dataset:
    """Return a data set from the value that a function returned.

    Args:
        name: the value of `dataset`. If it contains a colon, it names a user's function.
        val: if the value contains no validation split, this fraction of the training images becomes that split.

    Raises:
        DataError: the value has none of the expected forms. The message lists these forms.
        ValueError: `val` is out of range.
    """
    if isinstance(returned, Dataset):
        if ":" not in name:  # a data set of qbench, whose configuration determines these values
            return returned
        # No configuration key determines these values of a user's data set, so the digest must contain them.
        augment = {key: value for key, value in asdict(returned.augment).items() if value != getattr(Augment, key)}
        facts = f"classes {returned.classes}, mean {returned.mean}, std {returned.std}, augment {augment}"
        return replace(returned, files=dict(returned.files) | {"processing": facts})
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3) or any(map(_is_array, returned)):
        raise DataError(f"the function returned {_in_words(returned)}\n{FORMS}")
    names = ("train", "test") if len(returned) == 2 else ("train", "val", "test")
    parts = {part: _split(part, value) for part, value in zip(names, returned, strict=True)}
    train, test = parts["train"], parts["test"]
    classes = int(train.labels.max()) + 1 if len(train) else 0
    _check_first_label(parts)
    _check_class_names(dict(zip(names, returned, strict=True)))
    if "val" in parts:
        validation = parts["val"]
    else:
        train, validation = split_validation(train, val)
    mean, std = _normalization(train)
    class_names = _class_names(returned[0], classes)
    return Dataset(
        name=name, train=train, val=validation, test=test, classes=classes, mean=mean, std=std, class_names=class_names
    )


def _class_names(train: object, classes: int) -> tuple[str, ...]:
    """Return the attribute `classes` of a torch data set, or () if it does not contain one name per class."""
    names = _names(train)
    return names if len(names) == classes else ()


def _check_class_names(sources: Mapping[str, object]) -> None:
    """Raise `DataError` if a label has one name in a torch data set and another name in another one.

    Data sets that read a folder for each class number the folders in alphabetical order. If a folder is missing in one
    part, the classes after it have other numbers there.
    """
    named = {part: names for part, source in sources.items() if (names := _names(source))}
    first, *others = named or [""]
    for part in others:
        for label, (one, other) in enumerate(zip(named[first], named[part], strict=False)):
            if one != other:
                raise DataError(
                    f"label {label} is {one!r} in {first} and {other!r} in {part}: `classes` must begin alike\n"
                    f"give {part} the labels of {first}, for example with target_transform"
                )


def _names(source: object) -> tuple[str, ...]:
    """Return the attribute `classes` of a torch data set, or of the data set of a `Subset`.

    The result is () if there is no such list of names.
    """
    names: object = getattr(source, "classes", None) or getattr(getattr(source, "dataset", None), "classes", ())
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()


def _check_first_label(parts: Mapping[str, Split | DrawnSplit]) -> None:
    """Raise `DataError` if no label is 0. The network would otherwise have outputs for classes that do not exist."""
    low = min((int(split.labels.min()) for split in parts.values() if len(split)), default=0)
    if low > 0:
        high = max(int(split.labels.max()) for split in parts.values() if len(split))
        raise DataError(f"labels are {low} to {high}: must start at 0\nto convert: labels - {low}")


def _split(part: str, value: object) -> Split | DrawnSplit:
    try:
        if isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_array, value)):
            return Split(_tensor(value[0], "images"), _tensor(value[1], "labels"))
        if not isinstance(value, str | tuple | list | Mapping | Tensor | np.ndarray) and isinstance(value, MapDataset):
            return _read(value)
    except DataError as error:
        raise DataError(f"{part}: {error}") from None
    hint = "; instead of a DataLoader, return its dataset" if isinstance(value, torch.utils.data.DataLoader) else ""
    raise DataError(f"{part} is {_in_words(value)}{hint}\n{FORMS}")


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray)


CONVERSIONS = {
    "images": "numpy.stack(images).astype('float32')",
    "labels": "numpy.unique(labels, return_inverse=True)[1], with the labels of all parts together",
}
"""Content of an array -> expression that converts this content to numbers."""


def _tensor(value: Tensor | np.ndarray, what: str) -> Tensor:
    """Return an array as a tensor. Float images become float32 and integer labels become int64."""
    if isinstance(value, np.ma.MaskedArray):
        raise DataError(f"{what} are a masked array; pass value.filled(NUMBER) or leave the masked values out")
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        raise DataError(f"{what} have the type {value.dtype}: must be numbers\nto convert: {CONVERSIONS[what]}")
    if isinstance(value, np.ndarray):  # torch reads only the byte order of this machine
        value = torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
    if value.layout != torch.strided:
        raise DataError(f"{what} are a tensor of the layout {value.layout}\nto convert: {what}.to_dense()")
    tensor = value.detach()
    if what == "images":
        _check_layout(tensor)
        return tensor.float() if tensor.is_floating_point() else tensor
    whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
    return tensor.long() if whole else tensor


def _check_layout(images: Tensor) -> None:
    """Raise `DataError` if images have no channel dimension, or if the channels seem to be the last dimension."""
    shape = tuple(images.shape)
    if images.dim() == 3:
        raise DataError(f"images are {shape}: must be (N, C, H, W)\nfor grey images: images[:, None]")
    if images.dim() == 4 and seem_channels_last(shape[1:]):
        fix = "images.permute(0, 3, 1, 2), in NumPy images.transpose(0, 3, 1, 2)"
        raise DataError(
            f"images are {shape}: must be (N, C, H, W)\n"
            f"to move the channels: {fix}; if the shape is right, return a Dataset"
        )


def _read(source: MapDataset) -> Split | DrawnSplit:
    """Return a torch data set as a split. Images that never change and fit into memory are kept in memory.

    Images change if a transform takes random numbers from the generators of torch, NumPy or Python.
    """
    if not len(source):
        raise DataError("contains no images")
    with own_random_state():
        _check_repeatable(source)
        first, _ = read_item(source, 0, 0)
        in_memory = first.numel() * first.element_size() * len(source) <= MAX_MEMORY
        seed_cpu(0)
        before = _generators()
        images = first.new_empty((len(source) if in_memory else 0, *first.shape))
        labels = []
        for place, (image, label) in enumerate(_items(source, first, seeded=False)):
            labels.append(label)
            if in_memory:
                images[place] = image
        if in_memory and _generators() == before:
            return Split(images, torch.tensor(labels))
        return _drawn(source, first, labels)


def _drawn(source: MapDataset, first: Tensor, labels: list[int]) -> DrawnSplit:
    """Return a torch data set as a split whose images are read again in every epoch."""
    digests = []
    low, high = first.flatten(1).amin(1), first.flatten(1).amax(1)
    for image, _ in _items(source, first, seeded=True):
        digests.append(hashlib.sha256(image.contiguous().numpy().data).digest())
        low, high = low.minimum(image.flatten(1).amin(1)), high.maximum(image.flatten(1).amax(1))
    ends = tuple(low.tolist()), tuple(high.tolist())
    return DrawnSplit(source, torch.arange(len(labels)), torch.tensor(labels), first[None], tuple(digests), ends)


def _items(source: MapDataset, first: Tensor, *, seeded: bool) -> Iterator[tuple[Tensor, int]]:
    """Yield each (image, label) of a torch data set. All images must have the shape and type of `first`."""
    for place in range(len(source)):
        image, label = read_item(source, place, place if seeded else None)
        if image.shape != first.shape or image.dtype != first.dtype:
            raise DataError(
                f"image {place} is {image.dtype} {tuple(image.shape)}, but image 0 is {first.dtype} "
                f"{tuple(first.shape)}: must be equal\nadd to the transform: Resize and CenterCrop of one size"
            )
        yield image, label


def _check_repeatable(source: MapDataset) -> None:
    """Raise `DataError` if a transform uses its own random generator. Such a run could not be repeated or continued."""
    count = min(len(source), COMPARED)
    for place in (i * len(source) // count for i in range(count)):  # evenly spaced
        images = [read_item(source, place, place)[0] for _ in range(2)]
        if images[0].shape != images[1].shape or not bool(((images[0] == images[1]) | (images[0] != images[0])).all()):
            raise DataError(
                f"image {place} changes whenever it is read, even if torch, NumPy and Python have the same seed\n"
                "draw random numbers from torch's generator, so that a run can be repeated"
            )


def _generators() -> tuple[object, ...]:
    """Return the states of the CPU's random number generators in a form that can be compared."""
    _, keys, position, *_ = np.random.get_state()
    return (
        torch.default_generator.get_state().numpy().tobytes(),
        np.asarray(keys).tobytes(),
        position,
        random.getstate(),
    )


def _normalization(train: Split | DrawnSplit) -> MeanAndStd:
    """Return the mean and standard deviation for normalization. For float images, they are 0 and 1 in every channel."""
    channels = train.shape[0]
    if train.dtype != torch.uint8:
        return (0.0,) * channels, (1.0,) * channels
    if isinstance(train, Split):
        return mean_and_std(train.images)
    chosen = evenly_spaced(min(STATISTICS_IMAGES, len(train)), len(train))
    return mean_and_std(train.read(chosen, None))


def _in_words(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(one).__name__ for one in value)}"[:100]
    return f"a {type(value).__name__}"
