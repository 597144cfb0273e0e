"""Writes files durably and atomically. Reads JSON and YAML."""

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
"""A value that JSON can represent."""
YAML_BYTES, YAML_VALUES = 2**16, 2**14
"""Maximum number of bytes and of values in a YAML file. The files of qbench stay below a tenth of both numbers."""


def write(path: Path, data: bytes) -> None:
    """Replace a file's content by `data`, durably.

    The data is written to a temporary file, flushed and synced. Then the file is renamed, and the
    directory is synced.

    Raises:
        ResourceError: disk space or permissions prevent writing. The old content of the file is unchanged.
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
    """Return the bytes of a file. Pipes and devices are refused, because their data might never end.

    Raises:
        OSError: the file does not exist or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def read_yaml(path: Path, loader_class: type[Any] = yaml.SafeLoader) -> Any:
    """Return the plain values of a YAML file. Tags that create objects are refused.

    The file's size and the number of values are limited. A YAML alias counts as all values that it repeats.

    Args:
        loader_class: a loader of PyYAML that makes plain values only.

    Raises:
        OSError: the file does not exist or cannot be read.
        ConfigError: the content is not valid YAML, or it is too large.
    """
    data = read(path)
    try:
        loader = loader_class(data[: YAML_BYTES + 1])
        node = loader.get_single_node() if len(data) <= YAML_BYTES else None
        if len(data) > YAML_BYTES or _values(node, {}) > YAML_VALUES:
            most = f"at most {YAML_BYTES:,} bytes and {YAML_VALUES:,} values (with aliases expanded)"
            raise ConfigError(f"{path}: too large; allowed: {most}")
        _refuse_repeated_keys(path, node)
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path}: {where}{error.problem or error.context}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # the last three are raised for unusual scalars
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _refuse_repeated_keys(path: Path, node: yaml.Node | None) -> None:
    """Refuse a mapping that contains a key twice. PyYAML would silently use the last value."""
    waiting, seen = [node], set[int]()
    while waiting:
        part = waiting.pop()
        if not isinstance(part, yaml.CollectionNode) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, yaml.MappingNode):
            keys = set[str]()
            for key, value in part.value:
                waiting.append(value)
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        raise ConfigError(f"{path}: line {key.start_mark.line + 1}: {key.value} occurs twice")
                    keys.add(key.value)
        else:
            waiting += part.value


def _values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Return the number of values in a node with all aliases expanded, or inf if the node contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file is missing, corrupt or not an object."""
    try:
        return parse_json(read(path))
    except OSError:
        return None


def parse_json(data: bytes) -> dict[str, Any] | None:
    """Return the JSON object in `data`, or None if the content is corrupt or not an object."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not valid JSON")

    try:
        values = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def make_directory(path: Path) -> None:
    """Create a directory and its parents durably. The parent of each new directory is synced.

    Raises:
        ResourceError: the disk or its permissions prevent creation.
    """

    def make() -> None:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            sync_directory(folder.parent)
        path.mkdir(exist_ok=True)  # raises an error if the path is a file

    convert_os_errors(make, path)


def convert_os_errors(action: Callable[[], T], path: Path, need: int = 0) -> T:
    """Run an action that writes a file. Convert an OSError to an error that states the path and the needed bytes.

    Raises:
        ResourceError: the action raised an OSError.
    """
    try:
        return action()
    except OSError as error:
        raise resource_error(error, path, need) from error


def resource_error(error: OSError, path: Path, need: int = 0) -> ResourceError:
    """Return an error that states why the system could not write."""
    needed = f" ({need:,} bytes needed)" if need else ""
    why = error.strerror or error
    return ResourceError(
        f"cannot write {path}{needed}: {why}\nfree disk space, or choose another directory with out=DIR"
    )


def sync_directory(path: Path) -> None:
    """Call fsync on a directory, so that earlier renames in this directory are durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cut(path: Path, size: int) -> int:
    """Truncate a file of JSON lines to the intact lines in its first `size` bytes. Return the new size.

    Raises:
        ResourceError: the disk or its permissions prevent writing.
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
