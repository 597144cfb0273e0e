"""Digests of configurations: what makes two runs the same run."""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qbench.errors import ConfigError
from qbench.system.files import read


def digest(values: Mapping[str, Any]) -> str:
    """Return the sha256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(_plain(values), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Write 1.0 as 1: the two are the same value, however it was typed."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@cache
def file_sha256(key: str, path: str) -> str:
    """Return the sha256 of a checkpoint that a key names: another content is another run, wherever it lies."""
    file = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    try:
        return hashlib.sha256(read(file)).hexdigest()
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot read {file}: {error.strerror}") from None


def path_component(name: str) -> str:
    """Return a name with all characters replaced that are unsafe in a path."""
    return re.sub(r"[^A-Za-z0-9._+]+", ".", name).strip(".")
