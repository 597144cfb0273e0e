"""scripts/torchrun: the exit status and the messages of qbench, and signals."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, counted
from helpers import finished_digests, processes_of
from processes import WORDS, run

DOREFA = [*WORDS, "method=dorefa", "bits=w2a2g6"]
KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def start(words: list[str], size: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qbench.distributed.torchrun", f"--nproc-per-node={size}", "-m", "qbench", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_status_and_the_message_of_an_error() -> None:
    """torchrun itself exits with 1, after two tracebacks of its own."""
    job = start([*DOREFA, "batch_shards=1"][1:])
    out, log = job.communicate(timeout=120)
    assert job.returncode == 2
    assert out == ""
    assert log.startswith("qbench: batch_shards"), log
    assert len(log.splitlines()) == 2, log


@pytest.mark.full
def test_a_row_is_printed_once(tmp_path: Path) -> None:
    job = start([*DOREFA, f"out={tmp_path}"])
    out, log = job.communicate(timeout=240)
    assert job.returncode == 0, log
    assert out.count("dorefa") == 2, "the row, and the run's directory"
    assert log.count("step 12 of 12") == 1, log


@pytest.mark.full
@pytest.mark.parametrize("count", [20])
def test_signals_at_any_moment(tmp_path: Path, count: int) -> None:
    """A signal to torchrun: status 75, no process left, and the same end."""
    statuses, log = run(DOREFA, 1, tmp_path / "alone")
    assert statuses == [0], log
    expected = finished_digests(tmp_path / "alone")
    began = time.monotonic()
    whole = start([*DOREFA, f"out={tmp_path / 'whole'}"])
    whole.communicate(timeout=240)
    took, stopped = time.monotonic() - began, 0
    assert whole.returncode == 0
    for kind in KINDS:
        for i in range(count):
            out = tmp_path / f"{kind.name}{i}"
            job = start([*DOREFA, f"out={out}"])
            time.sleep(took * (i + 0.5) / count)
            os.kill(job.pid, kind)
            _, log = job.communicate(timeout=240)
            assert job.returncode in (0, 75), (kind, i, job.returncode, log)
            assert not processes_of(job.pid), (kind, i)
            assert "Traceback" not in log, log
            stopped += job.returncode == 75
            statuses, log = run(DOREFA, 1 + i % 2, out)
            assert set(statuses) == {0}, log
            assert finished_digests(out) == expected, (kind, i)
    assert stopped > 2 * count
    counted(f"R17: {4 * count} signals to torchrun, {stopped} ended with 75, others had finished; equal ends")


def children(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started. torchrun's processes have their own sessions."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            found += [int(stat.parent.name)] if int(parent) == pid and state != "Z" else []
    return sorted(found)


@pytest.mark.full
def test_processes_end_with_the_torchrun_that_started_them(tmp_path: Path) -> None:
    """A kill of torchrun, at its start or in training, leaves no process that waits for the others."""
    for moment in (0.0, 3.0):
        job = start([*DOREFA, f"out={tmp_path / str(moment)}", "epochs=200"])
        deadline = time.monotonic() + 60
        while len(workers := children(job.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(workers) >= 2
        time.sleep(moment)
        job.kill()
        while any(map(_is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(_is_alive, workers)), moment
        job.communicate(timeout=60)


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").exists() and bool(Path(f"/proc/{pid}/cmdline").read_bytes())
