"""A disk that is full or refuses: status 5 with path and need, the last good checkpoint stays, the same line goes on
when there is room (R12)."""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import faults
import pytest
from conftest import ROOT, counted
from helpers import finished_digests, qbench

from qbench.training.checkpoint import unpack

WORDS = ["experiment=smoke", "method=dorefa", "bits=w2a2g4", "epochs=2", "runtime.checkpoint_seconds=0"]
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EACCES")
MEANT = {
    "ENOSPC": "No space left",
    "EIO": "Input/output error",
    "EDQUOT": "quota exceeded",
    "EACCES": "Permission denied",
}


def sound(out: Path) -> int:
    """Return how many checkpoints there are, after reading all of them."""
    paths = [*out.rglob("state-*.pt"), *out.rglob("last.pt"), *out.rglob("best.pt")]
    for path in paths:
        unpack(path.read_bytes(), str(path))
    return len(paths)


@pytest.mark.parametrize("count", [6, pytest.param(0, marks=pytest.mark.full)], ids=["some", "all"])
@pytest.mark.parametrize("tensorboard", [False, True], ids=["plain", "tensorboard"])
def test_any_refused_write(tmp_path: Path, count: int, tensorboard: bool) -> None:
    words = [*WORDS, f"runtime.tensorboard={str(tensorboard).lower()}"]
    with faults.server() as server:
        alone = server.start([*words, f"out={tmp_path / 'alone'}"], count=str(tmp_path / "counts"))
        assert alone.wait(60) == 0, alone.stderr()
        expected = finished_digests(tmp_path / "alone")
        counts = json.loads((tmp_path / "counts").read_text())
        total = counts["events"] + counts["writes"]
        points = random.Random(1).sample(range(1, total + 1), count) if count else range(1, total + 1)
        refused = 0
        for n in points:
            kind = ERRORS[n % len(ERRORS)]
            out = tmp_path / f"out{n}"
            job = server.start([*words, f"out={out}"], fail_at=n, errno=kind, persistent=True)
            status, replay = job.wait(60), f"fail_at={n} of {total}, errno={kind}, tensorboard={tensorboard}"
            assert status in (5, 0), (replay, status, job.stderr())
            if status == 5:
                refused += 1
                said = next(line for line in reversed(job.stderr().splitlines()) if line.startswith("qbench: "))
                assert MEANT[kind] in said, (replay, said)
                assert str(out) in said, (replay, said)
                assert "Traceback" not in job.stderr(), replay
            sound(out)
            again = server.start([*words, f"out={out}"])
            assert again.wait(60) == 0, (replay, again.stderr())
            assert finished_digests(out) == expected, replay
    assert refused > len(points) // 2
    shown = f"TensorBoard {'on' if tensorboard else 'off'}"
    if not count:
        counted(f"R12: {len(points)} refused operations, {shown}: {refused} ended with 5, all went on to the same end")


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    command = [sys.executable, "-m", "qbench", *WORDS, f"out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limited, check=False)
    assert done.returncode == 5, done.stderr
    assert "bytes needed): File too large" in done.stderr
    assert not list(tmp_path.rglob(".*.tmp"))
    assert qbench(*WORDS, f"out={tmp_path}").returncode == 0


def test_a_small_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        statuses = []
        for size in (40, 120, 200, 260, 320, 600):
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
            done = qbench(*WORDS, "runtime.tensorboard=false", f"out={disk}")
            statuses.append(done.returncode)
            assert done.returncode in (0, 5), done.stderr
            if done.returncode == 5:
                assert "bytes needed): No space left on device" in done.stderr
                assert "make room" in done.stderr
            sound(disk)
        assert statuses[0] == 5
        assert statuses[-1] == 0
        assert qbench(*WORDS, "runtime.tensorboard=false", f"out={tmp_path / 'alone'}").returncode == 0
        assert finished_digests(disk) == finished_digests(tmp_path / "alone")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_place_that_may_not_be_written(tmp_path: Path) -> None:
    for out in ("/proc/qbench", "/dev/null/qbench"):
        done = qbench(*WORDS, f"out={out}")
        assert done.returncode == 5, done.stderr
        assert out in done.stderr
        assert "another place with out=DIR" in done.stderr
        assert "Traceback" not in done.stderr
