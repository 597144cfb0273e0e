"""What a run writes down while it works: metrics.jsonl for machines, TensorBoard for people, log.txt for both."""

import io
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.record import files

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter


class Logbook:
    """Appends records to a run's directory.

    Args:
        path: the run's directory.
        size: bytes of metrics.jsonl that the checkpoint knew of; what was appended later is cut off, and so is a
            torn line at the end of what is there. `lost` says how many bytes of those known are gone.
        step: training step to go on from; later points of TensorBoard are hidden.
    """

    def __init__(self, path: Path, *, size: int = 0, step: int = 0, tensorboard: bool = True) -> None:
        self.path = path
        self._metrics = path / "metrics.jsonl"
        self.lost = size - files.cut(self._metrics, size)
        if not step:  # a try that came to no checkpoint left points that would stand twice
            for events in path.glob("events.out.tfevents.*"):
                events.unlink()
        self._writer: SummaryWriter | None = None
        if tensorboard:
            self._hook, threading.excepthook = threading.excepthook, _unless_refused
            self._writer = files.guarded(lambda: _writer(path, step), path)

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl, for the checkpoint."""
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line `{"kind": ..., "step": ..., **values}`; numbers go to TensorBoard as `kind/name`."""
        line = json.dumps({"kind": kind, "step": step} | dict(values), allow_nan=False) + "\n"

        def append() -> None:
            with open(self._metrics, "ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())

        files.guarded(append, self._metrics, len(line))

        def add(writer: "SummaryWriter") -> None:
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("epoch", "images"):
                    writer.add_scalar(f"{kind}/{name}", value, step)

        self._show(add)

    def histograms(self, step: int, tensors: Mapping[str, "Tensor"]) -> None:
        """Add a histogram of each tensor to TensorBoard."""

        def add(writer: "SummaryWriter") -> None:
            for name, tensor in tensors.items():
                writer.add_histogram(name, tensor.detach().cpu().numpy(), step)

        self._show(add)

    def figure(self, step: int, name: str, figure: Any) -> None:
        """Add a matplotlib figure to TensorBoard."""
        self._show(lambda writer: writer.add_figure(name, figure, step))

    def hparams(self, values: Mapping[str, bool | int | float | str], metrics: Mapping[str, float]) -> None:
        """Add hyper-parameters and final metrics, in this same event file (`add_hparams` would add a false run)."""

        def add(writer: "SummaryWriter") -> None:
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(dict(values), dict(metrics)):
                writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value, 0)

        self._show(add)

    def close(self) -> None:
        """Flush and close what is open.

        Raises:
            ResourceError: not all of it could be written.
        """
        self._show(lambda writer: writer.flush())
        self.abandon()

    def abandon(self) -> None:
        """Close what is open, whether or not all of it can be written."""
        if self._writer:
            with suppress(OSError):
                self._writer.close()
            self._writer, threading.excepthook = None, self._hook

    def _show(self, action: Callable[["SummaryWriter"], None]) -> None:
        if writer := self._writer:
            files.guarded(lambda: action(writer), self.path)


def _unless_refused(args: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but not the system's refusal to write: TensorBoard's writer raises that once more."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def append_text(path: Path, text: str) -> None:
    """Append lines with the time to log.txt."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
    buffer = io.StringIO()
    for line in text.splitlines() or [""]:
        buffer.write(f"{stamp}{line}\n")

    def append() -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(buffer.getvalue())

    files.guarded(append, path, len(text))


def _writer(path: Path, step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=step + 1 if step else None)
