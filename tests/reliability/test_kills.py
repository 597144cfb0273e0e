"""Killed runs resume, runs that start together share their work, and records are correct."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import faults
import pytest
import yaml
from conftest import counted, long_tier, tiered
from faults import Job, Server
from helpers import processes_of, qbench

from qbench.config.identity import run_identity
from qbench.config.schema import Config
from qbench.config.validate import from_dict
from qbench.errors import CheckpointError
from qbench.runs import reader as runs
from qbench.runs.result import load_result
from qbench.system.files import parse_json
from qbench.training.checkpoint import unpack
from qbench.training.digests import weights_sha256

SIZE = "optim.batch_size={0} pretrain.optim.batch_size={0}"
LINE = ["experiment=smoke", "method=dorefa", "bits=w2a2g4", "optim.ema=0.9"]
LONG = [*LINE, *SIZE.format(128).split(), "epochs=2", "pretrain.epochs=2"]  # 10 steps an epoch
SHORT = [*LINE, *SIZE.format(512).split(), "epochs=2", "runtime.checkpoint_seconds=0"]  # 2 steps an epoch
QUIET = "runtime.tensorboard=false"
LARGE_BATCHES = "optim.batch_size=256"  # short quantized runs; the float baseline has its usual 18 steps per epoch
VARIANTS = [
    [tensorboard, saving]
    for tensorboard in (QUIET, "runtime.tensorboard=true")
    for saving in ("runtime.checkpoint_seconds=60", "runtime.checkpoint_seconds=0")
]  # the last one takes longest
Note = Callable[[str], None]
SECONDS = 120  # limit for every command


def tiers(fast: Any, full: Any) -> list[Any]:
    return [fast, pytest.param(*full if isinstance(full, tuple) else (full,), marks=pytest.mark.full)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with faults.server() as server:
        yield server


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """Return a function that records the counts of the full tier."""
    return counted if request.node.get_closest_marker("full") else lambda line: None


def finished(out: Path) -> dict[str, tuple[str | None, str | None]]:
    """Return name -> state and weights sha256 of every finished run below."""
    found = {path.parent.name: load_result(path.parent) for path in out.rglob("result.json")}
    return {name: (r.state_sha256, r.weights_sha256) for name, r in found.items() if r and r.status == "done"}


def run_alone(server: Server, words: list[str], out: Path) -> dict[str, tuple[str | None, str | None]]:
    """Run a command without disturbance; return `finished` of its output folder."""
    job = server.start(words, out=out)
    assert job.wait(SECONDS) == 0, job.stderr()
    return finished(out)


def configuration(run: Path) -> Config:
    return from_dict(yaml.safe_load((run / "config.yaml").read_text()))


def checkpoint(file: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint; None if it does not verify or belongs to another run."""
    try:
        content = unpack(file.read_bytes(), str(file))
    except (OSError, CheckpointError):
        return None
    return content if content.get("identity") == run_identity(configuration(file.parent)).digest else None


def wrong_records(out: Path) -> list[str]:
    """Return the wrong statements of the records below, when no process is running there (R19)."""
    wrong = []
    for record in runs.read([str(out)]) if out.exists() else []:
        if record.status == "running":
            wrong.append(f"{record.path}: running")
        if record.status != "done":
            continue
        last, best = (checkpoint(record.path / name) for name in ("last.pt", "best.pt"))
        if not last or not best:
            wrong.append(f"{record.path}: done, but its weights do not verify")
        elif record.notes != [runs.FROM_LOGS] and (
            not record.result or record.result.weights_sha256 != weights_sha256(last["model"])
        ):
            wrong.append(f"{record.path}: done, but its weights differ from result.json")
    return wrong


def left_over(out: Path) -> list[str]:
    return [p.name for pattern in ("state-*.pt", ".*.tmp") for p in out.rglob(pattern)]


def wrong_logs(out: Path) -> list[str]:
    """Return the logs of finished runs that do not hold each epoch exactly once."""
    wrong = []
    for log in out.rglob("metrics.jsonl"):
        config = configuration(log.parent)
        corrupt = {"kind": "epoch", "epoch": "a corrupt line"}
        records = [parse_json(line) or corrupt for line in log.read_bytes().splitlines()]
        epochs = [record["epoch"] for record in records if record["kind"] == "epoch"]
        if epochs != list(range((config.pretrain if config.is_baseline else config).epochs)):
            wrong.append(f"{log}: epochs {epochs}")
    return wrong


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 200])
def test_killed_at_random_moments(server: Server, tmp_path: Path, count: int, note: Note) -> None:
    """R1, R19: the same command, repeated until it is not killed, ends like an undisturbed run."""
    ordinary = qbench(*LONG, f"out={tmp_path / 'ordinary'}")  # a process that the fork server did not start
    assert ordinary.returncode == 0, ordinary.stderr
    expected = finished(tmp_path / "ordinary")
    assert len(expected) == 2
    assert all(None not in hashes for hashes in expected.values())
    began = time.monotonic()
    assert run_alone(server, [*LONG, *VARIANTS[-1]], tmp_path / "alone") == expected
    duration = time.monotonic() - began

    kills = resumed = folder = 0
    while kills < count:
        draw, out, delays, status = random.Random(folder), tmp_path / f"killed{folder}", list[float](), -1
        variant = draw.randrange(len(VARIANTS))
        while status != 0:
            job = server.start([*LONG, *VARIANTS[variant]], out=out)
            if kills < count:
                delays.append(round(draw.uniform(0, duration), 3))
                time.sleep(delays[-1])
                job.kill()
            status = job.wait(SECONDS)
            case = f"random.Random({folder}), variant {variant}, killed after {delays} s: {job.stderr()}"
            assert status in (0, -signal.SIGKILL), case
            assert wrong_records(out) == [], case
            resumed += "continuing from state-" in job.stderr()
            kills += status != 0
        assert finished(out) == expected, case
        assert left_over(out) == wrong_logs(out) == [], case
        shutil.rmtree(out)
        folder += 1
    assert resumed, "no killed run had a checkpoint"
    note(f"R1, R19: {kills} kills at random moments, {folder} runs ended with H, {resumed} times from a checkpoint")


@pytest.mark.parametrize("count", tiers(1, None))
@pytest.mark.parametrize("kind", tiered(["kill_at", "half_at"], ["half_at"]))
@pytest.mark.parametrize("tensorboard", tiered(["true", "false"], ["true"]))
def test_killed_at_a_point(
    server: Server, tmp_path: Path, tensorboard: str, kind: str, count: int | None, note: Note
) -> None:
    """R2, R19: killed before every event, and in the middle of every write. QBENCH_POINT=n tests
    one point.
    """
    words = [*SHORT, f"runtime.tensorboard={tensorboard}"]
    job = server.start(words, out=tmp_path / "alone", count=tmp_path / "count")
    assert job.wait(SECONDS) == 0, job.stderr()
    expected = finished(tmp_path / "alone")
    every = json.loads((tmp_path / "count").read_text())["named"]
    names = [name for name in every if name.startswith("write ") == (kind == "half_at")]
    total = len(names)
    points = list(range(1, total + 1))
    if count:  # also the points with a result beside checkpoints
        last = {Path(name).parent: i for i, name in enumerate(names, 1) if name.startswith("remove ")}
        points = [*random.Random(f"{kind} {tensorboard}").sample(points, count), *last.values()]
    if chosen := os.environ.get("QBENCH_POINT"):
        points = [int(chosen)]
    beyond = announcements = 0
    for point in points:
        out, announced = tmp_path / f"point{point}", tmp_path / f"announced{point}"
        job = server.start(words, out=out, announce=announced, **{kind: point})
        status = job.wait(SECONDS)
        case = f"{kind}={point} of {total}, {names[point - 1]}; QBENCH_POINT={point} repeats it: {job.stderr()}"
        assert status == -signal.SIGKILL or (status == 0 and tensorboard == "true"), case
        beyond += status == 0  # TensorBoard's thread may join several records into one write
        assert wrong_records(out) == [], case
        newest = {run: newest_step(run) for run in faults.announced(announced) if not load_result(run)}
        for run, step in newest.items():
            announcements += 1
            assert step >= faults.announced(announced)[run], f"an announced checkpoint of {run.name} is lost: {case}"
        again = server.start(words, out=out)
        assert again.wait(SECONDS) == 0, f"{case}, then {again.stderr()}"
        assert all(f"continuing from state-{step}.pt" in again.stderr() for step in newest.values()), case
        assert finished(out) == expected, case
        assert wrong_records(out) == left_over(out) == wrong_logs(out) == [], case
        shutil.rmtree(out)
    assert beyond <= len(points) // 10
    note(
        f"R2, R19: {len(points) - beyond} of {total} points with {kind}, tensorboard={tensorboard}, resumed to H; "
        f"{announcements} announced saves found again"
    )


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint that verifies, -1 if there is none."""
    states = [checkpoint(file) for file in run.glob("state-*.pt")]
    return max((state["state"]["counters"][2] for state in states if state), default=-1)


def together(server: Server, lines: list[list[str]], out: Path) -> list[Job]:
    """Start commands at the same moment; return them when all have succeeded."""
    gate = out.with_name(f"{out.name}.gate")
    jobs = [server.start(line, out=out, hold=gate) for line in lines]
    wait_until(
        lambda: all(gate.with_name(f"{gate.name}.{job.pid}").exists() or job.status() for job in jobs), "began", jobs
    )
    gate.touch()
    statuses = [job.wait(SECONDS) for job in jobs]
    assert statuses == [0] * len(jobs), [job.stderr() for job in jobs]
    return jobs


def wait_until(condition: Callable[[], bool], what: str, jobs: list[Job]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, (what, [job.stderr() for job in jobs])
        time.sleep(0.01)


def trainings(jobs: list[Job], run: Path) -> int:
    """Return the number of processes that trained a run."""
    config = configuration(run)
    title = "float" if config.is_baseline else f"{config.method_name} {config.bits}"
    return sum(f"{title}  resnet8 on digits, seed {config.seed}: epoch " in job.stderr() for job in jobs)


def one(out: Path, pattern: str) -> Path:
    (path,) = (p for p in out.glob(f"*/{pattern}") if p.is_dir())
    return path


@pytest.mark.parametrize(("rounds", "count"), [long_tier(1, 3), long_tier(20, 16)])
def test_processes_that_need_the_same_untrained_baseline(
    server: Server, tmp_path: Path, rounds: int, count: int, note: Note
) -> None:
    """R9: different runs, then identical runs, from a float baseline that is not trained yet."""
    for seed in range(rounds):
        words = [*LINE, QUIET, LARGE_BATCHES, f"seed={seed}", "pretrain.epochs=2"]
        expected = run_alone(server, words, tmp_path / f"alone{seed}")
        lines = [[*words, f"optim.lr={1e-4 * (i + 2)}"] for i in range(count)]
        out = tmp_path / f"different{seed}"
        jobs = together(server, lines, out)
        baseline = one(out, "float-*")
        assert trainings(jobs, baseline) == 1, [job.stderr() for job in jobs]
        digests = finished(out)
        assert digests[baseline.name] == expected[baseline.name], f"seed {seed}"
        assert len(digests) == count + 1
        results = [load_result(path.parent) for path in out.glob("*/dorefa-*/result.json")]
        assert len({repr(result.baseline) for result in results if result}) == 1

        out = tmp_path / f"same{seed}"
        jobs = together(server, [words] * count, out)
        assert finished(out) == expected, f"seed {seed}"
        assert [trainings(jobs, one(out, f"{method}-*")) for method in ("float", "dorefa")] == [1, 1]
        assert len({job.stdout() for job in jobs}) == 1
        assert wrong_records(tmp_path) == wrong_logs(tmp_path) == []
    note(f"R9: {rounds} rounds of {count} different and {count} identical processes on one baseline, trained once")


@pytest.mark.full
@pytest.mark.parametrize("rounds", [1, 20])
def test_a_waiting_process_takes_over(server: Server, tmp_path: Path, rounds: int, note: Note) -> None:
    """R10: the process that trains the baseline is killed while four wait; one resumes from its
    checkpoint.
    """
    slowest = 0.0
    for seed in range(rounds):
        words = [*LINE, QUIET, LARGE_BATCHES, "pretrain.epochs=6", "runtime.checkpoint_seconds=0", f"seed={seed}"]
        expected = run_alone(server, words, tmp_path / f"alone{seed}")
        out, announced = tmp_path / f"killed{seed}", tmp_path / f"announced{seed}"
        leader = server.start([*words, "optim.lr=0.01"], out=out, announce=announced)
        least = random.Random(seed).randrange(1, 80)  # of 108 steps
        wait_until(lambda: max(faults.announced(announced).values(), default=0) >= least, "saved", [leader])  # noqa: B023
        leader.kill(signal.SIGSTOP)  # it holds the lock until it is killed, even if the others start slowly
        ((baseline, step),) = faults.announced(announced).items()
        jobs = [server.start([*words, f"optim.lr={1e-4 * (i + 1)}"], out=out) for i in range(4)]
        wait_until(lambda: all(f"working on {baseline}" in job.stderr() for job in jobs), "waiting", jobs)  # noqa: B023
        killed = time.monotonic()
        leader.kill()
        assert leader.wait(SECONDS) == -signal.SIGKILL
        assert [job.wait(SECONDS) for job in jobs] == [0] * 4, [job.stderr() for job in jobs]
        slowest = max(slowest, time.monotonic() - killed)
        logs = [job.stderr() for job in jobs]
        steps = [int(number) for log in logs for number in re.findall(r"continuing from state-(\d+)", log)]
        assert len(steps) == 1, logs
        assert steps[0] >= step, f"seed {seed}: resumed at step {steps} although {step} was saved"
        assert trainings(jobs, baseline) == 1, logs
        assert finished(out)[baseline.name] == expected[baseline.name], f"seed {seed}"
        assert len(finished(out)) == 5
        assert wrong_records(out) == wrong_logs(baseline) == []
    assert slowest < 15
    note(f"R10: {rounds} times the baseline's process was killed; four waiting processes ended within {slowest:.1f} s")


@pytest.mark.full
@pytest.mark.parametrize(("different", "same"), [(32, 16)])
def test_many_runs_at_once(server: Server, tmp_path: Path, different: int, same: int, note: Note) -> None:
    """R24: different runs do not disturb each other; of identical runs, one trains and the others
    wait.
    """
    lines = [[*LINE, QUIET, LARGE_BATCHES, f"seed={i // 4}", f"bits.w={1 + i % 4}"] for i in range(different)]
    for line in lines:
        expected = run_alone(server, line, tmp_path / "alone")
    out = tmp_path / "together"
    jobs = together(server, lines, out)
    assert finished(out) == expected
    runs_of = {method: list(out.glob(f"*/{method}-*/")) for method in ("dorefa", "float")}
    assert {method: len(paths) for method, paths in runs_of.items()} == {"dorefa": different, "float": different // 4}
    assert [trainings(jobs, run) for paths in runs_of.values() for run in paths] == [1] * (different * 5 // 4)

    words = [word for word in LONG if not word.startswith("epochs=")] + [QUIET, "epochs=8"]
    expected = run_alone(server, words, tmp_path / "alone-same")
    out = tmp_path / "same"
    jobs = together(server, [words] * same, out)
    assert finished(out) == expected
    assert [trainings(jobs, one(out, f"{method}-*")) for method in ("float", "dorefa")] == [1, 1]
    assert (
        sum(f"waiting: another process is working on {one(out, 'dorefa-*')}" in job.stderr() for job in jobs)
        == same - 1
    )
    assert wrong_records(tmp_path) == wrong_logs(tmp_path) == []
    note(f"R24: {different} different runs at once equal their solo runs; of {same} identical ones {same - 1} waited")


@pytest.mark.full
@pytest.mark.parametrize("count", [30])
def test_kills_of_all_processes_of_a_parallel_sweep(tmp_path: Path, count: int) -> None:
    """SIGKILL of the main process, a worker or a helper process of a joblib sweep, at random times.

    The same command, repeated, ends like an undisturbed sweep. It never reports a bug (status 1),
    and 10 s after the main process has ended, no process is left.
    """
    line = [word for word in LINE if not word.startswith("bits=")]
    words = ["-m", *line, QUIET, LARGE_BATCHES, "bits=w2a2,w3,w4", "seed=0,1", "epochs=4", "pretrain.epochs=2"]
    alone = qbench(*words, f"out={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    expected = finished(tmp_path / "alone")
    kills, folder, statuses, slowest = 0, 0, list[int](), 0.0
    draw = random.Random(0)
    while kills < count:
        out, status = tmp_path / f"killed{folder}", -1
        while status != 0:
            with open(tmp_path / "log", "wb") as log:
                job = subprocess.Popen(
                    [sys.executable, "-m", "qbench", *words, f"out={out}", "hydra/launcher=joblib"],
                    stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
                )  # fmt: skip
            while job.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    job.wait(draw.uniform(0, 8))
                alive = processes_of(job.pid)
                if job.poll() is None and kills < count and alive:
                    with suppress(ProcessLookupError):
                        os.kill(draw.choice(alive), signal.SIGKILL)
                        kills += 1
            ended, status = time.monotonic(), job.wait()
            while (left := processes_of(job.pid)) and time.monotonic() - ended < 10:
                time.sleep(0.05)
            slowest = max(slowest, time.monotonic() - ended)
            statuses.append(status)
            text = (tmp_path / "log").read_text()
            assert status in (0, 8, -signal.SIGKILL), (kills, status, text)
            assert not left, (kills, left, text)
        assert finished(out) == expected, (kills, text)
        assert wrong_records(out) == left_over(out) == wrong_logs(out) == [], (kills, text)
        shutil.rmtree(out)
        folder += 1
    counted(
        f"joblib: {kills} kills over all processes, {folder} sweeps ended with H, statuses "
        f"{ {s: statuses.count(s) for s in sorted(set(statuses))} }, all processes gone within {slowest:.1f} s"
    )
