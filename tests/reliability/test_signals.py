"""SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 at any moment: status 75, a checkpoint that verifies, no process left
(R16).
"""

import multiprocessing
import os
import pkgutil
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faults
import pytest
from conftest import ROOT, Configure, counted, long_tier, tiered
from filelock import FileLock
from helpers import finished_digests

from qbench.config.schema import baseline_config
from qbench.experiment.planned_run import planned_run
from qbench.system.caches import clear_caches
from qbench.training.checkpoint import unpack

WORDS = [
    "experiment=smoke",
    "method=dorefa",
    "bits=w2a2g4",
    "epochs=4",
    "pretrain.epochs=3",
    "optim.batch_size=192",
    "pretrain.optim.batch_size=192",
    "runtime.checkpoint_seconds=0",
]
KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SOON = 10.0  # seconds


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, str | None]]:
    """Return the seconds that the run takes, and the digests that it ends with."""
    out = tmp_path_factory.mktemp("undisturbed")
    with faults.server() as server:
        assert server.start(["--version"]).wait(120) == 0  # the server is running now
        began = time.monotonic()
        alone = server.start([*WORDS, f"out={out}"])
        assert alone.wait(60) == 0, alone.stderr()
        return time.monotonic() - began, finished_digests(out)


@pytest.mark.parametrize(("seed", "count"), [(3, 1), long_tier(3, 3), long_tier(100, 100)])
def test_a_signal_at_any_moment(
    tmp_path: Path, seed: int, count: int, undisturbed: tuple[float, dict[str, str | None]]
) -> None:
    with faults.server() as server:
        (took, expected), stopped, draw = undisturbed, 0, random.Random(seed)
        for i in range(count):
            out, kind, after = tmp_path / f"run{i}", KINDS[i % 4], draw.uniform(0.05, 0.9 * took)
            replay = f"seed {seed}, number {i}: {kind.name} after {after:.3f} s"
            job = server.start([*WORDS, f"out={out}"])
            time.sleep(after)
            job.kill(kind)
            sent = time.monotonic()
            status = job.wait(60)
            assert time.monotonic() - sent < SOON, replay
            assert status in (75, 0), (replay, status, job.stderr())
            if status == 75:
                stopped += 1
                assert "Traceback" not in job.stderr(), replay
                for path in out.rglob("state-*.pt"):
                    assert unpack(path.read_bytes(), replay)["identity"]
                assert not list(out.rglob(".*.tmp")), replay
            again = server.start([*WORDS, f"out={out}"])
            assert again.wait(60) == 0, (replay, again.stderr())
            assert finished_digests(out) == expected, replay
        assert stopped >= max(1, count // 3)
    if count == 100:
        counted(f"R16: {count} signals at random moments, {stopped} ended with 75, others had finished; equal ends")


@pytest.mark.parametrize("kind", tiered(KINDS, [signal.SIGINT, signal.SIGUSR2]))
def test_a_signal_while_waiting_for_another_process(configure: Configure, tmp_path: Path, kind: signal.Signals) -> None:
    config = configure(*WORDS)
    waited = planned_run(baseline_config(config)).path
    waited.mkdir(parents=True)
    with faults.server() as server, FileLock(waited / ".lock"):
        job = server.start([*WORDS, f"out={tmp_path}"])
        deadline = time.monotonic() + 30
        log = job.folder / "stderr"
        while not (log.exists() and "waiting" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "another process is working on" in job.stderr()
        job.kill(kind)
        assert job.wait(SOON) == 75, job.stderr()
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.full)])
def test_a_second_interrupt_ends_at_once_without_damage(
    tmp_path: Path, count: int, undisturbed: tuple[float, dict[str, str | None]]
) -> None:
    with faults.server() as server:
        for i in range(count):
            out = tmp_path / f"run{i}"
            job = server.start([*WORDS, f"out={out}"])
            time.sleep(0.15 + 0.1 * i)
            job.kill(signal.SIGINT)
            job.kill(signal.SIGINT)
            assert job.wait(SOON) in (75, 0), job.stderr()
            again = server.start([*WORDS, f"out={out}"])
            assert again.wait(60) == 0, again.stderr()
            assert finished_digests(out) == undisturbed[1], i


SLOW = {
    "a step": ("qbench.training.loop.gradient_norm", 3.0),
    "a save": ("qbench.runs.directory.RunDirectory.save_state", 60.0),
    "reading the data": ("qbench.data.digits.read", 60.0),
    "the initial weights": ("qbench.experiment.run._initial_model", 60.0),
    "validation": ("qbench.training.loop.evaluate", 60.0),
    "the final check": ("qbench.experiment.final_result.verify", 60.0),
}


@pytest.mark.parametrize("slow", tiered(SLOW, ["a save"]))
def test_a_signal_while_something_takes_long(tmp_path: Path, slow: str) -> None:
    """The process ends within the time limit, and a step that has begun is finished and saved."""
    from qbench.cli.main import main
    from qbench.system import signals

    name, seconds = SLOW[slow]
    where, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(where)
    began = tmp_path / "began"
    words = [word for word in WORDS if not word.startswith(("method=", "bits=", "pretrain.epochs="))]
    words += ["method=float", "bits=w32a32g32", "pretrain.epochs=1", f"out={tmp_path}"]
    original = getattr(owner, attribute)

    def sleeping(*arguments: Any, **options: Any) -> Any:
        begins, first = time.monotonic(), not began.exists()
        began.touch()
        while first and time.monotonic() - begins < seconds:
            time.sleep(0.1)
        return original(*arguments, **options)

    def child() -> None:
        setattr(owner, attribute, sleeping)
        signals.GRACE_SECONDS = 1.0
        clear_caches()
        os._exit(main(words))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert process.pid
    while not began.exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    sent = time.monotonic()
    process.join(30)
    assert process.exitcode == 75
    assert time.monotonic() - sent < 1 + 5 + (seconds if slow == "a step" else 0)
    if slow == "a step":
        assert [path.name for path in tmp_path.rglob("state-*.pt")] == ["state-1.pt"]


def test_a_signal_while_saving_ends_before_the_next_step(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    from qbench.errors import Interrupted
    from qbench.experiment.context import RunContext
    from qbench.experiment.run import run
    from qbench.runs.directory import RunDirectory
    from qbench.runs.progress import ProgressReporter

    config = configure(*WORDS, "method=float", "bits=w32a32g32")
    original, signals = RunDirectory.save_state, []

    def save_state(self: RunDirectory, step: int, data: bytes) -> None:
        original(self, step, data)
        signals.append(signal.SIGTERM)

    monkeypatch.setattr(RunDirectory, "save_state", save_state)
    with pytest.raises(Interrupted):
        run(planned_run(config), RunContext(ProgressReporter(quiet=True), lambda: signals[0] if signals else 0))
    assert [path.name for path in planned_run(config).directory.checkpoints()] == ["state-1.pt"]
    assert len(signals) == 1, "saved once"


def test_a_signal_during_evaluation_keeps_the_epoch(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    from qbench.data.loader import Loader
    from qbench.errors import Interrupted
    from qbench.experiment.context import RunContext
    from qbench.experiment.run import run
    from qbench.runs.progress import ProgressReporter

    config = configure(*WORDS, "method=float", "bits=w32a32g32", "runtime.checkpoint_seconds=1e9")
    original, signals = Loader.unaugmented, []

    def slow(self: Loader, name: str, limit: int | None = None, size: int = 500) -> Any:
        for number, batch in enumerate(original(self, name, limit, 20)):
            if name == "val" and number == 1 and not signals:
                signals.append(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Loader, "unaugmented", slow)
    with pytest.raises(Interrupted):
        run(
            planned_run(config),
            RunContext(ProgressReporter(quiet=True), lambda: int(signals[0]) if signals == [signal.SIGTERM] else 0),
        )
    directory = planned_run(config).directory
    (newest, *_) = directory.checkpoints()
    assert newest.name == "state-6.pt", "the whole first epoch, although its validation had only begun"
    signals.append(signal.SIGTERM)
    assert run(planned_run(config), RunContext(ProgressReporter(quiet=True))).status == "done"


def test_a_signal_while_the_process_exits_does_not_replace_its_status() -> None:
    """Python restores the default actions of signals while it exits; the status of a finished command must survive."""
    code = (
        "import atexit, os, signal, sys\n"
        "from qbench.cli.main import main\n"
        "class Late:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "sys.late = Late()\n"
        "sys.argv = ['qbench', '--version']\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
