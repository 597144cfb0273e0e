"""Writes and reads the container format of packed files and integer files.

A container is a safetensors file of one-dimensional tensors. Every container has these two tensors:

    header   uint8: JSON, compressed by zlib
    sha256   uint8 (32,): the digest of all other tensors

A reader never executes content of the file as code.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, TypeVar

import numpy as np

from qbench.errors import CheckpointError
from qbench.training.checkpoint import EXTRA_BYTES, bounded_memory
from qbench.training.safetensors_file import is_safetensors, load_safetensors

SUFFIX = ".qbench"
MAX_HEADER_BYTES = 2**24
MAX_IMAGE_VALUES = 2**22
MEMORY_PER_BYTE = 1024
"""Number of bytes of memory that a reader may use per byte of the file, in addition to `EXTRA_BYTES`."""

Content = TypeVar("Content")


def write_container(parts: Mapping[str, np.ndarray], header: Mapping[str, object], kind: str) -> bytes:
    """Return the bytes of a container.

    Args:
        parts: one-dimensional float32 and uint8 arrays by name.
        kind: the kind of the file, which is stored in the safetensors metadata.
    """
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    tensors = {**parts, "header": np.frombuffer(zlib.compress(text, 9), np.uint8)}
    return safetensors(tensors | {"sha256": np.frombuffer(_digest(tensors), np.uint8)}, kind)


def safetensors(tensors: Mapping[str, np.ndarray], kind: str) -> bytes:
    """Return the bytes of a safetensors file with one-dimensional float32 and uint8 tensors."""
    entries: dict[str, object] = {"__metadata__": {"format": f"qbench {kind}"}}
    start = 0
    for name, tensor in tensors.items():
        dtype = "F32" if tensor.dtype == np.float32 else "U8"
        entries[name] = {"dtype": dtype, "shape": [len(tensor)], "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + b"".join(tensor.tobytes() for tensor in tensors.values())


def kind_of(data: bytes) -> str:
    """Return the `kind` that `write_container` stored in a file, or an empty text for other files."""
    size = int.from_bytes(data[:8], "little")
    if not is_safetensors(data) or size > MAX_HEADER_BYTES:
        return ""
    try:
        return str(json.loads(data[8 : 8 + size])["__metadata__"]["format"]).removeprefix("qbench ")
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def read_container(data: bytes, names: tuple[str, ...], source: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays of a container and its header.

    Args:
        names: the names of the arrays that the container must have.

    Raises:
        CheckpointError: the file is not a container with these arrays, or the file is damaged.
        ValueError: the header is too large or not JSON.
    """
    tensors = {name: tensor.numpy() for name, tensor in load_safetensors(data, source).items()}
    digest = tensors.pop("sha256", None)
    if set(tensors) != {*names, "header"} or digest is None:
        raise CheckpointError(f"{source} is not a file of qbench export")
    if digest.tobytes() != _digest(tensors):
        raise CheckpointError(f"{source} is damaged: its sha256 does not match its content")
    decompressor = zlib.decompressobj()
    text = decompressor.decompress(tensors.pop("header").tobytes(), MAX_HEADER_BYTES)
    if not decompressor.eof:
        raise ValueError(f"a header of more than {MAX_HEADER_BYTES:,} bytes")
    header: dict[str, Any] = json.loads(text)
    return tensors, header


def _digest(tensors: Mapping[str, np.ndarray]) -> bytes:
    return hashlib.sha256(b"".join(tensor.tobytes() for tensor in tensors.values())).digest()


def guarded(read: Callable[[], Content], data: bytes, source: str) -> Content:
    """Call `read` with the bytes of a container, and return its result.

    The memory for the call is limited, so a damaged file cannot exhaust it.

    Raises:
        CheckpointError: `read` raised an exception, or the bytes are not a container.
    """
    if not is_safetensors(data):
        raise CheckpointError(f"{source} is damaged, truncated, or not a file of qbench export")
    try:
        with bounded_memory(EXTRA_BYTES + MEMORY_PER_BYTE * len(data)):
            return read()
    except CheckpointError:
        raise
    except Exception as error:  # a malicious file can raise any exception
        reason = "".join(c for c in f"{type(error).__name__}: {error}".splitlines()[0][:200] if c.isprintable())
        raise CheckpointError(f"{source} is damaged: {reason}") from None


def check_version(header: Mapping[str, object], version: int, source: str) -> None:
    """Raise `CheckpointError` if the version in a header is not the version that this code reads."""
    if header["version"] != version:
        raise CheckpointError(
            f"{source} has version {header['version']!r} of the format; this qbench reads version {version}\n"
            "export the run again"
        )


def natural(value: object) -> int:
    """Return a size from a header, after checking its type and range.

    Raises:
        ValueError: the size is not an integer from 0 to 2^40.
    """
    if type(value) is not int or value < 0 or value >= 2**40:
        raise ValueError(f"{value!r} is not a size")
    return value


def check_image(shape: tuple[int, ...]) -> None:
    """Raise `ValueError` if an image of this shape is too large. Readers run the network once on such an image."""
    if prod(shape) > MAX_IMAGE_VALUES:
        raise ValueError(f"images of {shape}")


def check_logits(shape: tuple[int, ...], classes: int) -> None:
    """Raise `ValueError` if a shape is not (1, classes), which is the shape of the logits of one image."""
    if shape != (1, classes):
        raise ValueError(f"the network returns the shape {shape}; expected: (1, {classes})")
