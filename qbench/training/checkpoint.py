"""Packs checkpoints into bytes, and adds a digest that is verified before a checkpoint is parsed.

Without the digest, a file with flipped bits could load without an error. The digest is at the end of the file, because
`torch.load` ignores bytes after the archive. The file therefore remains an ordinary checkpoint that loads with
`weights_only=True`.
"""

import hashlib
import io
import resource
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbench.errors import CheckpointError
from qbench.quant.layers import is_quantizer_key
from qbench.system import files
from qbench.training.foreign_weights import printable

_MARK = b"\nqbench sha256 "
_FOOTER_BYTES = len(_MARK) + 64

EXTRA_BYTES = 2**29
"""Maximum number of bytes that reading a checkpoint may allocate, in addition to 8 times the file's size."""

MAX_NAME_BYTES = 2**24
"""Maximum number of bytes of the names and shapes in a checkpoint, enough for several hundred thousand tensors."""


Saved = dict[str, Any]
"""The content of a checkpoint.

The keys are `identity` (digest of the run's identity), `data` (digest of the images), `state` (of training), `session`
(counters), and `layers` (of the network).
"""


def pack(state: Mapping[str, object]) -> bytes:
    """Return the bytes of a checkpoint of nested tensors, numbers and strings, followed by the digest."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()
    return body + _MARK + hashlib.sha256(body).hexdigest().encode()


def unpack(data: bytes, source: str) -> Saved:
    """Return the content of a checkpoint made by `pack`.

    Args:
        source: the file's name, for messages.

    Raises:
        CheckpointError: the digest is missing or wrong, or the content is not a dictionary.
    """
    body, footer = data[:-_FOOTER_BYTES], data[-_FOOTER_BYTES:]
    if footer[: len(_MARK)] != _MARK or hashlib.sha256(body).hexdigest().encode() != footer[len(_MARK) :]:
        raise CheckpointError(f"{source} is damaged: its sha256 does not match its content")
    return load_torch_file(body, source)


def load_newest(paths: Iterable[Path], identity: str, report: Callable[[str], None]) -> Saved | None:
    """Return the newest intact checkpoint of a run. The run can continue from this checkpoint.

    The function removes damaged checkpoints that are newer.

    Args:
        paths: `state-<step>.pt` files, newest first.
        identity: digest of the run's identity. The checkpoint must contain it.
        report: called with one line of text for each removed checkpoint, and for the checkpoint that is returned.
    """
    for path in paths:
        try:
            saved = unpack(path.read_bytes(), str(path))
            if saved.get("identity") != identity:
                raise CheckpointError(f"{path} belongs to another run")
            if path.name != f"state-{_saved_step(saved, path)}.pt":
                raise CheckpointError(f"{path} contains the state of step {_saved_step(saved, path)}")
        except CheckpointError as error:
            report(f"warning: {error}; the file is removed, and the previous checkpoint is tried")
            files.convert_os_errors(path.unlink, path)
            continue
        report(f"continuing from {path.name}")
        return saved
    return None


def _saved_step(saved: Saved, path: Path) -> int:
    """Return the number of the training step at which a checkpoint was saved."""
    try:
        if not isinstance(saved["session"], dict):
            raise TypeError
        return int(saved["state"]["counters"][2])
    except (KeyError, TypeError, IndexError, ValueError):
        raise CheckpointError(f"{path} does not contain a training state") from None


def has_digest(data: bytes) -> bool:
    """Return whether a file ends with a digest, as the files made by `pack` do."""
    return data[-_FOOTER_BYTES:][: len(_MARK)] == _MARK


def load_torch_file(data: bytes, source: str) -> dict[str, Any]:
    """Return the dictionary in any file of `torch.save`. Code in the file is never run.

    Raises:
        CheckpointError: the file is not a checkpoint, or its checksums do not match. The format before torch 1.6 has no
            checksums.
    """
    if is_zip(data):
        _check_zip(data, source)
    try:
        with bounded_memory(EXTRA_BYTES + 8 * len(data)), warnings.catch_warnings(action="ignore"):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # reading a file that is not a checkpoint can raise any exception
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        reason = printable(reason or type(error).__name__, 200)
        if reason.isdigit():  # if the first byte cannot begin a pickle, the reason is only the number of this byte
            reason = "it has another format"
        raise CheckpointError(
            f"{source} is not a readable checkpoint: {reason}\n"
            "allowed: tensors by name (a state_dict), written by torch.save or as .safetensors"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{source} contains a {type(state).__name__}, not a state_dict")
    return state


def is_zip(data: bytes) -> bool:
    """Return whether a checkpoint has the zip format of torch 1.6 and later, with a checksum per tensor."""
    return data[:4] == b"PK\x03\x04"


def _check_zip(data: bytes, source: str) -> None:
    """Raise `CheckpointError` if an archive is damaged or compressed, or if its names take too many bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            end = data.rfind(b"PK\x05\x06") + 22 + len(archive.comment)
            if end != len(data) and not has_digest(data):
                raise CheckpointError(f"{source} is damaged: there are bytes after the end of its archive")
            if any(r.compress_type for r in records) or sum(r.file_size for r in records) > len(data):
                raise CheckpointError(f"{source} is not a checkpoint: its content is compressed")
            if any(r.file_size > MAX_NAME_BYTES for r in records if r.filename.endswith("data.pkl")):
                raise CheckpointError(
                    f"{source} contains too many tensors; their names may take at most {MAX_NAME_BYTES:,} bytes"
                )
            if bad := archive.testzip():
                raise CheckpointError(f"{source} is damaged: the checksum of its {printable(bad)} does not match")
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many kinds of errors for corrupt files
        reason = printable(str(error), 200) or type(error).__name__
        raise CheckpointError(f"{source} is damaged: {reason}") from None


@contextmanager
def bounded_memory(size: int) -> Iterator[None]:
    """Limit this process to `size` more bytes of memory inside the context (Linux only).

    Without a limit, a malicious file of a few bytes could make the reader allocate any amount of memory.
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


def cpu_copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of a state_dict on the CPU. The copy shares no memory with the original."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def first_nonfinite(value: object, name: str = "") -> str | None:
    """Return the dotted name of the first tensor in nested containers that contains inf or nan.

    Return None if all tensors are finite.
    """
    if isinstance(value, Tensor):
        return name if value.is_floating_point() and not torch.isfinite(value).all() else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    names = (first_nonfinite(item, f"{name}.{key}" if name else str(key)) for key, item in items)
    return next((bad for bad in names if bad), None)


class DoesNotFit(CheckpointError):
    """The tensors of a checkpoint do not fit the network."""


class LoadedWeights(NamedTuple):
    """Names of the tensors that a file and a network do not share.

    `skipped` names tensors of quantizers in the file. `new` names tensors that the network has and the file lacks.
    """

    skipped: list[str]
    new: list[str]


def load_float_weights(model: nn.Module, state: Mapping[str, object], source: str) -> LoadedWeights:
    """Load a float network's weights.

    Tensors of quantizers in the file are skipped. The file must contain all tensors of the float network. Only the
    counters of batch normalization may be missing.

    Raises:
        DoesNotFit: tensors are missing or unknown, or have a wrong type or shape. The message names these tensors.
        CheckpointError: a tensor contains inf or nan, or a variance is negative.
    """
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    current = model.state_dict()
    skipped = [name for name in tensors if name not in current and is_quantizer_key(name, model)]
    check_fit({name: t for name, t in tensors.items() if name not in skipped}, current, source)
    loaded = {name: tensors[name] for name in current if name in tensors}
    if bad := first_nonfinite(loaded):
        raise CheckpointError(f"{source}: {bad} contains inf or nan")
    if bad := _negative_variance(model, loaded):
        raise CheckpointError(f"{source}: {bad} contains negative variances, which give nan in evaluation")
    model.load_state_dict(loaded, strict=False)
    return LoadedWeights([*map(printable, skipped)], [name for name in current if name not in tensors])


def _negative_variance(model: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first running variance that gives nan in evaluation, or None.

    Batch normalization computes 1 / sqrt(variance + eps). Values between -eps and 0 are allowed, because they can come
    from rounding.
    """
    eps = {f"{name}.running_var".lstrip("."): getattr(m, "eps", 0.0) for name, m in model.named_modules()}
    return next((name for name, t in tensors.items() if name in eps and (t <= -eps[name]).any() and t.min() < 0), None)


def check_fit(tensors: Mapping[str, Tensor], current: Mapping[str, Tensor], source: str) -> None:
    """Raise `DoesNotFit` if tensors of a file do not fit the tensors of a network."""
    common = [name for name in current if name in tensors]
    other_type = [name for name in common if not _same_type(tensors[name], current[name])]
    other_shape = [name for name in common if not other_type and tensors[name].shape != current[name].shape]
    problems = {
        "other type": [f"{name} ({tensors[name].dtype}, {tensors[name].layout})" for name in other_type],
        "other shape": [
            f"{name} {tuple(tensors[name].shape)} for {tuple(current[name].shape)}" for name in other_shape
        ],
        "missing": [name for name in current if name not in tensors and not name.endswith("num_batches_tracked")],
        "unknown": [name for name in tensors if name not in current],
    }  # fmt: skip
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            shown = ", ".join(map(printable, names[:4]))
            raise DoesNotFit(f"{source} does not fit the network: {problem}: {shown}{more}")


def _same_type(tensor: Tensor, current: Tensor) -> bool:
    """Return whether the file's tensor is an ordinary tensor, with the same kind of numbers as the network's tensor."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return False
    same_kind = tensor.is_floating_point() == current.is_floating_point()
    if tensor.is_floating_point() and tensor.element_size() == 1:  # 8-bit floats need scales that the file may not have
        return False
    return same_kind and torch.can_cast(tensor.dtype, current.dtype)
