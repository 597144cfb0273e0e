"""Imports modules of the user from their current files in the current working directory, as a new process would.

The content of a module's file is part of a run's identity. A Python session would normally keep the module as it was at
the first import. The identity would then belong to the current file, but the run would use the old code.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

_executed: dict[str, str] = {}
"""Module -> sha256 of its file at the last import."""

_kept: list[bool] = []
"""One element for each block of `keep_modules` that is being executed."""

_searched: list[str] = []
"""Contains the working directory that was added to `sys.path`. Empty if `sys.path` already contained it."""


def search_working_directory() -> None:
    """Put the working directory into `sys.path`, in place of the working directory that was added before.

    Modules from the previous working directory are imported again on next use, unless a new process would find the same
    files.
    """
    here = os.getcwd()
    importlib.invalidate_caches()
    if _searched == [here] and here in sys.path:
        return
    left = _searched.copy()
    sys.path[:] = [place for place in sys.path if place not in left]
    _searched.clear()
    if here not in sys.path:
        sys.path.insert(0, here)
        _searched.append(here)
    for folder in left:
        loaded = [name for name, module in sys.modules.items() if _file(module).is_relative_to(folder)]
        for name in {name.partition(".")[0] for name in loaded} - {"__main__"}:
            if _found_file(name) != os.path.realpath(_file(sys.modules.get(name))):
                _forget(name)


@contextmanager
def keep_modules() -> Iterator[None]:
    """Do not import a module again within a `with` block or a decorated function, even if its file was edited.

    A run builds its network several times. If the file were read again, an edit would change a run in progress.
    """
    _kept.append(True)
    try:
        yield
    finally:
        _kept.pop()


def import_current(name: str) -> ModuleType:
    """Return a module as a new process would import it, or as it is within `keep_modules`.

    A module that is imported again is a new module object. Objects that the old module created keep the old code.

    Raises:
        ImportError: the module does not exist, or it is the running notebook or script, which cannot be imported.
    """
    if name == "__main__":
        raise ImportError(
            "a function in a notebook or script cannot be used by name; move it to a file, such as my_code.py"
        )
    if _kept and name in sys.modules and name in _executed:
        return sys.modules[name]
    package = name.partition(".")[0]
    file = _found_file(package)
    if package in sys.modules and file and file != os.path.realpath(_file(sys.modules[package])):
        _forget(package)
    if name in sys.modules and _is_stale(name, sys.modules[name]):
        _forget(name)
    if name in sys.modules:
        module = sys.modules[name]
        _executed[name] = _digest(module)
        return module
    return _imported(name)


def executed_digest(name: str) -> str:
    """Return the sha256 of the file of a module at its last import, or "" if the module has no file."""
    return _executed.get(name, "")


class _SourceLoader(SourceFileLoader):
    """Executes a module's file, never its bytecode in `__pycache__`.

    Python uses the bytecode of another file if both files have the same size and the same time in whole seconds.
    """

    digest = ""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        self.digest = hashlib.sha256(source).hexdigest()
        return self.source_to_code(source, path)


def _imported(name: str) -> ModuleType:
    """Import a module, and remember the digest of the source that was executed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not isinstance(spec.loader, SourceFileLoader):
        module = importlib.import_module(name)
        _executed[name] = _digest(module)
        return module
    loader = spec.loader = _SourceLoader(spec.loader.name, spec.loader.path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    package, _, last = name.rpartition(".")
    if package:
        setattr(sys.modules[package], last, module)
    _executed[name] = loader.digest
    return module


def _found_file(name: str) -> str | None:
    """Return the file in which a new process would find a module or package, or None."""
    specs = (finder.find_spec(name, None) for finder in sys.meta_path)
    spec = next((spec for spec in specs if spec is not None), None)
    return os.path.realpath(spec.origin or "") if spec is not None and spec.has_location else None


def _is_stale(name: str, module: ModuleType) -> bool:
    """Return whether the file of an imported module has changed, or may have changed, since the import."""
    if name in _executed:
        return _executed[name] != _digest(module)
    return _file(module).is_file() and _file(module).stat().st_ctime >= _process_start()  # the user imported the module


def _forget(name: str) -> None:
    """Remove a module, or a package with all its modules, from `sys.modules`. Python then imports it again."""
    for known in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
        del sys.modules[known]
        _executed.pop(known, None)


def _file(module: ModuleType | None) -> Path:
    return Path(getattr(module, "__file__", None) or "")


def _digest(module: ModuleType) -> str:
    file = _file(module)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _process_start() -> float:
    """Return the time at which this process started, in seconds since 1970, or 0 on systems without /proc."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
