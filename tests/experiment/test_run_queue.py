"""Several processes that execute the same sweep in one folder, as several hosts on one file system would."""

import os
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import faults
import pytest
from conftest import Configure
from helpers import finished_digests, plant

from qbench.errors import Busy
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.experiment.run_queue import RunQueue, baselines_first

NOTES_WORK = """
import dataclasses, os
from qbench.methods import dorefa

def build(*, w: int = 2, a: int = 32, g: int = 32, tag: int = 0, fails: bool = False):
    begun = []
    def step(model, optimizer):
        if not begun:
            begun.append(True)
            with open("worked", "a") as file:
                file.write(f"{os.getpid()} {tag}\\n")
        if fails:
            raise ValueError("planted")
        optimizer.step()
    return dataclasses.replace(dorefa.build(w=w, a=a, g=g), name="mine", step=step)
"""


def runs_of_seeds(configure: Configure, *seeds: int, words: tuple[str, ...] = ()) -> list[PlannedRun]:
    return [planned_run(configure("method=dorefa", f"seed={seed}", *words)) for seed in seeds]


def test_a_run_that_another_process_works_on_is_put_off(configure: Configure) -> None:
    runs = runs_of_seeds(configure, 0, 1, 2)
    queue = RunQueue(runs)
    with runs[0].directory.lock(), runs[2].directory.lock():
        assert queue.take() is runs[1]
        assert queue.take() is None
        assert len(queue) == 2
    assert [queue.take(), queue.take(), len(queue)] == [runs[0], runs[2], 0]


def test_runs_of_a_busy_baseline_are_put_off_together(configure: Configure) -> None:
    """Otherwise each of them would be built before it finds the baseline locked."""
    runs = [
        *runs_of_seeds(configure, 0),
        planned_run(configure("method=lsq", "seed=0")),
        planned_run(configure("method=dorefa", "seed=0", "init=scratch")),
        *runs_of_seeds(configure, 1),
    ]
    baseline = planned_run(configure("method=float", "init=scratch", "epochs=${pretrain.epochs}"))
    queue = RunQueue(runs)
    with baseline.directory.lock():
        assert queue.take() is runs[0]
        queue.put_off(runs[0], baseline.path)
        assert [queue.take(), queue.take(), queue.take()] == [runs[2], runs[3], None]
    assert [queue.take(), queue.take()] == [runs[1], runs[0]]


@pytest.mark.parametrize("status", ["done", "failed"])
def test_a_result_of_another_process_counts_if_it_is_new(configure: Configure, status: str) -> None:
    """A result that failed before the sweep is computed again, one that failed during the sweep is not."""
    (planned,) = runs_of_seeds(configure, 0)
    path = plant(planned.config, 90.0, status=status) / "result.json"
    written = path.stat().st_mtime_ns
    assert RunQueue([planned], written).take() is planned, "as old as the sweep"
    assert RunQueue([planned], written - 1).take() is None
    os.utime(path, ns=(written, written - 2))
    assert RunQueue([planned], written - 1).take() is planned


def test_runs_without_baseline_come_first_too(configure: Configure) -> None:
    needing, free = runs_of_seeds(configure, 0, 1, 2), runs_of_seeds(configure, 0, 1, words=("init=scratch",))
    same = [planned_run(configure("method=lsq", f"seed={seed}")) for seed in range(3)]
    assert baselines_first([*needing, *same, *free]) == [*needing, *free, *same]


def test_only_a_context_that_waits_waits(tmp_path: Path) -> None:
    RunContext().waiting(tmp_path)()
    with pytest.raises(Busy) as raised:
        RunContext(waits=False).waiting(tmp_path)()
    assert raised.value.path == tmp_path


def start_hosts(folder: Path, words: list[str], count: int = 2) -> list[faults.Job]:
    (folder / "mine.py").write_text(NOTES_WORK)
    with faults.server() as server:
        return [server.start([*words, f"out={folder / 'o'}"], cwd=folder) for _ in range(count)]


def test_two_processes_share_a_sweep(tmp_path: Path) -> None:
    words = ["-m", "experiment=smoke", "runtime.tensorboard=false", "epochs=2", "method=mine:build"]
    jobs = start_hosts(tmp_path, [*words, "method.tag=0,1,2,3"])
    assert [job.wait() for job in jobs] == [0, 0], [job.stderr() for job in jobs]
    worked = [line.split() for line in (tmp_path / "worked").read_text().splitlines()]
    assert Counter(tag for _, tag in worked) == {str(tag): 1 for tag in range(4)}, "no run is done twice"
    assert {pid for pid, _ in worked} == {str(job.pid) for job in jobs}, "both processes work"
    assert len(finished_digests(tmp_path / "o")) == 5
    assert jobs[0].stdout() == jobs[1].stdout() != ""
    assert not (tmp_path / "o" / ".processes").exists()


@pytest.mark.full
def test_a_failed_run_is_not_repeated_by_the_other_process(tmp_path: Path) -> None:
    words = ["-m", "experiment=smoke", "runtime.tensorboard=false", "method=mine:build", "method.fails=true"]
    jobs = start_hosts(tmp_path, [*words, "method.tag=0,1,2,3"])
    assert [job.wait() for job in jobs] == [8, 8], [job.stderr() for job in jobs]
    worked = [line.split()[1] for line in (tmp_path / "worked").read_text().splitlines()]
    assert Counter(worked) == {str(tag): 1 for tag in range(4)}
    assert jobs[0].stdout() == jobs[1].stdout()


def test_a_stopped_process_leaves_its_run_to_the_other(configure: Configure) -> None:
    runs = runs_of_seeds(configure, 0)
    queue, asked = RunQueue(runs), iter([0, 0, 15])
    with ExitStack() as stack:
        stack.enter_context(runs[0].directory.lock())
        began = time.monotonic()
        assert queue.next_run(lambda: next(asked)) is None, "a signal ends the wait"
        assert time.monotonic() - began < 5
    assert queue.next_run(lambda: 0) is runs[0]
    assert queue.next_run(lambda: 0) is None
