"""Locks of processes that share a folder: probed at the start, and refused if they do not exclude each other."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

from qbench.errors import ResourceError
from qbench.system import sharing
from qbench.system.sharing import FOLDER, announced

OTHER = """
import fcntl, sys
if sys.argv[2] == "nolock":  # a lock of this process is not seen by others, as on NFS with nolock
    fcntl.flock = lambda handle, kind: None
from qbench.system.sharing import announced
with announced([sys.argv[1]]):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that is announced in a folder, and wait until it is."""
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, folder, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with other:
        try:
            assert other.stdout
            assert other.stdout.readline() == "ready\n"
            yield other
        finally:
            other.kill()


def test_locks_that_exclude_are_accepted(tmp_path: Path) -> None:
    with another_process(tmp_path, "locks"):
        with announced([tmp_path]) as began:
            assert len(list((tmp_path / FOLDER).glob("*.lock"))) == 2
        assert began > 0
        assert len(list((tmp_path / FOLDER).glob("*.lock"))) == 1


def test_locks_that_do_not_exclude_are_refused(tmp_path: Path) -> None:
    with another_process(tmp_path, "nolock"), pytest.raises(ResourceError) as raised, announced([tmp_path]):
        pass
    assert "file locks do not exclude it" in str(raised.value)
    assert "nolock" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 3


def test_files_of_a_killed_process_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with another_process(tmp_path, "locks") as other:
        other.kill()
        other.wait()
    assert len(list((tmp_path / FOLDER).iterdir())) == 2
    monkeypatch.setattr(sharing, "BEAT_SECONDS", 0.05)
    with announced([tmp_path, tmp_path]):
        assert len(list((tmp_path / FOLDER).glob("*.lock"))) == 1
    assert not (tmp_path / FOLDER).exists()
