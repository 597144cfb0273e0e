"""The fault kit: a warmed process that forks one command per request, and commands that die or fail where told.

    with faults.server() as server:
        job = server.start(["experiment=smoke", "method=dorefa"], out=folder, kill_at=7)
        assert job.wait(60) == -signal.SIGKILL

`python tests/reliability/faults.py` is that process: it imports what every run needs, once, so that a run begins
within some milliseconds and 200 kills take minutes. A run is `qbench.cli(words)` in a process of its own, with
the real exit status, stdout and stderr.

Points. An event is an open for writing, rename, remove, mkdir, truncate or fsync of a path below the run's `out`, and a
write is a write of bytes to a file opened for writing there. Faults, as keywords of `Server.start`:
    kill_at=n       SIGKILL itself just before the n-th event, from 1
    half_at=n       in the n-th write SIGKILL itself when half of the bytes are written
    fail_at=n       the n-th point, events and writes counted together, raises OSError(errno) with the path;
                    errno="ENOSPC" (default EIO); with persistent=True all later ones do too
    count=path      at the end write {"events": ..., "writes": ..., "points": both, "named": what each was} to a file
    announce=path   append "STEP RUN" to a file whenever `save_state` has returned: a checkpoint that was announced
    hold=path       with the configuration composed, make the file PATH.PID and wait for PATH: many begin at once
"""

import errno as numbers
import functools
import io
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
STARTED = 120.0  # seconds that the imports may take
POLL = 0.005


@dataclass(frozen=True)
class Job:
    """A command at work in a process of its own; what it prints stands in files of its folder."""

    pid: int
    folder: Path

    def status(self) -> int | None:
        """Return the exit status, or minus the signal that ended it; None while it lives."""
        file = self.folder / "status"
        return int(file.read_text()) if file.exists() else None

    def kill(self, kind: int = signal.SIGKILL) -> None:
        if self.status() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, kind)

    def wait(self, timeout: float = 120) -> int:
        """Return the status when it has ended; a command that takes longer is killed.

        Raises:
            TimeoutError: it took longer.
        """
        end = time.monotonic() + timeout
        while (status := self.status()) is None:
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
                raise TimeoutError(f"no end after {timeout} s; stderr: {self.stderr()}")
            time.sleep(POLL)
        return status

    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")


class Server:
    """The warmed process, seen from the tests."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qbench-faults-"))
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, self.folder],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, cwd=ROOT,
                start_new_session=True, env=os.environ | THREADS | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
            )  # fmt: skip
        self._number = itertools.count()
        self._answer(STARTED)

    def start(self, words: Sequence[str], out: Path | str | None = None, **fault: Any) -> Job:
        """Start the command of these words, with `out` as its `out=` where it is given, and a fault planted."""
        words = [*words, *([f"out={out}"] if out else [])]
        folder = self.folder / str(next(self._number))
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        request = {"words": words, "folder": str(folder), "fault": fault}
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        return Job(self._answer(STARTED)["pid"], folder)

    def close(self) -> None:
        """End the process; it ends what it has started, and removes its folder, even if the tests are killed."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            raise RuntimeError(f"the fork server does not answer: {(self.folder / 'log').read_text()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@functools.cache
def _started() -> Server:
    import atexit

    made = Server()
    atexit.register(made.close)
    return made


@contextmanager
def server() -> Iterator[Server]:
    """Yield the server: one for all tests of this process, started when first wanted, ended with the process."""
    yield _started()


def announced(path: Path) -> dict[Path, int]:
    """Return the newest step announced of each run, from the file that `announce` named."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {Path(run): int(step) for step, run in (line.split(" ", 1) for line in lines)}


# The other side: the process that forks, and its children.


def serve(folder: Path) -> None:
    """Fork a child for every line of stdin, answer with its process id, note how it ended; then leave nothing."""
    warm()
    told, tell = os.pipe()
    for end in (told, tell):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    children: dict[int, Path] = {}
    print(json.dumps({"pid": os.getpid()}), flush=True)
    while True:
        ready, _, _ = select.select([sys.stdin, told], [], [])
        if told in ready:
            os.read(told, 4096)
            _reap(children)
        if sys.stdin not in ready:
            continue
        if not (line := sys.stdin.readline()):
            break
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            os.close(told)
            os.close(tell)
            run(request)
        children[pid] = Path(request["folder"])
        print(json.dumps({"pid": pid}), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    while children:
        _reap(children)
    shutil.rmtree(folder)


def warm() -> None:
    """Import what every run needs, and let torch and Hydra do what they do but once; start no thread."""
    import gc

    import matplotlib.pyplot
    import sklearn.datasets
    import torch
    import torch.utils.tensorboard

    import qbench.experiment.run
    from qbench.cli.main import main as cli
    from qbench.config import compose
    from qbench.experiment import sweep
    from qbench.experiment.setup import assemble
    from qbench.report.tables import run_row as row

    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1)])
    for config in compose.configurations(["experiment=smoke", "method=dorefa"]):
        assemble(config)
    del matplotlib, sklearn, qbench, cli, sweep, row
    gc.freeze()


def _reap(children: dict[int, Path]) -> None:
    """Write how each child ended into its folder."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        folder = children.pop(pid)
        (folder / "status.new").write_text(str(os.waitstatus_to_exitcode(status)))
        (folder / "status.new").rename(folder / "status")


def run(request: dict[str, Any]) -> None:
    """Be the command: run it with its faults and leave with its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    folder, words, fault = Path(request["folder"]), request["words"], request["fault"]
    for target, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
        handle = os.open(name, os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, target)
        os.close(handle)
    sys.argv = ["qbench", *words]
    status = 1
    try:
        from qbench.cli.main import main

        out = [word.removeprefix("out=") for word in words if word.startswith("out=")] or ["outputs"]
        ended = plant(out[-1], **fault)
        status = main(words)
        ended()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def plant(
    out: str, *, kill_at: int = 0, half_at: int = 0, fail_at: int = 0, errno: str = "EIO", persistent: bool = False,
    count: str = "", announce: str = "", hold: str = "",
) -> Callable[[], None]:  # fmt: skip
    """Let this process die or fail at a point; return what to call at the end."""
    root = os.path.abspath(out)
    events, writes, points = itertools.count(1), itertools.count(1), itertools.count(1)
    named: list[str] = []

    def below(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        place = os.path.abspath(os.fsdecode(path))
        return place == root or place.startswith(root + os.sep)

    def point(what: str, path: Any) -> None:
        number, name = next(points), os.fsdecode(path)
        named.append(f"{what} {name}")
        if fail_at and (number == fail_at or (persistent and number > fail_at)):
            kind = getattr(numbers, errno)
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
    if kill_at or half_at or fail_at or count:
        _watch_files(below, event, write)
        sys.addaudithook(audit)

    def ended() -> None:
        if count:
            found = {"events": next(events) - 1, "writes": next(writes) - 1, "points": len(named), "named": named}
            Path(count).write_text(json.dumps(found))

    return ended


def _watch_files(
    below: Callable[[Any], bool], event: Callable[[str, Any], None], write: Callable[[io.FileIO, Any], None]
) -> None:
    """Call `write` before every write of bytes to a file below, and `event` before what the audit hook does not see."""
    plain, sync = io.open, os.fsync

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
            return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)  # type: ignore[arg-type]
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

    def synced(handle: int) -> None:
        event("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    import builtins

    builtins.open = io.open = opened  # type: ignore[assignment]
    os.fsync = synced  # type: ignore[assignment]


def _announce(path: str) -> None:
    from qbench.runs.directory import RunDirectory

    plain = RunDirectory.save_state

    def save_state(self: RunDirectory, step: int, data: bytes) -> None:
        plain(self, step, data)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, f"{step} {self.path}\n".encode())
        os.fsync(handle)
        os.close(handle)

    RunDirectory.save_state = save_state  # type: ignore[method-assign]


def _hold(signal: Path) -> None:
    from qbench.experiment import run as experiment

    plain = experiment.assemble

    def assemble(config: Any) -> Any:
        signal.with_name(f"{signal.name}.{os.getpid()}").touch()
        while not signal.exists():
            time.sleep(0.001)
        return plain(config)

    experiment.assemble = assemble


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
