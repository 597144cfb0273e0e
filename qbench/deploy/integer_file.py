"""Writes and reads files of integer networks.

A file is a container (`qbench.deploy.container`). Its array `data` contains the arrays of all steps, one after the
other. The header contains the steps, the type and the shape of each array, and the fields of `About`. Weights of at
most 8 bits are stored as codes without gaps.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qbench.deploy.about import About, about_fields, image_range, read_about
from qbench.deploy.codes import code_bits, pack, packed_size, unpack
from qbench.deploy.container import (
    check_image,
    check_logits,
    check_version,
    guarded,
    natural,
    read_container,
    write_container,
)
from qbench.deploy.integer_network import FUNCTIONS, IntegerNetwork, IntegerStep

VERSION = 1
PARTS = ("data",)
MAX_STEPS = 2**14
MAX_PACKED_BITS = 8
IMAGES_AT_ONCE = 50
"""Number of images that a network processes at once. This number limits the memory for a convolution's inputs."""

DTYPES = ("<i1", "<i2", "<i4", "<i8", "<f4", "<f8")
THRESHOLDS = "thresholds"
"""Storage of rows of int32: the first two numbers of each row are stored, and all second differences as int8.

If a quantizer has equal steps, its thresholds are equally spaced up to rounding, so their second differences are small.
"""


class IntegerFile(NamedTuple):
    """The content of an integer file: an integer network and its description."""

    network: IntegerNetwork
    about: About

    def function(self) -> Callable[[Tensor], Tensor]:
        """Return the function from normalized images (N, C, H, W) to logits (N, classes).

        The returned function raises `ValueError` if an image is outside the range of normalized 8-bit pixels, because
        integers could then overflow.
        """
        low, high = image_range(self.about)

        def run(images: Tensor) -> Tensor:
            if not ((low <= images.numpy()) & (images.numpy() <= high)).all():
                raise ValueError(
                    "the images are outside the range of 8-bit pixels after normalization with the file's mean and std"
                )
            starts = range(0, len(images), IMAGES_AT_ONCE)
            parts = [self.network.run(images[start : start + IMAGES_AT_ONCE].numpy()) for start in starts]
            return torch.from_numpy(np.concatenate(parts)).float()

        return run


def pack_integers(network: IntegerNetwork, about: About) -> bytes:
    """Return the bytes of an integer file."""
    parts: list[bytes] = []

    def place(name: str, array: np.ndarray) -> list[object]:
        """Append an array to the data, and return [type, shape] of the array."""
        kind, stored = _smallest(array, name)
        parts.append(stored.tobytes())
        return [kind, list(array.shape)]

    steps = [
        [step.function, list(step.inputs), dict(step.numbers), {k: place(k, a) for k, a in step.arrays.items()}]
        for step in network.steps
    ]
    header = {"version": VERSION, "about": about_fields(about), "steps": steps}
    return write_container({"data": np.frombuffer(b"".join(parts), np.uint8)}, header, "integer")


def _smallest(array: np.ndarray, name: str) -> tuple[object, np.ndarray]:
    """Return the smallest type that can store an array exactly, and the array in this type.

    The type is a name in `DTYPES`, or `THRESHOLDS`, or [bits, first, step] for weights that are stored as codes.
    """
    if array.dtype.kind == "f":
        narrow = array.astype("<f4")
        return ("<f4", narrow) if (narrow == array).all() else ("<f8", array.astype("<f8"))
    if name == "weight":
        levels = np.unique(array)
        first, step = int(levels[0]), int(np.gcd.reduce(np.diff(levels))) if len(levels) > 1 else 1
        bits = code_bits((int(levels[-1]) - first) // step + 1)
        if bits <= MAX_PACKED_BITS:
            return [bits, first, step], pack((array.reshape(-1) - first) // step, bits)
    kind = next(kind for kind in DTYPES if (array.astype(kind) == array).all())
    stored = array.astype(kind)
    if name == THRESHOLDS and array.shape[1] > 2:
        second = np.diff(array, 2)
        data = array[:, :2].astype("<i4").tobytes() + second.astype("<i1").tobytes()
        if (second.astype("<i1") == second).all() and len(data) < stored.nbytes:
            return THRESHOLDS, np.frombuffer(data, np.uint8)
    return kind, stored


def unpack_integers(data: bytes, source: str) -> IntegerFile:
    """Return the content of an integer file.

    The memory for reading is limited, so a damaged file cannot exhaust it.

    Raises:
        CheckpointError: the file is damaged or truncated, has another version of the format, or contains a network that
            cannot run.
    """

    def read() -> IntegerFile:
        content = _unpack(data, source)
        check_image(content.about.shape)
        logits = content.network.run(np.zeros((1, *content.about.shape), np.float32))
        check_logits(logits.shape, content.about.classes)
        return content

    return guarded(read, data, source)


def _unpack(data: bytes, source: str) -> IntegerFile:
    parts, header = read_container(data, PARTS, source)
    check_version(header, VERSION, source)
    about = read_about(header["about"], source)
    if len(header["steps"]) > MAX_STEPS:
        raise ValueError(f"{len(header['steps'])} steps; at most {MAX_STEPS}")
    rest = _Bytes(parts["data"].tobytes())
    steps = [_step(place, rest, *entry) for place, entry in enumerate(header["steps"])]
    if rest.left:
        raise ValueError(f"{rest.left} bytes too many")
    return IntegerFile(IntegerNetwork(steps), about)


class _Bytes:
    """Reads arrays from bytes, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    @property
    def left(self) -> int:
        """Number of bytes that have not been read."""
        return len(self._data) - self._place

    def array(self, kind: str | list[int], sizes: list[object]) -> np.ndarray:
        """Return the next array, as float64, int32 or int64."""
        shape = tuple(natural(size) for size in sizes)
        count = prod(shape)
        if kind == THRESHOLDS:
            rows, columns = shape
            start = np.frombuffer(self._take(8 * rows), "<i4").reshape(rows, 2).astype(np.int64)
            second = np.frombuffer(self._take(rows * (columns - 2)), "<i1").reshape(rows, columns - 2)
            steps = np.cumsum(np.concatenate([np.diff(start), second], 1), 1)
            return np.cumsum(np.concatenate([start[:, :1], steps], 1), 1).astype(np.int32)
        if isinstance(kind, str):
            if kind not in DTYPES:
                raise ValueError(f"{kind!r} is not a type")
            wide = np.float64 if kind.startswith("<f") else np.int64 if kind == "<i8" else np.int32
            return np.frombuffer(self._take(count * np.dtype(kind).itemsize), kind).reshape(shape).astype(wide)
        bits, first, step = (int(number) for number in kind)
        if not 1 <= bits <= MAX_PACKED_BITS:
            raise ValueError(f"codes of {bits} bits")
        codes = unpack(np.frombuffer(self._take(packed_size(count, bits)), np.uint8), count, bits)
        return (codes * step + first).reshape(shape).astype(np.int32)

    def _take(self, size: int) -> bytes:
        if size > self.left:
            raise ValueError(f"an array has {size} bytes, but only {self.left} bytes are left")
        start, self._place = self._place, self._place + size
        return self._data[start : self._place]


def _step(
    place: int, rest: _Bytes, function: str, inputs: list[int], numbers: Mapping[str, object], arrays: Mapping[str, Any]
) -> IntegerStep:
    if function not in FUNCTIONS:
        raise ValueError(f"step {place} calls an unknown function")
    if any(type(i) is not int or not -1 <= i < place for i in inputs):
        raise ValueError(f"step {place} reads the steps {inputs}")
    return IntegerStep(function, tuple(inputs), numbers, {name: rest.array(*entry) for name, entry in arrays.items()})
