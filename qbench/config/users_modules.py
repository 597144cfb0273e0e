"""Imports the user's modules, and reloads a module if its file has changed."""

import hashlib
import importlib
import sys
from pathlib import Path
from types import ModuleType

_imported: dict[str, str] = {}
"""Module -> sha256 of the file that was imported last."""


def import_current(name: str) -> ModuleType:
    """Return a module, imported from the current content of its file.

    The content of the file is part of a run's identity. Python itself imports a module only once per session. If the
    file were then changed, the identity would not belong to the code that runs.

    Raises:
        ImportError: there is no such module, or it is the notebook or script itself, whose code has no file that
            can be imported.
    """
    if name == "__main__":
        raise ImportError(
            "a function in a notebook or script cannot be used by name; move it to a file, such as my_code.py"
        )
    known = name in sys.modules
    module = importlib.import_module(name)
    file = Path(getattr(module, "__file__", None) or "")
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    changed = _imported[name] != digest if name in _imported else known and _is_older(module, file)
    if changed:
        module = importlib.reload(module)
    _imported[name] = digest
    return module


def _is_older(module: ModuleType, file: Path) -> bool:
    """Return whether a module that the user imported is older than its file, according to its bytecode file."""
    cached = Path((module.__spec__ and module.__spec__.cached) or "")
    if not file.is_file() or not cached.is_file():
        return False
    now, header = file.stat(), cached.read_bytes()[:16]  # magic number, flags, and time and size of the source
    then = [int.from_bytes(header[at : at + 4], "little") for at in (8, 12)]
    return not any(header[4:8]) and then != [int(now.st_mtime) & 0xFFFFFFFF, now.st_size & 0xFFFFFFFF]
