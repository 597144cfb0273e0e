"""Sweeps by submitit: on a fake SLURM cluster and on this machine, with preemption and several processes a run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_slurm
import pytest
from conftest import ROOT, Configure
from helpers import finished_digests, plant

from qbench.config import compose
from qbench.errors import ConfigError
from qbench.experiment import cluster_jobs, submitted_jobs, submitted_run
from qbench.experiment.planned_run import planned_run
from qbench.system.signals import stop_on_signals

SMOKE = ["-m", "experiment=smoke", "runtime.tensorboard=false", "method=dorefa"]
SLOW = 600


def start(words: list[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qbench", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(environment),
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, log = process.communicate(timeout=SLOW)
    return process.returncode, log


def until(happened: Callable[[], object], seconds: float = SLOW) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def keys_of(*words: str, folder: Path) -> dict[str, Any]:
    return compose.launcher_keys(words, f"hydra.launcher.submitit_folder={folder}")


def test_the_presets_of_slurm(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of the batch file: one GPU for a run, or all GPUs of some nodes, with a process for each."""
    for key, value in fake_slurm.install(tmp_path / "bin").items():
        monkeypatch.setenv(key, value)
    one = planned_run(configure("method=dorefa"))
    settings = submitted_jobs.job_settings("slurm", keys_of("hydra/launcher=slurm_gpu", folder=tmp_path), [one])
    text = settings.executor(dependency="afterany:7_0")._executor._make_submission_file_text("true", "id")
    lines = {line.removeprefix("#SBATCH --") for line in text.splitlines()}
    assert {"nodes=1", "gpus-per-node=1", "ntasks-per-node=1", "cpus-per-task=8", "time=1440", "requeue"} <= lines
    assert {"signal=USR2@120", "dependency=afterany:7_0", "job-name=qbench", "open-mode=append"} <= lines
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in lines
    words = ["hydra/launcher=slurm_nodes", "hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=4"]
    eight = planned_run(configure("method=dorefa", "batch_shards=8"))
    settings = submitted_jobs.job_settings("slurm", keys_of(*words, folder=tmp_path), [eight])
    assert (settings.processes, settings.keys["tasks_per_node"], settings.timeouts) == (8, 4, 100)
    with pytest.raises(ConfigError, match="batch_shards=1 cannot be shared by 8 processes"):
        submitted_jobs.job_settings("slurm", keys_of(*words, folder=tmp_path), [eight, one])


@pytest.mark.parametrize(
    ("word", "message"),
    [("hydra.launcher.nodez=3", "Key 'nodez'"), ("hydra.launcher.nodes=many", "'many' of type 'str'")],
)
def test_a_wrong_key_of_the_launcher_is_refused(word: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        keys_of("hydra/launcher=slurm_gpu", word, folder=tmp_path)
    assert "allowed keys: hydra.launcher.submitit_folder, timeout_min," in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


def test_a_machine_without_slurm_is_refused(configure: Configure, tmp_path: Path) -> None:
    settings = submitted_jobs.job_settings(
        "slurm", keys_of("hydra/launcher=slurm_gpu", folder=tmp_path), [planned_run(configure("method=dorefa"))]
    )
    with pytest.raises(ConfigError, match="srun"):
        settings.executor()


def test_several_gpus_for_a_run_are_several_processes(configure: Configure, tmp_path: Path) -> None:
    runs = [planned_run(configure("method=dorefa", "runtime.gpus_per_run=2", "batch_shards=2"))]
    keys = keys_of("hydra/launcher=submitit_local", folder=tmp_path)
    assert submitted_jobs.job_settings("local", keys, runs).processes == 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("cluster", ["slurm", "local"])
@pytest.mark.parametrize("number", [0, signal.SIGTERM, signal.SIGUSR2])
def test_how_a_stopped_job_ends(rank: int, cluster: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitit handles the signal after the checkpoint. Then process 0 ends with 75, the others quietly with 0.

    A job that ends by itself after SIGTERM would not be queued again, so process 0 waits for SLURM.
    """
    events: list[object] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: events.append("wait"))
    job = SimpleNamespace(global_rank=rank, cluster=cluster)
    with pytest.raises(SystemExit) as raised:
        submitted_run._leave(job, number, lambda *given: events.append(given[0]))
    assert raised.value.code == (0 if rank else 75)
    waits = number == signal.SIGTERM and cluster == "slurm" and not rank
    assert events == [*([number] if number else []), *(["wait"] if waits else [])]


@pytest.mark.parametrize("kinds", [(signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGTERM)])
def test_a_warning_of_slurm_outranks_sigterm(kinds: tuple[signal.Signals, ...]) -> None:
    """SLURM may send both at a preemption. Only the warning queues the job again."""
    with stop_on_signals() as stop:
        for kind in kinds:
            os.kill(os.getpid(), kind)
        assert stop() == signal.SIGUSR2


def test_a_run_continues_when_submitit_begins_it_again(configure: Configure) -> None:
    planned = planned_run(configure("method=dorefa"))
    again = submitted_run.SubmittedRun(waits=True, gpus=("3",)).checkpoint(planned)
    assert (again.function, again.args) == (submitted_run.SubmittedRun(waits=True, gpus=("3",)), (planned,))


def test_a_missing_baseline_has_a_job(configure: Configure) -> None:
    config = configure("method=dorefa", "pretrain.epochs=1")
    baseline = cluster_jobs._missing_baseline(planned_run(config))
    assert baseline is not None
    assert baseline.config.is_baseline
    plant(baseline.config, 90.0)
    assert cluster_jobs._missing_baseline(planned_run(config)) is None
    assert cluster_jobs._missing_baseline(planned_run(configure("method=dorefa", "init=scratch"))) is None


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Return the digests of a sweep in one process."""
    folder = tmp_path_factory.mktemp("alone")
    status, log = finish(start([*SMOKE, *FOUR, "out=o"], {}, folder))
    assert status == 0, log
    return finished_digests(folder / "o")


FOUR = ["bits=w2,w2a2g6", "seed=0,1", "epochs=3", "runtime.checkpoint_seconds=0"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the folder of a fake cluster and its environment. End its processes afterwards."""
    environment = fake_slurm.install(tmp_path / "bin")
    yield tmp_path / "bin", environment
    for job in fake_slurm.jobs(tmp_path / "bin").values():
        for pid in fake_slurm.read(job / "pids").split():
            if fake_slurm.read(job / "state") == "RUNNING":
                os.kill(int(pid), signal.SIGKILL)


@pytest.mark.full
def test_preempted_jobs_end_in_the_same_bits(
    cluster: tuple[Path, dict[str, str]], tmp_path: Path, alone: dict[str, str | None]
) -> None:
    """Each job is preempted once by SIGUSR2 after a checkpoint, and some first get the SIGTERM that SLURM sends."""
    folder, environment = cluster
    process = start([*SMOKE, *FOUR, "out=o", "hydra/launcher=slurm_gpu"], environment, tmp_path)
    preempted: set[str] = set()
    while process.poll() is None:
        for number, (name, job) in enumerate(fake_slurm.jobs(folder).items()):
            trains = "step " in fake_slurm.read(tmp_path / "o" / ".submitit" / f"{name}_0_log.err")
            if trains and name not in preempted and fake_slurm.read(job / "state") == "RUNNING":
                preempted.add(name)
                for kind in (signal.SIGTERM, signal.SIGUSR2)[number % 2 :]:
                    fake_slurm.signal_job(job, kind)
        time.sleep(0.05)
    status, log = finish(process)
    assert status == 0, log
    turns = {name: int(fake_slurm.read(job / "turns")) for name, job in fake_slurm.jobs(folder).items()}
    assert len(turns) == 6, "a job for each baseline and each run"
    assert sum(turns.values()) >= 9, turns
    assert finished_digests(tmp_path / "o") == alone
    patience = time.monotonic() + 30  # the last job may still be exiting when the sweep has its result
    while time.monotonic() < patience and states(folder) != {"COMPLETED"}:
        time.sleep(0.05)
    assert states(folder) == {"COMPLETED"}


def states(folder: Path) -> set[str]:
    return {fake_slurm.read(job / "state") for job in fake_slurm.jobs(folder).values()}


@pytest.mark.full
def test_jobs_in_the_queue_are_taken_over(
    cluster: tuple[Path, dict[str, str]], tmp_path: Path, alone: dict[str, str | None]
) -> None:
    """A signal ends the command, not its jobs. The same command then waits for the same jobs."""
    folder, environment = cluster
    words = [*SMOKE, *FOUR, "out=o", "hydra/launcher=slurm_gpu"]
    process = start(words, environment, tmp_path)
    until(lambda: list((tmp_path / "o").glob("*/*/state-*.pt")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    status, log = finish(process)
    assert status == 75, log
    assert "to end them, type: scancel " in log
    before = set(fake_slurm.jobs(folder))
    status, log = finish(start(words, environment, tmp_path))
    assert status == 0, log
    assert set(fake_slurm.jobs(folder)) == before, "no job is submitted twice"
    assert finished_digests(tmp_path / "o") == alone


@pytest.mark.full
def test_a_killed_job_is_submitted_once_more_and_a_cancelled_one_is_not(
    cluster: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, environment = cluster
    words = [*SMOKE, "bits=w2,w3", "init=scratch", "epochs=200", "out=o", "hydra/launcher=slurm_gpu"]
    process = start(words, environment, tmp_path)
    until(lambda: len(list((tmp_path / "o").glob("*/*/state-*.pt"))) or process.poll() is not None)
    (one, other) = fake_slurm.jobs(folder).values()
    fake_slurm.signal_job(one, signal.SIGKILL)
    subprocess.run([folder / "scancel", other.name], check=True, env=os.environ | environment)
    until(lambda: len(fake_slurm.jobs(folder)) == 3 or process.poll() is not None)
    until(lambda: fake_slurm.read(other / "state").startswith("CANCELLED"))
    until(lambda: [job for job in fake_slurm.jobs(folder).values() if fake_slurm.read(job / "pids")])
    (third,) = set(fake_slurm.jobs(folder)) - {one.name, other.name}
    until(lambda: fake_slurm.read(folder / "state" / third / "pids"))
    subprocess.run([folder / "scancel", third], check=True, env=os.environ | environment)
    status, log = finish(process)
    assert status == 8, log
    assert log.count("has ended early") == 3, log
    assert len(fake_slurm.jobs(folder)) == 3


TWO = ["bits=w2a2g6", "seed=0", "epochs=3", "runtime.checkpoint_seconds=0", "batch_shards=2"]


@pytest.mark.full
def test_two_processes_of_a_run_on_a_cluster_and_on_this_machine(
    cluster: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """Both end in the bits of one process, also if the run is preempted."""
    folder, environment = cluster
    status, log = finish(start([*SMOKE, *TWO, "out=one"], {}, tmp_path))
    assert status == 0, log
    expected = finished_digests(tmp_path / "one")
    words = ["hydra/launcher=slurm_nodes", "hydra.launcher.nodes=1", "hydra.launcher.gpus_per_node=2"]
    process = start([*SMOKE, *TWO, "out=cluster", *words], environment, tmp_path)
    until(lambda: list((tmp_path / "cluster").glob("*/dorefa*/state-*.pt")) or process.poll() is not None)
    for job in fake_slurm.jobs(folder).values():
        if fake_slurm.read(job / "state") == "RUNNING":
            fake_slurm.signal_job(job, signal.SIGUSR2)
    status, log = finish(process)
    assert status == 0, log
    assert finished_digests(tmp_path / "cluster") == expected
    assert max(int(fake_slurm.read(job / "turns")) for job in fake_slurm.jobs(folder).values()) == 2
    words = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    status, log = finish(start([*SMOKE, *TWO, "out=local", *words], {}, tmp_path))
    assert status == 0, log
    assert finished_digests(tmp_path / "local") == expected
