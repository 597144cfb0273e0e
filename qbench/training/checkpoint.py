"""Checkpoints as bytes: packed with a digest that is verified before anything is parsed; random states; weights' names.

`torch.load` ignores what follows the archive, so a footer with the sha256 leaves the file an ordinary checkpoint that
loads with `weights_only=True`; without the footer single flipped bits would load in silence.
"""

import hashlib
import io
import resource
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import CheckpointError
from qbench.quant.layers import is_quantizer_key

_MARK = b"\nqbench sha256 "
_FOOTER = len(_MARK) + 64
ROOM = 2**29
"""Bytes that reading a checkpoint may take besides some times its own size."""
CONTENTS = 2**24
"""Bytes of names and shapes that a checkpoint may have: some hundred thousand tensors."""


def pack(state: dict[str, Any]) -> bytes:
    """Return a checkpoint of tensors, numbers, strings and containers of them, with its digest at the end."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()
    return body + _MARK + hashlib.sha256(body).hexdigest().encode()


def unpack(data: bytes, source: str) -> dict[str, Any]:
    """Return the state of a checkpoint made by `pack`.

    Raises:
        CheckpointError: the digest is missing or wrong, or the content is no plain state.
    """
    body, footer = data[:-_FOOTER], data[-_FOOTER:]
    if footer[: len(_MARK)] != _MARK or hashlib.sha256(body).hexdigest().encode() != footer[len(_MARK) :]:
        raise CheckpointError(f"{source} is damaged: its sha256 does not match its content")
    return load_plain(body, source)


def is_sealed(data: bytes) -> bool:
    """Whether a file claims to be made by `pack`."""
    return data[-_FOOTER:][: len(_MARK)] == _MARK


def load_plain(data: bytes, source: str) -> dict[str, Any]:
    """Return the dictionary of any `torch.save` file that holds plain values; code in it never runs.

    Raises:
        CheckpointError: it is none, or the checksums inside it do not match. The format before torch 1.6 has none.
    """
    if is_zip(data):
        _check_zip(data, source)
    try:
        with bounded_memory(ROOM + 8 * len(data)), warnings.catch_warnings(action="ignore"):  # of unusual pickles
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no checkpoint makes the reader stumble over
        why = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{source} is no readable checkpoint: {_shown(why, 200)}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{source} holds a {type(state).__name__}, not a state_dict")
    return state


def is_zip(data: bytes) -> bool:
    """Whether a checkpoint is in the format since torch 1.6, in which every tensor has a checksum."""
    return data[:4] == b"PK\x03\x04"


def _check_zip(data: bytes, source: str) -> None:
    """Refuse an archive that torch.load would read though it is damaged, or that is larger inside than outside."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            end = data.rfind(b"PK\x05\x06") + 22 + len(archive.comment)
            if end != len(data) and not is_sealed(data):
                raise CheckpointError(f"{source} is damaged: something follows the end of its archive")
            if any(r.compress_type for r in records) or sum(r.file_size for r in records) > len(data):
                raise CheckpointError(f"{source} is no checkpoint: torch.save compresses nothing")
            if any(r.file_size > CONTENTS for r in records if r.filename.endswith("data.pkl")):
                raise CheckpointError(f"{source} names too many tensors; at most {CONTENTS:,} bytes of names")
            if bad := archive.testzip():
                raise CheckpointError(f"{source} is damaged: the checksum of its {_shown(bad)} does not match")
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many kinds on what is torn
        raise CheckpointError(f"{source} is damaged: {_shown(str(error), 200) or type(error).__name__}") from None


@contextmanager
def bounded_memory(size: int) -> Iterator[None]:
    """Let this process have no more than `size` bytes on top of what it has, for a while; Linux only.

    A few bytes of a hostile file can ask for any amount.
    """
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    used = int(status.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, used + size) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state_dict with tensors of its own, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Return the sha256 over sorted name, dtype, shape and contiguous bytes of a state_dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def content_sha256(value: Any) -> str:
    """Return the sha256 of tensors, numbers, strings and containers of them: types, shapes and bits, no timing."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
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
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{part!r}\n".encode())

    add(value)
    return digest.hexdigest()


def not_finite(value: Any, name: str = "") -> str | None:
    """Return the dotted name of the first tensor in nested containers that holds inf or nan; None if all are finite."""
    if isinstance(value, Tensor):
        return name if value.is_floating_point() and not torch.isfinite(value).all() else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (not_finite(item, f"{name}.{key}" if name else str(key)) for key, item in items)
    return next((bad for bad in found if bad), None)


def load_float(model: nn.Module, state: dict[str, Any], source: str) -> tuple[list[str], list[str]]:
    """Load a float network's weights; return the names skipped (quantizers of the source) and left new.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; the message names them.
    """
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    own = model.state_dict()
    skipped = [name for name in tensors if name not in own and is_quantizer_key(name)]
    odd = [name for name in own if name in tensors and not _fits(tensors[name], own[name])]
    kinds = [f"{name} ({tensors[name].dtype}, {tensors[name].layout})" for name in odd]
    wrong = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if not odd and name in tensors and tensors[name].shape != own[name].shape
    ]
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unknown = [name for name in tensors if name not in own and name not in skipped]
    for what, found in (("other type", kinds), ("other shape", wrong), ("missing", missing), ("unknown", unknown)):
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise CheckpointError(f"{source} is of another network: {what}: {', '.join(map(_shown, found[:4]))}{more}")
    if bad := not_finite({name: tensors[name] for name in own if name in tensors}):
        raise CheckpointError(f"{source}: {bad} holds inf or nan")
    model.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)
    return [*map(_shown, skipped)], [name for name in own if name not in tensors]


def _fits(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor that was read is a plain one, of the same kind of numbers."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.is_nested:
        return False
    alike = tensor.is_floating_point() == own.is_floating_point()
    return alike and torch.can_cast(tensor.dtype, own.dtype)


def _shown(text: str, most: int = 99) -> str:
    """Return a stranger's words as they can be printed."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])
