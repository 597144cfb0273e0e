"""Writes durable files, each whole or not at all; reads JSON and YAML."""

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml

from qbench.errors import ConfigError, ResourceError

T = TypeVar("T")
Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A value that JSON can write."""
YAML_BYTES, YAML_VALUES = 2**16, 2**14
"""Bounds of a YAML file; those of qbench have less than a tenth of it."""


def write(path: Path, data: bytes) -> None:
    """Replace a file by `data`: temporary file, flush, fsync, rename, fsync of the directory.

    Raises:
        ResourceError: the disk or its permissions do not allow it; the old file is unchanged.
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

    convert_os_errors(put, path, len(data))


def write_json(path: Path, values: Mapping[str, Json]) -> None:
    """Write plain values as indented JSON; see `write`."""
    write(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def read(path: Path) -> bytes:
    """Return a file's bytes. Pipes and devices are refused, since they might never end.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file; tags that make objects are refused.

    The file's size is bounded, and so is the number of its values, with those that aliases repeat.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ConfigError: it is no YAML, or too large.
    """
    data = read(path)
    try:
        loader = yaml.SafeLoader(data[: YAML_BYTES + 1])
        node = loader.get_single_node() if len(data) <= YAML_BYTES else None
        if len(data) > YAML_BYTES or _values(node, {}) > YAML_VALUES:
            most = f"{YAML_BYTES:,} bytes and, with what aliases repeat, {YAML_VALUES:,} values"
            raise ConfigError(f"{path}: too large: must be {most}")
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path}: {where}{error.problem or error.context}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # the last three come from odd scalars
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None


def _values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Return the number of values in a node, aliases written out; inf for a node within itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None if the file is missing, corrupt or holds something else."""
    try:
        return parse_json(read(path))
    except OSError:
        return None


def parse_json(data: bytes) -> dict[str, Any] | None:
    """Return a JSON object, or None if the bytes are corrupt or hold something else."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        values = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def make_directory(path: Path) -> None:
    """Create a directory and its parents.

    Raises:
        ResourceError: the disk or its permissions do not allow it.
    """
    convert_os_errors(lambda: path.mkdir(parents=True, exist_ok=True), path)


def convert_os_errors(action: Callable[[], T], path: Path, need: int = 0) -> T:
    """Run an action that writes; turn an OSError into a message with path and bytes needed.

    Raises:
        ResourceError: instead of OSError.
    """
    try:
        return action()
    except OSError as error:
        raise resource_error(error, path, need) from error


def resource_error(error: OSError, path: Path, need: int = 0) -> ResourceError:
    """Return the error that says why the system refused to write."""
    needed = f" ({need:,} bytes needed)" if need else ""
    why = error.strerror or error
    return ResourceError(f"cannot write {path}{needed}: {why}\nmake room or choose another place with out=DIR")


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable, by fsync."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cut(path: Path, size: int) -> int:
    """Cut a file of JSON lines to the whole lines in its first `size` bytes; return their bytes.

    Raises:
        ResourceError: the disk or its permissions do not allow it.
    """

    def truncate() -> int:
        with open(path, "rb") as file:
            known = file.read(size)
        whole = b"".join(line + b"\n" for line in known.split(b"\n") if parse_json(line) is not None)
        if whole == known:
            os.truncate(path, size)
        else:
            write(path, whole)
        return len(whole)

    return convert_os_errors(truncate, path) if path.exists() else 0
