"""One run at work: where it goes on, what it writes after every step and epoch, when it saves, whether to stop."""

import io
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from qbench.config.identity import digest
from qbench.errors import CheckpointError, Diverged, Interrupted, QbenchError
from qbench.runs.directory import RunDirectory
from qbench.runs.metrics_logger import MetricsLogger
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import TrainingSpeed
from qbench.runs.tensorboard import CHARTS, FIRST, METRICS, columns
from qbench.system import files
from qbench.training.checkpoint import first_nonfinite, pack, unpack
from qbench.training.divergence import must_be_finite
from qbench.training.epoch_record import EpochRecord
from qbench.training.loop import Callbacks
from qbench.training.monitor import TrainingMonitor
from qbench.training.state import State
from qbench.training.task import Task

T = TypeVar("T")


@dataclass
class RunContext:
    """What the caller provides: where to show progress, and whether to stop (a signal's number, 0 for none)."""

    screen: ProgressReporter = field(default_factory=ProgressReporter)
    stop: Callable[[], int] = lambda: 0

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for."""
        if self.stop():
            raise Interrupted(f"stopped by signal {self.stop()}; the same command goes on from here")

    def checked(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches; between two of them raise `Interrupted` if a stop was asked for."""
        for batch in batches:
            self.check()
            yield batch

    def waiting(self, path: Path) -> Callable[[], None]:
        """Return what to call while another process works on a run: it says so once, and raises if asked to stop."""
        said: list[Path] = []

        def wait() -> None:
            if not said:
                self.screen.say(f"waiting: another process works on {path}")
                said.append(path)
            self.check()

        return wait


class TrainingSession:
    """Ties a run's training to its directory.

    Args:
        directory: the run's, held by this process.
        desk: the caller's.
        tensorboard: whether to write event files.
    """

    def __init__(self, directory: RunDirectory, desk: RunContext, tensorboard: bool) -> None:
        self.directory, self.desk = directory, desk
        self.config = directory.config
        self.identity = digest(directory.identity)
        self.saved = self._newest()
        past = self.saved["session"] if self.saved else {}
        self.train_seconds: float = past.get("train_seconds", 0.0)
        self.train_images: int = past.get("train_images", 0)
        self._wall_before: float = past.get("wall_seconds", 0.0)
        self._began = self._saved_at = time.perf_counter()
        step = self.saved["state"]["counters"][2] if self.saved else 0
        self.book = MetricsLogger(directory.path, size=past.get("log_size", 0), step=step, tensorboard=tensorboard)
        self.book.begin(columns(self.config), FIRST, [f"hparam/{name}" for name in METRICS], CHARTS)
        self.lookout = TrainingMonitor(self.config.runtime.observe, self.book, desk.screen, **past.get("memory", {}))
        if self.book.lost:
            desk.screen.say(f"warning: {directory.path / 'metrics.jsonl'} is damaged: {self.book.lost} bytes are lost")

    @property
    def wall_seconds(self) -> float:
        """Seconds of work on this run, those before an interruption included."""
        return self._wall_before + time.perf_counter() - self._began

    def watch(self, task: Task, state: State, images: int) -> Callbacks:
        """Return what the loop calls; `images` is the batch size, for the display."""
        screen = self.desk.screen
        screen.start(self._title(), task.epochs * task.steps, state.step, images)
        self.lookout.begin(task.model)
        if not task.epochs:
            self.book.records(self.lookout.epoch(task, state, None, "without training"))

        def step(state: State, loss: Tensor) -> None:
            screen.step(state.step, loss.item)
            asked = self.desk.stop()
            late = time.perf_counter() - self._saved_at > self.config.runtime.checkpoint_seconds
            if asked or (late and state.batch < task.steps):  # the epoch's last step is saved with the epoch
                self.save(task, state)
            if asked:
                self.desk.check()

        def epoch(state: State, record: EpochRecord, losses: list[Tensor]) -> None:
            self._write_epoch(task, state, record, losses)
            screen.epoch(state.step, record.metrics())
            self.save(task, state)
            self.desk.check()

        return Callbacks(step, epoch, lambda state: self.save(task, state))

    def save(self, task: Task, state: State) -> None:
        """Write a checkpoint from which the run goes on.

        Raises:
            Diverged: it holds inf or nan, or `TrainingMonitor.check` refuses it; nothing is written.
        """
        session = {
            "train_seconds": self.train_seconds,
            "train_images": self.train_images,
            "wall_seconds": self.wall_seconds,
            "log_size": self.book.size,
            "memory": self.lookout.memory(task.model),
        }
        saved = state.save(task.model)
        if bad := first_nonfinite(
            {"model": must_be_finite(task.model)} | {k: saved[k] for k in ("optimizer", "average")}
        ):
            raise Diverged(f"{bad} is not finite in epoch {state.epoch}, step {state.step}; try a lower optim.lr")
        self.lookout.check(task.model, f"in epoch {state.epoch}, step {state.step}")
        data = pack({"identity": self.identity, "state": saved, "session": session})
        self.directory.save_state(state.step, data)
        self._saved_at = time.perf_counter()

    def write_artifact(self, name: str, weights: dict[str, Tensor]) -> None:
        """Write last.pt or best.pt."""
        self.directory.write_artifact(name, pack({"model": weights, "identity": self.identity}))

    def predictions(self, answers: Tensor) -> None:
        """Write predictions.npy: int16 (N, 2), label and predicted class of every test image after the last epoch."""
        buffer = io.BytesIO()
        np.save(buffer, answers.cpu().numpy().astype(np.int16))
        self.directory.write_artifact("predictions.npy", buffer.getvalue())

    def speed(self, device: torch.device, epochs: int) -> TrainingSpeed:
        """Return images per second and seconds per epoch of training alone, over `epochs`, and peak memory in bytes."""
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_bytes()
        seconds = max(self.train_seconds, 1e-9)
        return TrainingSpeed(
            images_per_second=self.train_images / seconds,
            seconds_per_epoch=seconds / epochs if epochs else 0.0,
            peak_bytes=peak,
        )

    def _write_epoch(self, task: Task, state: State, record: EpochRecord, losses: list[Tensor]) -> None:
        self.train_seconds += record.seconds
        self.train_images += record.images
        first, every = state.step - len(losses) + 1, self.config.runtime.log_every
        records: list[tuple[str, int, dict[str, Any]]] = []
        for i, loss in enumerate(torch.stack(losses).tolist()):
            if (first + i) % every == 0:
                records.append(("step", first + i, {"loss": loss}))
        records += self.lookout.epoch(task, state, record, f"in epoch {record.epoch}, step {state.step}")
        self.book.records([*records, ("epoch", state.step, record.metrics())])

    def _newest(self) -> dict[str, Any] | None:
        """Return the newest checkpoint that verifies; say which do not, and remove them: they count as the newest."""
        for path in self.directory.checkpoints():
            try:
                saved = unpack(path.read_bytes(), str(path))
                if saved.get("identity") != self.identity:
                    raise CheckpointError(f"{path} belongs to another run")
                if path.name != f"state-{_step(saved, path)}.pt":
                    raise CheckpointError(f"{path} is of step {_step(saved, path)}")
            except CheckpointError as error:
                self.desk.screen.say(f"warning: {error}; removed, trying the one before")
                files.convert_os_errors(path.unlink, path)
                continue
            self.desk.screen.say(f"going on from {path.name}")
            return saved
        return None

    def _title(self) -> str:
        config = self.config
        stage = "float" if config.is_parent else f"{config.method_name} {config.bits}"
        return f"{stage}  {config.model['name']} on {config.dataset['name']}, seed {config.seed}"


def _step(saved: dict[str, Any], path: Path) -> int:
    """Return the step at which a checkpoint was saved."""
    try:
        if not isinstance(saved["session"], dict):
            raise TypeError
        return int(saved["state"]["counters"][2])
    except (KeyError, TypeError, IndexError, ValueError):
        raise CheckpointError(f"{path} holds no state of a training") from None


def _peak_bytes() -> int:
    """Return the most memory that this process has held; Linux's getrusage counts what its parent held as well."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def record_failure(directory: RunDirectory, error: BaseException, status: str, trace: str) -> None:
    """Write a failed or diverged result and the traceback; a full disk must not hide the error itself."""
    try:
        reason = str(error) if isinstance(error, QbenchError) else f"{type(error).__name__}: {error}"
        directory.finish(directory.new_result(status, reason=reason))
        files.convert_os_errors(lambda: _append(directory, trace), directory.path)
    except Exception as second:
        print(f"qbench: could not record the failure in {directory.path}: {second}", file=sys.stderr)


def _append(directory: RunDirectory, trace: str) -> None:
    with open(directory.path / "log.txt", "a", encoding="utf-8") as file:
        file.write(trace + os.linesep)
