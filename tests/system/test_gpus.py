"""GPUs of a machine, each locked by one run of a sweep. The names stand for GPUs that this machine need not have."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from qbench.experiment import workers
from qbench.system import cores, gpus
from qbench.system.gpus import VISIBLE, most_runs, pin_process, take, visible_gpus


def test_each_run_takes_its_own_gpus(tmp_path: Path) -> None:
    first, second = take(["0", "1", "2"], 1, tmp_path), take(["0", "1", "2"], 1, tmp_path)
    assert first is not None
    assert second is not None
    assert (first.names, second.names) == (("0",), ("1",))
    assert take(["0", "1", "2"], 2, tmp_path) is None, "one is free, and it stays free"
    first.release()
    third = take(["0", "1", "2"], 2, tmp_path)
    assert third is not None
    assert third.names == ("0", "2")
    assert take(["0", "1", "2"], 1, tmp_path) is None


def test_runs_that_share_a_gpu_first_take_different_ones(tmp_path: Path) -> None:
    taken = [take(["a", "b"], 0.5, tmp_path) for _ in range(5)]
    assert [found.names if found else None for found in taken] == [("a",), ("b",), ("a",), ("b",), None]
    assert [most_runs(["a", "b"], per_run) for per_run in (0.25, 0.5, 1, 2, 3)] == [8, 4, 2, 1, 0]


PIN = """
import os, sys
from pathlib import Path
from qbench.system.gpus import VISIBLE, pin_process
taken = pin_process(["0", "1"], 1, Path(sys.argv[1]))
assert "torch" not in sys.modules
print(os.environ[VISIBLE], flush=True)
sys.stdin.read()
"""


def test_the_gpus_of_a_killed_process_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> subprocess.Popen[str]:
        words = [sys.executable, "-c", PIN, str(tmp_path)]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    with start() as one, start() as two:
        assert one.stdout
        assert two.stdout
        names = {one.stdout.readline(): one, two.stdout.readline(): two}
        assert set(names) == {"0\n", "1\n"}
        monkeypatch.setattr(time, "sleep", lambda seconds: names["1\n"].kill())  # while the third process waits
        monkeypatch.setenv(VISIBLE, "0,1")
        taken = pin_process(["0", "1"], 1, tmp_path)
        assert taken.names == ("1",)
        assert os.environ[VISIBLE] == "1"
        taken.release()
        names["0\n"].kill()


def test_the_gpus_that_a_process_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setenv(VISIBLE, "0,1")
    assert visible_gpus() == [], "a build of torch without CUDA uses no GPU"
    monkeypatch.setattr(gpus, "version", lambda name: "2.13.0")
    for typed, expected in (("0,1", ["0", "1"]), ("GPU-8f6d, 3", ["GPU-8f6d", "3"]), ("", []), ("2,-1,3", ["2"])):
        monkeypatch.setenv(VISIBLE, typed)
        assert visible_gpus() == expected, typed
    monkeypatch.delenv(VISIBLE)
    for name in ("0000:17:00.0", "0000:65:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(gpus, "DRIVER", tmp_path)
    assert visible_gpus() == ["0", "1"]


def test_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (cores.SHARING, "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "cores", lambda: 16)
    assert cores.own_cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores.own_cores() == 2
    monkeypatch.setenv(cores.SHARING, "32")
    assert cores.own_cores() == 1
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert cores.own_cores() == 16, "SLURM has divided them"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert cores.own_cores() == 6


@pytest.mark.full
def test_workers_of_a_sweep_see_one_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with workers._pool(2, ["4", "7"], 1) as pool:
        seen = set()
        for _ in range(200):
            seen |= {job.result() for job in [pool.submit(os.getenv, VISIBLE) for _ in range(4)]}
            if len(seen) == 2:
                break
        assert seen == {"4", "7"}
        assert pool.submit(os.getenv, cores.SHARING).result() == "2"
