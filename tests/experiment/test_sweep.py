"""Sweeps: what stops them, what does not, launchers, and completion by the same command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from conftest import ROOT, Configure, tiered
from helpers import processes_of, qbench, results, semaphores

from qbench.config import groups
from qbench.experiment import run_queue, workers
from qbench.experiment.planned_run import planned_run

SMOKE = ["-m", "experiment=smoke", "runtime.tensorboard=false"]
LARGE_BATCHES = ["optim.batch_size=256", "pretrain.optim.batch_size=256"]  # few steps
SABOTAGE = """
import dataclasses, os, sys
from qbench.errors import DataError
from qbench.methods import dorefa

def data(*, val: float = 0.1):
    raise DataError("planted: no such file")

def build(*, w: int = 2, a: int = 32, g: int = 32, how: str = "not"):
    if how == "check" and not os.path.exists("checked"):
        open("checked", "w").close()
        os.kill(os.getpid(), 9)
    def step(model, optimizer):
        if how == "raise":
            raise KeyError("planted")
        if how == "exit":
            sys.exit(3)
        if how == "memory":
            raise MemoryError
        if how == "spoil":
            for p in model.parameters():
                p.data.fill_(float("nan"))
        if how == "kill" and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), 9)
        if how == "die":
            os.kill(os.getpid(), 9)
        if how == "data":
            raise DataError("planted: a file is damaged")
        optimizer.step()
    return dataclasses.replace(dorefa.build(w=w, a=a, g=g), name="mine", step=step)
"""


def digests(out: Path) -> dict[str, object]:
    return {name: r["weights_sha256"] for name, r in results(out).items() if r["status"] == "done"}


def test_a_malformed_value_stops_before_the_first_run(tmp_path: Path) -> None:
    for word in ("bits.w=2,two", "model.width=4,0", "seed=0,-1", "layers.downsample=same,8", "method=dorefa,dorfa"):
        method = [] if word.startswith("method") else ["method=dorefa"]
        done = qbench(*SMOKE, *method, word, "out=o", cwd=tmp_path)
        assert done.returncode == 2, (word, done)
        assert word.partition("=")[0] in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 3, done.stderr
        assert not list(tmp_path.iterdir()), word


@pytest.mark.parametrize("widths", tiered(["2", "2,4"], ["2"]))
def test_a_failing_run_does_not_stop_the_others(tmp_path: Path, widths: str) -> None:
    (tmp_path / "mine.py").write_text(SABOTAGE)
    hows, count = "method.how=raise,not,exit,memory,spoil", len(widths.split(","))
    words = [*SMOKE, *LARGE_BATCHES, "method=mine:build", hows, f"bits.w={widths}", "epochs=2", "out=o"]
    done = qbench(*words, cwd=tmp_path)
    assert done.returncode == 8, done.stderr
    found = list((tmp_path / "o").rglob("mine*/result.json"))
    assert len(found) == 5 * count
    stored = [json.loads(path.read_text()) for path in found]
    by_how = {
        how: {r["status"] for r in stored if r["options"]["how"] == how} for how in ("raise", "exit", "spoil", "not")
    }
    assert by_how == {"raise": {"failed"}, "exit": {"failed"}, "spoil": {"diverged"}, "not": {"done"}}
    assert len(re.findall(r"^failed  ", done.stdout, re.MULTILINE)) == 3 * count
    assert done.stdout.count("diverged") == count
    for reason in ("KeyError: 'planted'", "SystemExit: 3", "MemoryError", "inf or nan"):
        assert reason in done.stdout, reason
    solo = qbench(*words[1:5], "method=mine:build", "bits.w=2", "epochs=2", "out=solo", cwd=tmp_path)
    assert solo.returncode == 0
    (alone,) = (digest for name, digest in digests(tmp_path / "solo").items() if name.startswith("mine"))
    assert alone in [r["weights_sha256"] for r in stored]
    before = {path: path.stat().st_mtime_ns for path in found}
    again = qbench(*words, cwd=tmp_path)
    assert again.returncode == 8
    changed = {json.loads(p.read_text())["options"]["how"] for p in found if p.stat().st_mtime_ns != before[p]}
    assert changed == {"raise", "exit", "memory", "spoil"}, "finished runs are not run again, failed ones are"


@pytest.mark.parametrize("launcher", tiered(["joblib", "submitit_local"], ["joblib"]))
@pytest.mark.parametrize("seeds", tiered(["0", "0,1"], ["0"]))
def test_launchers_agree_bit_for_bit_with_a_sequential_sweep(launcher: str, seeds: str, tmp_path: Path) -> None:
    words = [*SMOKE, *LARGE_BATCHES, "method=dorefa", "bits=w2,w2a2g4", f"seed={seeds}"]
    count = len(seeds.split(","))
    alone = qbench(*words, "out=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert len(digests(tmp_path / "alone")) == 3 * count
    parallel = qbench(*words, f"out={launcher}", f"hydra/launcher={launcher}", cwd=tmp_path)
    assert parallel.returncode == 0, parallel.stderr
    started = rf"{launcher}: starting worker processes for {2 * count} runs \.\.\.\n"
    assert re.match(started, parallel.stderr), parallel.stderr
    assert digests(tmp_path / launcher) == digests(tmp_path / "alone")
    assert parallel.stdout.replace(launcher, "alone") == alone.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"alone", launcher}


def test_workers_times_threads_never_exceed_the_cores(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 8)
    for typed, threads, expected in (("", 1, 8), ("", 3, 2), ("99", 2, 4), ("3", 2, 3), ("-1", 1, 8), ("", 99, 1)):
        runs = [planned_run(configure(f"runtime.threads={threads}"))]
        assert workers.worker_count(runs, [typed]) == expected, (typed, threads)
        assert workers.worker_count(runs, [typed], processes=2) == max(1, min(expected, 8 // (2 * threads)))


def test_runs_at_a_time_fit_on_the_gpus(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 64)
    for per_run, expected in (("1", 4), ("2", 2), ("3", 1), ("0.5", 8), ("0.25", 16), ("8", 1)):
        runs = [planned_run(configure(f"runtime.gpus_per_run={per_run}"))]
        assert workers.worker_count(runs, gpus=["0", "1", "2", "3"]) == expected, per_run
        assert workers.worker_count(runs, ["2"], gpus=["0", "1", "2", "3"]) == min(2, expected)


def test_the_first_runs_need_different_baselines() -> None:
    from qbench.config import compose
    from qbench.experiment.planned_run import planned_runs

    words = ["-m", "method=dorefa,ttq", "bits.w=2", "seed=0,1,2", "optim.lr=1e-3,1e-4"]
    runs = planned_runs(compose.configurations(words))
    ordered = run_queue.baselines_first(runs)
    assert [run.identity.seed for run in ordered[:3]] == [0, 1, 2]
    assert [run.identity.method for run in ordered] == ["dorefa"] * 6 + ["ttq"] * 6
    assert sorted(map(repr, ordered)) == sorted(map(repr, runs))


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_twelve_runs_with_five_sabotaged(tmp_path: Path, launcher: str) -> None:
    """R18: with joblib, one worker is killed too."""
    (tmp_path / "mine.py").write_text(SABOTAGE)
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    good = ["a", "b", "c", "d", "e", "f", "kill" if launcher == "joblib" else "g"]
    bad = ["raise", "exit", "spoil", "memory", "data"]
    hows = [how for pair in zip(good, bad, strict=False) for how in pair] + good[len(bad) :]
    one = [word for word in SMOKE if word != "-m"] + ["method=mine:build", "bits.w=2"]
    words = ["-m", *one, f"method.how={','.join(hows)}", "out=o", f"hydra/launcher={launcher}"]
    done = qbench(*words, cwd=tmp_path, **environment)
    assert done.returncode == 8, done.stderr
    assert (done.stdout.count("mine:build how="), done.stdout.count("/mine.build-")) == (7, 5), done.stdout
    paths = {json.loads(p.read_text())["options"]["how"]: p for p in (tmp_path / "o").rglob("mine*/result.json")}
    stored = {how: json.loads(path.read_text()) for how, path in paths.items()}
    assert {how: r["status"] for how, r in stored.items()} == {
        **dict.fromkeys(good, "done"), **dict.fromkeys(bad, "failed"), "spoil": "diverged",
    }  # fmt: skip
    alone = qbench(*one, "method.how=a", "out=alone", cwd=tmp_path, **environment)
    assert alone.returncode == 0, alone.stderr
    (solo,) = (json.loads(path.read_text()) for path in (tmp_path / "alone").rglob("mine*/result.json"))
    assert {stored[how]["state_sha256"] for how in good} == {solo["state_sha256"]}
    before = {how: path.stat().st_mtime_ns for how, path in paths.items()}
    assert qbench(*words, cwd=tmp_path, **environment).returncode == 8
    assert {how for how, path in paths.items() if path.stat().st_mtime_ns != before[how]} == set(bad)


def test_data_that_one_run_lacks_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SABOTAGE)
    done = qbench(*SMOKE, "method=dorefa", "bits.w=2", "dataset=mine:data,digits", "out=o", cwd=tmp_path)
    assert done.returncode == 8, done.stderr
    assert "planted: no such file" in done.stdout
    assert [r["status"] for r in results(tmp_path / "o").values() if r["method"] == "dorefa"] == ["done"]


@pytest.mark.full
def test_a_killed_worker_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SABOTAGE)
    words = [*SMOKE, "method=mine:build", "method.how=not,kill,die", "out=o", "hydra/launcher=joblib"]
    done = qbench(*words, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 8, done.stderr
    assert (tmp_path / "killed").exists()
    assert "a worker was killed" in done.stderr
    runs = [json.loads(path.read_text()) for path in (tmp_path / "o").rglob("mine*/result.json")]
    stored = {r["options"]["how"]: r["weights_sha256"] for r in runs}
    assert stored.keys() == {"not", "kill"}, "a run that kills every process has no result"
    assert stored["kill"] == stored["not"] is not None
    assert done.stdout.count("unfinished") == 1


@pytest.mark.full
def test_a_worker_killed_while_the_sweep_is_checked_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SABOTAGE)
    words = [*SMOKE, "method=mine:build", "method.how=check", "seed=0,1", "out=o", "hydra/launcher=joblib"]
    done = qbench(*words, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    assert "the process that checks the runs was killed" in done.stderr
    assert len(digests(tmp_path / "o")) == 4


LONG = pytest.mark.full
ENDLESS = [*SMOKE, "method=dorefa", "bits=w2,w3,w4,w5", "init=scratch", "epochs=500", "hydra/launcher=joblib"]
"""A sweep in worker processes, whose runs begin at once and last until they are stopped."""


@pytest.mark.parametrize(
    "kinds",
    [
        ["SIGKILL"],
        pytest.param(["SIGHUP"], marks=LONG),
        pytest.param(["SIGINT", "SIGINT"], marks=LONG),
        pytest.param(["SIGTERM", "SIGKILL"], marks=LONG),
    ],
)
def test_workers_end_with_the_main_process(tmp_path: Path, kinds: list[str]) -> None:
    words = [*ENDLESS, f"out={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qbench", *words], stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(list(tmp_path.rglob("dorefa*/metrics.jsonl"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    assert len(processes_of(process.pid)) > 2
    for kind in kinds:
        process.send_signal(signal.Signals[kind])
        time.sleep(0.1)
    sent = time.monotonic()
    assert process.wait(timeout=10) in (75, -signal.SIGKILL)
    while processes_of(process.pid) and time.monotonic() - sent < 10:
        time.sleep(0.05)
    assert not processes_of(process.pid)
    assert not semaphores(process.pid)


def has_processes(group: int) -> bool:
    """Whether a process of a group is left, even one that has ended and whose status nobody has read."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.full
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_parallel_processes_stop_and_continue(tmp_path: Path, kind: signal.Signals) -> None:
    words = [*ENDLESS, f"out={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qbench", *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(list(tmp_path.rglob("dorefa*/state*"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, kind) if kind == signal.SIGINT else process.send_signal(kind)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 75, message
    assert "Traceback" not in message
    ended = time.monotonic()
    while has_processes(process.pid) and time.monotonic() - ended < 2:
        time.sleep(0.05)
    assert not has_processes(process.pid)
    begun = list(tmp_path.rglob("dorefa*/config.yaml"))
    assert 1 <= len(begun) <= 2
    assert not list(tmp_path.rglob("dorefa*/result.json"))


def test_an_interrupted_sweep_continues(tmp_path: Path) -> None:
    words = [*SMOKE, "method=dorefa", "bits=w2,w3,w4", "epochs=3", f"out={tmp_path}"]
    with faults.server() as server:
        job = server.start(words)
        while len(list(tmp_path.rglob("dorefa*/result.json"))) < 1 and job.status() is None:
            time.sleep(0.01)
        job.kill(signal.SIGTERM)
        assert job.wait(60) == 75, job.stderr()
        assert "to continue, repeat the command" in job.stderr()
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert 1 <= len(finished) < 4
    assert qbench(*words).returncode == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    assert len(results(tmp_path)) == 4


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("d*", {"float", "dorefa", "dq"}), pytest.param("*", {*groups.option_names("method")}, marks=pytest.mark.full)],
)
def test_methods_by_glob(tmp_path: Path, pattern: str, names: set[str]) -> None:
    done = qbench(*SMOKE, f"method=glob({pattern})", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert {r["method"] for r in results(tmp_path).values()} == names


@pytest.mark.parametrize("seeds", tiered(["0", "0,1"], ["0"]))
def test_plan_names_every_run_and_trains_nothing(tmp_path: Path, seeds: str) -> None:
    words = ["-m", "experiment=smoke", "method=dorefa", "bits.w=2,17", f"seed={seeds}", f"out={tmp_path / 'o'}"]
    count = len(seeds.split(","))
    planned = qbench("plan", *words)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("float-w32a32g32") == count
    assert planned.stdout.count("new ") == 2 * count
    assert planned.stdout.count("unsupported: dorefa does not support bits.w=17") == count
    assert "not included" in planned.stdout
    assert not (tmp_path / "o").exists()
    assert qbench(*words).returncode == 0
    assert qbench("plan", *words).stdout.count("stored") == 2 * count
    listed = qbench("list", "runs", str(tmp_path / "o"))
    assert listed.stdout.count("done") == 2 * count
    assert listed.stdout.count("unsupported") == count


def test_a_launcher_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for words in ((*SMOKE, "hydra/launcher=jobib"), ("hydra/launcher=joblib",)):
        done = qbench(*words, "method=dorefa", f"out={tmp_path}")
        assert done.returncode == 2, done
        assert "hydra/launcher" in done.stderr
        assert not list(tmp_path.iterdir())
