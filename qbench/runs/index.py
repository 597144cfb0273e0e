"""Keeps the results of many runs in one index file next to the runs, so that later reads are faster.

The index file is a copy that can be deleted at any time. A result is taken from the index file only if the size, times
and inode of the run's `result.json` have not changed since the result was read. The index is ignored if its checksum is
wrong, or if another version of the code wrote it. If the index file cannot be written, for example because the file
system is read-only, results are read from their own files every time.

Runs of one comparison share most of their values, such as the protocol. Equal values are stored once, and are one
object in memory. No code may therefore modify the values of a result.
"""

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from qbench.errors import ResourceError
from qbench.runs import result as result_module
from qbench.runs.result import Result, load_result
from qbench.system import files

INDEX = ".qbench-index"
MIN_RUNS = 1000
"""Smallest number of runs for which an index file is written. Fewer runs are read in less than a second."""

MIN_AGE_SECONDS = 2
"""Minimum age of a file that is indexed. A second change soon after the first may leave the file's time unchanged."""

SHARED = (
    "method", "options", "bits", "network", "dataset", "model", "protocol", "baseline", "verified", "quantizers",
    "card", "cost", "data_sha256", "commits", "protocol_changes", "notes", "warnings",
)  # fmt: skip
"""Fields of a result whose values are usually equal in many runs."""

FIELDS = tuple(field.name for field in fields(Result) if field.name != "run")
CHECKSUM_BYTES = hashlib.sha256().digest_size

NOT_STORABLE = (OverflowError, UnicodeEncodeError)
"""Errors that msgpack raises for a result with an integer of more than 64 bits, or with text that is not Unicode."""

Stamp = tuple[int, int, int, int]
"""Size, modification time, change time (in ns) and inode of a file."""


class RunIndex:
    """The results of the runs below a directory. Results that were not indexed are read from their files.

    Args:
        root: the directory of the runs. Its index file is read if it is intact.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._prefix = root, len(str(root)) + 1
        self._shared = SharedValues()
        self._known = _read(root / INDEX, self._shared)
        self._rows: list[_Row] = []
        self._changed = False

    def load(self, path: Path) -> Result | None:
        """Return the result in a run directory below the root, as `load_result` does."""
        file = f"{path}/result.json"
        try:
            status = os.stat(file)
        except OSError:
            return None
        stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        row = self._known.get(str(path)[self._prefix :])
        if row is not None and row.stamp == stamp:
            self._rows.append(row)
            return _unpack(row, str(path), self._shared)
        result = load_result(path)
        if result is None:
            return None
        try:
            result, numbers = self._shared.share(result)
        except NOT_STORABLE:
            return result
        if time.time_ns() - max(stamp[1:3]) > MIN_AGE_SECONDS * 10**9:
            values = [numbers.get(name, getattr(result, name)) for name in FIELDS]
            self._rows.append(_row_type()(str(path)[self._prefix :], stamp, *values))
            self._changed = True
        return result

    def save(self) -> None:
        """Write the index file if there are at least `MIN_RUNS` results, and results were added, changed or removed.

        Errors in writing are ignored.
        """
        if len(self._rows) < MIN_RUNS or not (self._changed or len(self._rows) < len(self._known)):
            return
        with suppress(ResourceError, *NOT_STORABLE):
            data = msgspec.msgpack.encode((_version(), self._shared.encoded(), self._rows))
            files.write(self._root / INDEX, hashlib.sha256(data).digest() + data)


class _Row(msgspec.Struct, array_like=True, gc=False):
    """A row of the index file, without the fields of the result (`_row_type`)."""

    path: str
    stamp: Stamp


class SharedValues:
    """The distinct values of the fields in `SHARED`. Each value has a number within its field."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[bytes, int]] = {name: {} for name in SHARED}
        self.values: dict[str, list[object]] = {name: [] for name in SHARED}

    def share(self, result: Result) -> tuple[Result, dict[str, int]]:
        """Replace values of a new result by equal values of earlier results.

        Return the result and the numbers of these values.
        """
        numbers = {}
        for name in SHARED:
            value = getattr(result, name)
            key = msgspec.msgpack.encode(value)
            number = numbers[name] = self._numbers[name].setdefault(key, len(self.values[name]))
            if number == len(self.values[name]):
                self.values[name].append(value)
            else:
                object.__setattr__(result, name, self.values[name][number])
        return result, numbers

    def encoded(self) -> dict[str, list[msgspec.Raw]]:
        """Return the encoded values of each field, in the order of their numbers."""
        return {name: [msgspec.Raw(key) for key in numbers] for name, numbers in self._numbers.items()}

    def restore(self, encoded: dict[str, list[msgspec.Raw]]) -> None:
        """Add the values that `encoded` returned."""
        for name, kind in _types(SHARED).items():
            decode: Callable[[msgspec.Raw], object] = msgspec.msgpack.Decoder(kind).decode
            self.values[name] = [decode(raw) for raw in encoded[name]]
            self._numbers[name] = {bytes(raw): number for number, raw in enumerate(encoded[name])}


def _read(path: Path, shared: SharedValues) -> dict[str, "_Row"]:
    """Return the rows of an index file by path, and fill `shared`. The result is empty if the file is not intact."""
    try:
        data = memoryview(files.read(path))
        checksum, content = data[:CHECKSUM_BYTES], data[CHECKSUM_BYTES:]
        if checksum != hashlib.sha256(content).digest():
            return {}
        kind = tuple[str, dict[str, list[msgspec.Raw]], msgspec.Raw]
        version, encoded, raw_rows = msgspec.msgpack.decode(content, type=kind)
        if version != _version():
            return {}
        rows: list[_Row] = msgspec.msgpack.decode(raw_rows, type=list[_row_type()])  # type: ignore[misc]
        shared.restore(encoded)
    except (OSError, KeyError, msgspec.MsgspecError):
        return {}
    return {row.path: row for row in rows}


@cache
def _row_type() -> type[Any]:
    """Return the type of a row of the index file: the path below the root, the stamp, and the fields of the result.

    For a field in `SHARED`, the row contains the index of the value in `SharedValues.values`.
    """
    kinds = [(name, int if name in SHARED else kind) for name, kind in _types(FIELDS).items()]
    return msgspec.defstruct("Row", kinds, bases=(_Row,), array_like=True, gc=False)


def _types(names: tuple[str, ...]) -> dict[str, object]:
    hints = get_type_hints(Result, include_extras=True)
    return {name: hints[name] for name in names}


def _unpack(row: "_Row", run: str, shared: SharedValues) -> Result:
    """Return the result of a row. Types and ranges were checked when the index file was decoded."""
    values: dict[str, Any] = dict(zip(FIELDS, msgspec.structs.astuple(row)[2:], strict=True))
    for name, known in shared.values.items():
        values[name] = known[values[name]]
    result = object.__new__(Result)
    object.__setattr__(result, "__dict__", values | {"run": run})
    return result


@cache
def _version() -> str:
    """Return a digest of the fields of a result and of the code that checks results."""
    schema = msgspec.json.encode(msgspec.json.schema(Result), order="sorted")
    return hashlib.sha256(schema + Path(result_module.__file__).read_bytes()).hexdigest()
