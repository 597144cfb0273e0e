"""Run commands that are killed or fail at a chosen point; a fork server makes them start quickly.

    with faults.server() as server:
        job = server.start(["experiment=smoke", "method=dorefa"], out=folder, kill_at=7)
        assert job.wait(60) == -signal.SIGKILL

The fork server is `python tests/reliability/faults.py`. It imports everything that a run needs
once, and forks a child for each command. A command therefore starts within milliseconds, and 200
kills take minutes. The child calls `qbench.cli.main.main(words)`, with the real exit status, stdout
and stderr.

A fault happens at a point, which is an event or a write. An event opens a file for writing, or renames, removes,
truncates or syncs a path, or makes a directory, below the run's `out`. A write writes bytes to a file below `out`.
Faults are keywords of `Server.start`:
    kill_at=n       SIGKILL to itself just before event number n, from 1
    half_at=n       SIGKILL to itself in write number n, after half of the bytes
    fail_at=n       point number n, events and writes counted together, raises OSError(errno) with the
                    path; errno="ENOSPC" (default EIO); with persistent=True all later points do too
    file_limit=n    no file may grow beyond n bytes (RLIMIT_FSIZE)
    count=path      at the end write {"events": ..., "writes": ..., "points": both, "named": each} to a file
    announce=path   append "STEP RUN" to a file whenever `save_state` has returned: an announced checkpoint
    at_step=n       in step number n, from 1: do what `step_fault` says
    step_fault=what raise (ValueError), data (DataError), nan (in the images), drift (one weight changes), kill, or
                    USR2 and others: the signal of this name to itself
    hold=path       after composing the configuration, create the file PATH.PID and wait for PATH, so that
                    many commands begin at the same moment
`environment` adds environment variables, for a command that is one of several processes of a run.
"""

import errno as errno_codes
import functools
import io
import itertools
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
START_SECONDS = 120.0  # limit for the imports
POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Job:
    """A command that runs in its own process; its output is in files of its folder."""

    pid: int
    folder: Path

    def status(self) -> int | None:
        """Return the exit status, or minus the signal that ended it; None while it runs."""
        file = self.folder / "status"
        return int(file.read_text()) if file.exists() else None

    def kill(self, kind: int = signal.SIGKILL) -> None:
        if self.status() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, kind)

    def wait(self, timeout: float = 120) -> int:
        """Wait for the end of the command and return its status; after `timeout` seconds, kill it.

        Raises:
            TimeoutError: the command took longer.
        """
        end = time.monotonic() + timeout
        while (status := self.status()) is None:
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
                raise TimeoutError(f"no end after {timeout} s; stderr: {self.stderr()}")
            time.sleep(POLL_SECONDS)
        return status

    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")


class Server:
    """The fork server, as the tests use it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qbench-faults-"))
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, self.folder],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, cwd=ROOT,
                start_new_session=True, env=os.environ | THREADS | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
            )  # fmt: skip
        self._number = itertools.count()
        self._read_answer(START_SECONDS)

    def start(
        self, words: Sequence[str], out: Path | str | None = None, cwd: Path | str = ROOT,
        environment: Mapping[str, str] | None = None, **fault: Any,
    ) -> Job:  # fmt: skip
        """Start a command with the given words, working directory and fault. `out` is added as a word if given."""
        words = [*words, *([f"out={out}"] if out else [])]
        folder = self.folder / str(next(self._number))
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        request = {"words": words, "folder": str(folder), "cwd": str(cwd), "fault": fault}
        request["environment"] = dict(environment or {})
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        return Job(self._read_answer(START_SECONDS)["pid"], folder)

    def close(self) -> None:
        """End the server.

        It kills its children and removes its folder, also when the tests are killed.
        """
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()

    def _read_answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            raise RuntimeError(f"no answer from the fork server: {(self.folder / 'log').read_text()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@functools.cache
def _shared_server() -> Server:
    import atexit

    server = Server()
    atexit.register(server.close)
    return server


@contextmanager
def server() -> Iterator[Server]:
    """Yield the server that all tests of this process share. It starts at its first use, and ends with the process."""
    yield _shared_server()


def announced(path: Path) -> dict[Path, int]:
    """Return the newest step of each run whose checkpoint was announced in a file (see `announce` above)."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {Path(run): int(step) for step, run in (line.split(" ", 1) for line in lines)}


# The server process and its children.


def serve(folder: Path) -> None:
    """Fork a child for every line of stdin, answer with its process id, and record how it ended.

    At the end of stdin, kill all children and remove the folder.
    """
    import_everything()
    child_ended, wakeup = os.pipe()  # readable when a child has ended
    for end in (child_ended, wakeup):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    children: dict[int, Path] = {}
    print(json.dumps({"pid": os.getpid()}), flush=True)
    while True:
        ready, _, _ = select.select([sys.stdin, child_ended], [], [])
        if child_ended in ready:
            os.read(child_ended, 4096)
            _reap(children)
        if sys.stdin not in ready:
            continue
        if not (line := sys.stdin.readline()):
            break
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            os.close(child_ended)
            os.close(wakeup)
            run(request)
        children[pid] = Path(request["folder"])
        print(json.dumps({"pid": pid}), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    while children:
        _reap(children)
    shutil.rmtree(folder)


def import_everything() -> None:
    """Import what every run needs, and do the one-time work of torch and Hydra, without starting a
    thread.
    """
    import gc

    import torch
    import torch.utils.tensorboard

    import qbench.cli.main
    import qbench.experiment.run
    import qbench.experiment.sweep
    import qbench.report.tables.run_row
    from qbench.config import compose
    from qbench.experiment.setup import assemble

    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1)])
    for config in compose.configurations(["experiment=smoke", "method=dorefa"]):
        assemble(config)
    del qbench
    gc.freeze()


def _reap(children: dict[int, Path]) -> None:
    """Write the status of each ended child into its folder."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        folder = children.pop(pid)
        (folder / "status.new").write_text(str(os.waitstatus_to_exitcode(status)))
        (folder / "status.new").rename(folder / "status")


def run(request: dict[str, Any]) -> None:
    """Run a command with its fault in this process, and exit with its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    folder, words, fault = Path(request["folder"]), request["words"], request["fault"]
    for target, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
        handle = os.open(name, os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, target)
        os.close(handle)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    sys.argv, sys.path[0] = ["qbench", *words], request["cwd"]  # as `python -m qbench` sets them
    status = 1
    try:
        from qbench.cli.main import main

        out = [word.removeprefix("out=") for word in words if word.startswith("out=")] or ["outputs"]
        finish = install_fault(out[-1], **fault)
        status = main(words)
        finish()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def install_fault(
    out: str, *, kill_at: int = 0, half_at: int = 0, fail_at: int = 0, errno: str = "EIO", persistent: bool = False,
    file_limit: int = 0, count: str = "", announce: str = "", hold: str = "",
    at_step: int = 0, step_fault: str = "",
) -> Callable[[], None]:  # fmt: skip
    """Make this process die or fail at the given point. Return a function that must be called at its end."""
    root = os.path.abspath(out)
    events, writes, points = itertools.count(1), itertools.count(1), itertools.count(1)
    named: list[str] = []

    def below(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        absolute = os.path.abspath(os.fsdecode(path))
        return absolute == root or absolute.startswith(root + os.sep)

    def point(what: str, path: Any) -> None:
        number, name = next(points), os.fsdecode(path)
        named.append(f"{what} {name}")
        if fail_at and (number == fail_at or (persistent and number > fail_at)):
            kind = getattr(errno_codes, errno)
            raise OSError(kind, os.strerror(kind), name)

    def event(what: str, path: Any) -> None:
        if below(path):
            if next(events) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            point(what, path)

    def write(file: io.FileIO, data: Any) -> None:
        if next(writes) == half_at:
            io.FileIO.write(file, memoryview(data).cast("B")[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        point("write", file.name)

    def audit(what: str, values: tuple[Any, ...]) -> None:
        if what == "open" and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            event("open", values[0])
        elif what in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            event(what.removeprefix("os."), values[0])

    if announce:
        _announce(announce)
    if hold:
        _hold(Path(hold))
    if at_step:
        _fail_in_step(at_step, step_fault)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if kill_at or half_at or fail_at or count:
        _watch_files(below, event, write)
        sys.addaudithook(audit)

    def finish() -> None:
        if count:
            counts = {"events": next(events) - 1, "writes": next(writes) - 1, "points": len(named), "named": named}
            Path(count).write_text(json.dumps(counts))

    return finish


def _watch_files(
    below: Callable[[Any], bool], event: Callable[[str, Any], None], write: Callable[[io.FileIO, Any], None]
) -> None:
    """Call `write` before every write of bytes below `out`, and `event` before truncate and fsync.

    The audit hook reports the other events.
    """
    original_open, original_fsync = io.open, os.fsync

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            write(self, data)
            return super().write(data)

        def truncate(self, size: int | None = None) -> int:
            event("truncate", self.name)
            return super().truncate(size)

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if opener or not set(mode) & set("wax+") or not below(file):
            return original_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)  # type: ignore[arg-type]
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

    def synced(handle: int) -> None:
        event("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        original_fsync(handle)

    import builtins

    builtins.open = io.open = opened  # type: ignore[assignment]
    os.fsync = synced  # type: ignore[assignment]


def _announce(path: str) -> None:
    from qbench.runs.directory import RunDirectory

    original = RunDirectory.save_state

    def save_state(self: RunDirectory, step: int, data: bytes) -> None:
        original(self, step, data)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, f"{step} {self.path}\n".encode())
        os.fsync(handle)
        os.close(handle)

    RunDirectory.save_state = save_state  # type: ignore[method-assign]


def _hold(signal: Path) -> None:
    import qbench.experiment.run as experiment

    original = experiment.assemble

    def assemble(config: Any, *rest: Any) -> Any:
        signal.with_name(f"{signal.name}.{os.getpid()}").touch()
        while not signal.exists():
            time.sleep(0.001)
        return original(config, *rest)

    experiment.assemble = assemble


def _fail_in_step(number: int, what: str) -> None:
    """Make a training step fail. The steps of the float baseline count too."""
    from qbench.errors import DataError
    from qbench.training import loop

    original, steps = loop.compute_gradients, itertools.count(1)

    def compute_gradients(task: Any, state: Any, shards: Any) -> Any:
        due = next(steps) == number
        if due and what == "raise":
            raise ValueError("an error in a step")
        if due and what == "data":
            raise DataError("cat/7.jpg: damaged")
        if due and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if due and what == "nan":
            shards = [(images * float("nan"), labels) for images, labels in shards]
        if due and what == "drift":
            next(task.model.parameters()).data.flatten()[0] += 1
        if due and what not in ("raise", "data", "kill", "nan", "drift"):
            os.kill(os.getpid(), getattr(signal, f"SIG{what}"))
        return original(task, state, shards)

    loop.compute_gradients = compute_gradients


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
