"""The one writer of durable files: a file is there whole or not at all. And readers that say what is damaged."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from qbench.errors import ResourceError

T = TypeVar("T")


def write(path: Path, data: bytes) -> None:
    """Replace a file by `data`, durably: temporary file beside it, flush, fsync, rename, fsync of the directory.

    Raises:
        ResourceError: the disk or its permissions do not allow it; what stood there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def put() -> None:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)

    guarded(put, path, len(data))


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON; see `write`."""
    write(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None where the file is missing, torn or something else."""
    try:
        return parse_json(path.read_bytes())
    except OSError:
        return None


def parse_json(data: bytes) -> dict[str, Any] | None:
    """Return a JSON object, or None where the bytes are torn or something else."""
    try:
        values = json.loads(data)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def make_directory(path: Path) -> None:
    """Make a directory and those above it.

    Raises:
        ResourceError: the disk or its permissions do not allow it.
    """
    guarded(lambda: path.mkdir(parents=True, exist_ok=True), path)


def guarded(action: Callable[[], T], path: Path, need: int = 0) -> T:
    """Run something that writes; turn the system's refusal into a message with path and need.

    Raises:
        ResourceError: instead of OSError.
    """
    try:
        return action()
    except OSError as error:
        raise refusal(error, path, need) from error


def refusal(error: OSError, path: Path, need: int = 0) -> ResourceError:
    """Return the error that tells a person why the system refused to write."""
    needed = f" ({need:,} bytes needed)" if need else ""
    why = error.strerror or error
    return ResourceError(f"cannot write {path}{needed}: {why}\nmake room or choose another place with out=DIR")


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cut(path: Path, size: int) -> int:
    """Cut an append-only file of lines back to the whole lines among its first `size` bytes; return their bytes.

    Raises:
        ResourceError: the disk or its permissions do not allow it.
    """

    def truncate() -> int:
        with open(path, "r+b") as file:
            kept = file.read(size).rfind(b"\n") + 1
            file.truncate(kept)
        return kept

    return guarded(truncate, path) if path.exists() else 0
