"""Computes digests of weights and of whole training states. With digests, runs can be compared bit for bit."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a state_dict: name, dtype, shape and bytes of each tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_tensor_bytes(tensor))
    return digest.hexdigest()


def content_sha256(value: object) -> str:
    """Return the sha256 of the types, shapes and bits of nested tensors, numbers and strings."""
    digest = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, dict):
            digest.update(f"dict {len(part)}\n".encode())
            for key in sorted(part, key=repr):
                add(key)
                add(part[key])
        elif isinstance(part, list | tuple):
            digest.update(f"list {len(part)}\n".encode())
            for item in part:
                add(item)
        elif isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
            digest.update(_tensor_bytes(part))
        else:
            digest.update(f"{part!r}\n".encode())

    add(value)
    return digest.hexdigest()


def named_digests(value: object, name: str = "") -> dict[str, str]:
    """Return the sha256 of each value in nested containers, by dotted name such as `model.fc.bias`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {name: content_sha256(value)}
    found: dict[str, str] = {}
    for key, part in items:
        found |= named_digests(part, f"{name}.{key}" if name else str(key))
    return found


def _tensor_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
