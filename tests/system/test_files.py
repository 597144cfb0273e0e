"""The writer of durable files: what it syncs, and in which order."""

import os
import stat
from pathlib import Path

import pytest

from qbench.system import files


def test_a_file_and_then_its_directory_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the directory's sync, the new name can be lost in a power failure."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        events.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    files.write(tmp_path / "a", b"x")
    assert events == ["file", "rename", "directory"]
    assert (tmp_path / "a").read_bytes() == b"x"
