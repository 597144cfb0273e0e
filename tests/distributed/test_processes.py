"""Several processes of one run: the same bits as one process, also after faults, signals and restarts."""

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Configure, long_tier, tiered
from filelock import FileLock
from helpers import finished_digests
from processes import WORDS, run, start

from qbench.config.schema import baseline_config
from qbench.experiment.planned_run import planned_run

DOREFA = [*WORDS, "method=dorefa", "bits=w2a2g6"]
STEPS_OF_BASELINE = 6


def newest_step(out: Path) -> int:
    return max(int(path.stem.removeprefix("state-")) for path in out.glob("*/dorefa-*/state-*.pt"))


def only_result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("*/dorefa-*/result.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Return the digests of the run and its baseline in one process."""
    out = tmp_path_factory.mktemp("alone")
    statuses, log = run(DOREFA, 1, out)
    assert statuses == [0], log
    return finished_digests(out)


def check_same_end(out: Path, size: int, alone: dict[str, str | None]) -> None:
    """Check that the run is continued by `size` processes, and ends like the run in one process."""
    statuses, log = run(DOREFA, size, out)
    assert statuses == [0] * size, log
    assert "continuing from state-" in log
    assert finished_digests(out) == alone


@pytest.mark.parametrize("size", tiered([2, 4], [2]))
def test_the_number_of_processes_changes_no_bit(tmp_path: Path, size: int, alone: dict[str, str | None]) -> None:
    statuses, log = run(DOREFA, size, tmp_path)
    assert statuses == [0] * size, log
    assert finished_digests(tmp_path) == alone
    assert log.count("epoch 2, step 12 of 12") == 1, "process 0 alone reports"
    assert json.loads(next(tmp_path.glob("*/dorefa-*/manifest.json")).read_text())["processes"] == size
    lines = (next(tmp_path.glob("*/dorefa-*/metrics.jsonl"))).read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines].count("epoch") == 2
    assert [json.loads(line)["kind"] for line in lines].count("final") == 1


@pytest.mark.parametrize("words", tiered(["gupta", "inq"], ["inq"]))
def test_draws_and_frozen_weights(tmp_path: Path, words: str) -> None:
    """Gupta draws in the passes and in the step; INQ freezes weights before epochs."""
    more = ["method.partition=random"] if words == "inq" else []
    found = []
    for size in (1, 2):
        line = [*WORDS, f"method={words}", "init=scratch", *more]
        statuses, log = run(line, size, tmp_path / str(size))
        assert statuses == [0] * size, log
        found.append(finished_digests(tmp_path / str(size)))
    assert found[0] == found[1]
    assert len(found[0]) == 1


@pytest.mark.parametrize(
    ("fault", "status", "stored", "message"),
    [
        ("raise", 1, "failed", "ValueError: an error in a step"),
        long_tier("data", 3, "failed", "cat/7.jpg: damaged"),
        long_tier("nan", 6, "diverged", "are inf or nan"),
    ],
)
def test_an_error_of_process_1(tmp_path: Path, fault: str, status: int, stored: str, message: str) -> None:
    wrong = {1: {"at_step": STEPS_OF_BASELINE + 3, "step_fault": fault}}
    statuses, log = run(DOREFA, 2, tmp_path, wrong)
    assert statuses == [status] * 2, log
    assert len(re.findall("^qbench: ", log, re.MULTILINE)) == log.count(message) == 1, log
    result = only_result(tmp_path)
    assert result["status"] == stored
    assert message in result["reason"]
    if fault == "raise":
        text = next(tmp_path.glob("*/dorefa-*/log.txt")).read_text()
        assert "on process 1 of 2:" in text
        assert "compute_gradients" in text, "the traceback of the process that failed"


def test_a_full_disk(tmp_path: Path) -> None:
    """Only process 0 meets it, between two steps, while process 1 waits."""
    statuses, log = run(DOREFA, 2, tmp_path, {0: {"fail_at": 60, "errno": "ENOSPC", "persistent": True}})
    assert statuses == [5] * 2, log
    assert len(re.findall("^qbench: cannot write .*No space left on device", log, re.MULTILINE)) == 1, log


def test_a_signal_while_another_run_holds_the_directory(configure: Configure, tmp_path: Path) -> None:
    """Process 0 waits for the lock, and process 1 for process 0."""
    waited = planned_run(baseline_config(configure(*DOREFA))).path
    waited.mkdir(parents=True)
    with FileLock(waited / ".lock"):
        jobs = start(DOREFA, 2, tmp_path)
        deadline = time.monotonic() + 60
        while "another process is working on" not in jobs[0].stderr() and time.monotonic() < deadline:
            time.sleep(0.05)
        jobs[1].kill(signal.SIGUSR1)
        assert [job.wait(30) for job in jobs] == [75, 75], jobs[0].stderr()
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize(("rank", "size"), [long_tier(0, 1), long_tier(1, 2), long_tier(1, 4)])
def test_a_lost_process(tmp_path: Path, rank: int, size: int, alone: dict[str, str | None]) -> None:
    wrong = {rank: {"at_step": STEPS_OF_BASELINE + 9, "step_fault": "kill"}}
    statuses, log = run(DOREFA, 2, tmp_path, wrong)
    assert statuses == [-9 if r == rank else 75 for r in range(2)], log
    assert len(re.findall("^qbench: a process was lost; to continue, repeat the command$", log, re.MULTILINE)) == 1, log
    assert not list(tmp_path.glob("*/dorefa-*/result.json"))
    check_same_end(tmp_path, size, alone)


@pytest.mark.parametrize(("name", "rank"), [("USR2", 1), pytest.param("TERM", 0, marks=pytest.mark.full)])
def test_a_signal_to_one_process(tmp_path: Path, name: str, rank: int, alone: dict[str, str | None]) -> None:
    wrong = {rank: {"at_step": STEPS_OF_BASELINE + 3, "step_fault": name}}
    statuses, log = run(DOREFA, 2, tmp_path, wrong)
    assert statuses == [75] * 2, log
    assert log.count("stopped by signal") == 1, log
    assert newest_step(tmp_path) == 3, "saved after the step in which the signal came"
    check_same_end(tmp_path, 1, alone)


def test_processes_that_differ(tmp_path: Path) -> None:
    wrong = {1: {"at_step": STEPS_OF_BASELINE + 3, "step_fault": "drift"}}
    statuses, log = run(DOREFA, 2, tmp_path, wrong)
    assert statuses == [1] * 2, log
    assert re.search(r"^qbench: processes 0 and 1 differ after step 6: model\.\S+weight and \d+ more$", log, re.M), log
    assert only_result(tmp_path)["status"] == "failed"


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        (DOREFA, 3, "batch_shards=4 cannot be shared by 3 processes"),
        ([*DOREFA, "batch_shards=1"], 2, "type batch_shards=2, and start 2 processes or a smaller power of two"),
        (["-m", *DOREFA, "seed=0,1"], 2, "-m is not possible with 2 processes"),
        long_tier([*DOREFA, "lr_search=grid"], 2, "lr_search=grid is not possible with 2 processes"),
        ([*DOREFA, "hydra/launcher=joblib"], 2, "hydra/launcher is allowed only in a sweep"),
        long_tier([*DOREFA, "optim.batch_size=190"], 2, "batch_shards=4 does not divide optim.batch_size=190"),
    ],
)
def test_refusals(tmp_path: Path, words: list[str], size: int, message: str) -> None:
    by_key = {word.partition("=")[0]: word for word in words}
    statuses, log = run(list(by_key.values()), size, tmp_path)
    assert statuses == [2] * size, log
    assert log.count(message) == len(re.findall("^qbench: ", log, re.M)) == 1, log
    assert not list(tmp_path.iterdir())


def test_a_stored_row_is_printed_once(tmp_path: Path, alone: dict[str, str | None]) -> None:
    words = [*DOREFA, "method=float", "bits=w32a32g32", "epochs=1"]
    by_key = {word.partition("=")[0]: word for word in words}
    for _ in range(2):
        statuses, log = run(list(by_key.values()), 2, tmp_path)
        assert statuses == [0, 0], log
    assert "epoch" not in log


@pytest.mark.gpu
def test_processes_that_share_a_gpu(tmp_path: Path) -> None:
    """With one GPU, gradients travel by gloo; with several, by NCCL."""
    found = []
    for size in (1, 2):
        statuses, log = run([*DOREFA, "runtime.device=cuda"], size, tmp_path / str(size))
        assert statuses == [0] * size, log
        found.append(finished_digests(tmp_path / str(size)))
    assert found[0] == found[1]
    assert len(found[0]) == 2
