"""Connects training to the run's directory: resumes training, writes logs and checkpoints, and stops on signals."""

import io
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from qbench.config.schema import Runtime
from qbench.errors import Diverged, QbenchError
from qbench.experiment.context import RunContext
from qbench.experiment.data_check import other_data_error
from qbench.experiment.trained_network import LAYERS, StoredLayers
from qbench.runs import tensorboard
from qbench.runs.directory import RunDirectory
from qbench.runs.metrics_logger import MetricsLogger, Record, SilentLogger
from qbench.runs.result import BaselineResult, TrainingSpeed
from qbench.system import files
from qbench.system.tracebacks import error_text
from qbench.training.checkpoint import Saved, first_nonfinite, load_newest, pack
from qbench.training.divergence import must_be_finite
from qbench.training.epoch_record import EpochRecord
from qbench.training.health import WITHOUT_TRAINING
from qbench.training.loop import Callbacks
from qbench.training.monitor import TrainingMonitor
from qbench.training.state import State
from qbench.training.task import Task


class TrainingSession:
    """Connects the training of a run to the run's directory, and resumes from the newest checkpoint.

    Args:
        directory: the directory of the run, locked by this process.
        context: progress display, signals and processes of the run, provided by the caller.
        runtime: the node `runtime` of the configuration.
        title: the name of the run in the progress display.
        hyperparameters: the run's row in TensorBoard's table.
        texts: maps titles to texts to show in TensorBoard.
        data_sha256: digest of the images. Every checkpoint contains this digest.
        layers: function that returns the layers of a quantized network. Every checkpoint contains these layers.

    Attributes:
        saved: the checkpoint to continue from, or None for a new run.
        baseline: the evaluations of the float baseline when the run started. None if the run has no baseline, or if
            the checkpoint is of an earlier version.
    """

    def __init__(
        self,
        directory: RunDirectory,
        context: RunContext,
        runtime: Runtime,
        title: str,
        hyperparameters: tensorboard.Columns,
        texts: Mapping[str, str],
        data_sha256: str,
        layers: Callable[[nn.Module], StoredLayers],
    ) -> None:
        self.directory, self.context, self.runtime, self.title = directory, context, runtime, title
        self.data_sha256, self.layers = data_sha256, layers
        self.saved = context.group.from_first(self._newest)
        past = self.saved["session"] if self.saved else {}
        self.train_seconds: float = past.get("train_seconds", 0.0)
        self.train_images: int = past.get("train_images", 0)
        self.baseline = msgspec.convert(past.get("baseline"), BaselineResult | None)
        self._earlier_peak: int = past.get("peak_bytes", 0)
        self._earlier_seconds: float = past.get("wall_seconds", 0.0)
        self._began = self._saved_at = time.perf_counter()
        step, size = self.saved["state"]["counters"][2] if self.saved else 0, past.get("log_size", 0)
        self.logger = (
            MetricsLogger(directory.path, size=size, step=step, tensorboard=runtime.tensorboard)
            if context.writes
            else SilentLogger(directory.path)
        )
        self.logger.begin(hyperparameters, tensorboard.FIRST, tensorboard.METRICS, tensorboard.CHARTS, texts)
        self.monitor = TrainingMonitor(runtime.observe, self.logger, context.reporter, **past.get("memory", {}))
        if lost := self.logger.lost:
            context.reporter.say(f"warning: {directory.path / 'metrics.jsonl'} is damaged: {lost} bytes are lost")

    @property
    def wall_seconds(self) -> float:
        """The seconds spent on this run, including the time before interruptions."""
        return self._earlier_seconds + time.perf_counter() - self._began

    def watch(self, task: Task, state: State, images: int) -> Callbacks:
        """Return the functions that the training loop calls. `images` is the number of images in a batch."""
        context, reporter = self.context, self.context.reporter
        reporter.start(self.title, task.epochs * task.steps, state.step, images)
        self.monitor.begin(task.model, state.step)
        if not task.epochs:
            self.logger.records(self.monitor.epoch(task, state, None, WITHOUT_TRAINING))

        def step(state: State, loss: Tensor) -> None:
            reporter.step(state.step, loss.item)
            self.monitor.step(task.model, state.step)
            due = context.writes and time.perf_counter() - self._saved_at > self.runtime.checkpoint_seconds
            # the last step of an epoch is saved together with the epoch
            if any(context.agree(save=due and state.batch < task.steps)):
                self.save(task, state)
                context.check()  # a signal may have come while saving

        def epoch(state: State, record: EpochRecord, losses: list[Tensor]) -> None:
            self._write_epoch(task, state, record, losses)
            reporter.epoch(state.step, record.metrics())
            state.check_equal(task.model, context.group)
            self.save(task, state)
            context.check()

        return Callbacks(step, epoch, lambda state: self.save(task, state))

    def save(self, task: Task, state: State) -> None:
        """Write a checkpoint from which the run can continue. Only process 0 writes.

        Raises:
            Diverged: the state contains inf or nan, or `TrainingMonitor.check` raises this error. In both cases, no
                checkpoint is written.
        """
        if not self.context.writes:
            return
        session = {
            "train_seconds": self.train_seconds,
            "train_images": self.train_images,
            "wall_seconds": self.wall_seconds,
            "peak_bytes": self._peak_bytes(next(task.model.parameters()).device),
            "baseline": asdict(self.baseline) if self.baseline else None,
            "log_size": self.logger.size,
            "memory": self.monitor.memory(task.model),
        }
        saved = state.save(task.model)
        if bad := first_nonfinite(
            {"model": must_be_finite(task.model)} | {k: saved[k] for k in ("optimizer", "average")}
        ):
            raise Diverged(f"{bad} is not finite in epoch {state.epoch}, step {state.step}; try a lower optim.lr")
        self.monitor.check(task.model, f"in epoch {state.epoch}, step {state.step}")
        identity = self.directory.identity.digest
        data = pack(
            {
                "identity": identity, "data": self.data_sha256, "state": saved, "session": session,
                LAYERS: self.layers(task.model),
            }
        )  # fmt: skip
        self.directory.save_state(state.step, data)
        self._saved_at = time.perf_counter()

    def write_weights(
        self, name: str, weights: dict[str, Tensor], model: nn.Module, outputs: Tensor | None
    ) -> None:  # fmt: skip
        """Write last.pt or best.pt of the quantized network `model`. See `StoredLayers` for `outputs`."""
        layers = self.layers(model)
        if outputs is not None:
            layers["outputs"] = outputs
        content = {"model": weights, "identity": self.directory.identity.digest, LAYERS: layers}
        self.directory.write_artifact(name, pack(content))

    def write_predictions(self, answers: Tensor) -> None:
        """Write predictions.npy, int16 or int32 (N, 2), with label and predicted class of each test image."""
        buffer = io.BytesIO()
        fits = int(answers.max()) <= np.iinfo(np.int16).max
        np.save(buffer, answers.cpu().numpy().astype(np.int16 if fits else np.int32))
        self.directory.write_artifact("predictions.npy", buffer.getvalue())

    def speed(self, device: torch.device, epochs: int) -> TrainingSpeed:
        """Return the training speed and the peak memory. The speed is the mean over all epochs, without evaluation."""
        seconds = max(self.train_seconds, 1e-9)
        return TrainingSpeed(
            images_per_second=self.train_images / seconds,
            seconds_per_epoch=seconds / epochs if epochs else 0.0,
            peak_bytes=self._peak_bytes(device),
        )

    def _peak_bytes(self, device: torch.device) -> int:
        """Return the peak memory of the run, including the processes before interruptions."""
        own = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_bytes()
        return max(own, self._earlier_peak)

    def _write_epoch(self, task: Task, state: State, record: EpochRecord, losses: list[Tensor]) -> None:
        self.train_seconds += record.seconds
        self.train_images += record.images
        first, every = state.step - len(losses) + 1, self.runtime.log_every
        records: list[Record] = []
        for i, loss in enumerate(torch.stack(losses).tolist()):
            if (first + i) % every == 0:
                records.append(("step", first + i, {"loss": loss}))
        records += self.monitor.epoch(task, state, record, f"in epoch {record.epoch}, step {state.step}")
        self.logger.records([*records, ("epoch", state.step, record.metrics())])

    def _newest(self) -> Saved | None:
        """Return the newest intact checkpoint, or None if there is none.

        Raises:
            CheckpointError: the images of the data set have changed since the checkpoint was saved.
        """
        directory = self.directory
        saved = load_newest(directory.checkpoints(), directory.identity.digest, self.context.reporter.say)
        if saved and saved.get("data") != self.data_sha256:
            raise other_data_error([directory.path], directory.identity.dataset)
        return saved


def _peak_bytes() -> int:
    """Return the peak memory of this process in bytes.

    On Linux, the value comes from /proc, because getrusage also counts the memory of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def record_failure(
    directory: RunDirectory, error: BaseException, status: str, trace: str, network: dict[str, str]
) -> None:
    """Write a result with status `failed` or `diverged`, and the traceback.

    If writing fails, print the reason instead. `network` contains the keys of the run's network, as in `Result`.
    """
    try:
        reason = str(error) if isinstance(error, QbenchError) else error_text(error)
        directory.finish(replace(directory.new_result(status, reason), network=network))
        files.convert_os_errors(lambda: _append(directory, trace), directory.path)
    except Exception as second:
        print(f"qbench: could not record the failure in {directory.path}: {second}", file=sys.stderr)


def _append(directory: RunDirectory, trace: str) -> None:
    with open(directory.path / "log.txt", "a", encoding="utf-8") as file:
        file.write(trace + os.linesep)
