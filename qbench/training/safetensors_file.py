"""Reads .safetensors files, which consist of the length of a JSON header, the header, and the bytes of the tensors.

The repository huggingface/safetensors describes the format. Such a file cannot contain code, and it
has no checksums.
"""

import json
from math import prod
from typing import Any

import torch
from torch import Tensor

from qbench.errors import CheckpointError

MAX_HEADER_BYTES = 2**24
"""Maximum number of bytes of a header, enough for several hundred thousand tensors."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def is_safetensors(data: bytes) -> bool:
    """Return whether a file begins as a .safetensors file does."""
    return data[8:9] == b"{" and 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8


def load_safetensors(data: bytes, source: str) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file.

    Raises:
        CheckpointError: the file is damaged or truncated, or it has tensors of an unsupported type.
    """
    size = int.from_bytes(data[:8], "little")
    try:
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes; at most {MAX_HEADER_BYTES:,}")
        header = json.loads(data[8 : 8 + size])
        body = memoryview(data)[8 + size :]
        tensors = {name: _tensor(entry, body) for name, entry in header.items() if name != "__metadata__"}
        if sum(tensor.nbytes for tensor in tensors.values()) != len(body):
            raise ValueError("the total size of the tensors does not match the size of the file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = "".join(letter for letter in f"{type(error).__name__}: {error}"[:200] if letter.isprintable())
        raise CheckpointError(f"{source} is damaged or truncated: {reason}") from None
    return tensors


def _tensor(entry: dict[str, Any], body: memoryview) -> Tensor:
    """Return the tensor that an entry of the header describes. The tensor shares no memory with `body`."""
    dtype, shape, (start, stop) = DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]], entry["data_offsets"]
    if min([0, *shape]) < 0 or not 0 <= start <= stop <= len(body) or stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(
            f"a tensor of shape {shape} and type {entry['dtype']} cannot be in bytes {start} to {stop} of {len(body)}"
        )
    if start == stop:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(body[start:stop]), dtype=dtype).reshape(shape)
