"""A disk that is full or not writable: status 5 with the path and the bytes needed (R12).

The last good checkpoint remains, and the same command resumes once there is space.
"""

import json
import random
import subprocess
from pathlib import Path

import faults
import pytest
from conftest import counted
from helpers import finished_digests

from qbench.training.checkpoint import unpack

SIZE = ["optim.batch_size=256", "pretrain.optim.batch_size=256"]  # few steps, each with a checkpoint
WORDS = ["experiment=smoke", "method=dorefa", "bits=w2a2g4", "epochs=2", "runtime.checkpoint_seconds=0", *SIZE]
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EACCES")
MESSAGES = {
    "ENOSPC": "No space left",
    "EIO": "Input/output error",
    "EDQUOT": "quota exceeded",
    "EACCES": "Permission denied",
}


def verify_checkpoints(out: Path) -> None:
    """Read all checkpoints and weights below."""
    paths = [*out.rglob("state-*.pt"), *out.rglob("last.pt"), *out.rglob("best.pt")]
    for path in paths:
        unpack(path.read_bytes(), str(path))


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 2, 0], ids=["one", "some", "all"])
@pytest.mark.parametrize("tensorboard", [False, True], ids=["plain", "tensorboard"])
def test_a_write_error_at_any_point(tmp_path: Path, count: int, tensorboard: bool) -> None:
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
                message = next(line for line in reversed(job.stderr().splitlines()) if line.startswith("qbench: "))
                assert MESSAGES[kind] in message, (replay, message)
                assert str(out) in message, (replay, message)
                assert "Traceback" not in job.stderr(), replay
            verify_checkpoints(out)
            again = server.start([*words, f"out={out}"])
            assert again.wait(60) == 0, (replay, again.stderr())
            assert finished_digests(out) == expected, replay
    assert refused > len(points) // 2
    variant = f"TensorBoard {'on' if tensorboard else 'off'}"
    if not count:
        counted(
            f"R12: {len(points)} refused operations, {variant}: {refused} ended with 5, all went on to the same end"
        )


@pytest.mark.full
def test_a_file_size_limit(tmp_path: Path) -> None:
    with faults.server() as server:
        job = server.start(WORDS, out=tmp_path, file_limit=60_000)
        assert job.wait(60) == 5, job.stderr()
        assert "bytes needed): File too large" in job.stderr()
        assert not list(tmp_path.rglob(".*.tmp"))
        again = server.start(WORDS, out=tmp_path)
        assert again.wait(60) == 0, again.stderr()


@pytest.mark.full
def test_a_small_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    words = [*WORDS, "runtime.tensorboard=false"]
    try:
        with faults.server() as server:
            statuses = []
            for size in (40, 120, 200, 260, 320, 600):
                subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
                job = server.start(words, out=disk)
                statuses.append(job.wait(60))
                assert statuses[-1] in (0, 5), job.stderr()
                if statuses[-1] == 5:
                    assert "bytes needed): No space left on device" in job.stderr()
                    assert "free disk space" in job.stderr()
                verify_checkpoints(disk)
            assert statuses[0] == 5
            assert statuses[-1] == 0
            assert server.start(words, out=tmp_path / "alone").wait(60) == 0
            assert finished_digests(disk) == finished_digests(tmp_path / "alone")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_created() -> None:
    with faults.server() as server:
        for out in ("/proc/qbench", "/dev/null/qbench"):
            job = server.start(WORDS, out=out)
            assert job.wait(60) == 5, job.stderr()
            assert out in job.stderr()
            assert "another directory with out=DIR" in job.stderr()
            assert "Traceback" not in job.stderr()
