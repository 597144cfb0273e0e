"""Writes the logs of a run: metrics.jsonl, TensorBoard event files, and log.txt."""

import io
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qbench.runs.tensorboard_tags import scalar_tags
from qbench.system import files
from qbench.system.files import Json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from qbench.runs.tensorboard import Chart

BINS = 64
"""Number of bins of a histogram."""

Record = tuple[str, int, Mapping[str, Json]]
"""The kind, training step and values of one line of metrics.jsonl."""


class MetricsLogger:
    """Appends records to metrics.jsonl and to TensorBoard event files.

    Args:
        path: the run's directory.
        size: length of metrics.jsonl in bytes, as stored in the checkpoint from which the run continues. All bytes
            after this length are removed. Corrupt lines are removed too.
        step: training step at which the run continues. TensorBoard hides points of an earlier attempt after this step.
        tensorboard: whether to write event files.

    Attributes:
        path: the run's directory.
        lost: number of missing or corrupt bytes among the first `size` bytes.
    """

    def __init__(self, path: Path, *, size: int = 0, step: int = 0, tensorboard: bool = True) -> None:
        self.path = path
        self._metrics = path / "metrics.jsonl"
        self.lost = size - files.cut(self._metrics, size)
        if not step:  # an earlier attempt may have ended before its first checkpoint; this run writes its points again
            for events in path.glob("events.out.tfevents.*"):
                events.unlink()
        self._writer: SummaryWriter | None = None
        if tensorboard:
            self._hook, threading.excepthook = threading.excepthook, _print_unless_os_error
            self._writer = files.convert_os_errors(lambda: _writer(path, step), path)

    @property
    def size(self) -> int:
        """Length of metrics.jsonl in bytes, which a checkpoint stores."""
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def record(self, kind: str, step: int, values: Mapping[str, Json]) -> None:
        """Append `{"kind": ..., "step": ..., **values}`. Values with a TensorBoard tag go to TensorBoard too."""
        self.records([(kind, step, values)])

    def records(self, records: Sequence[Record]) -> None:
        """Append several lines at once. Each line has the form that `record` writes."""
        whole = [{"kind": kind, "step": step} | dict(values) for kind, step, values in records]
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in whole).encode()

        def append() -> None:
            with open(self._metrics, "ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

        files.convert_os_errors(append, self._metrics, len(text))
        for kind, step, values in records:
            self.scalars(step, scalar_tags(kind, values))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers to TensorBoard, but not to metrics.jsonl. `values` maps tags to numbers."""

        def add(writer: "SummaryWriter") -> None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            writer.file_writer.add_summary(Summary(value=found), step)

        if values:
            self._write(add)

    def histograms(self, step: int, tensors: Mapping[str, "Tensor"]) -> None:
        """Add a histogram of each tensor to TensorBoard.

        The bins have equal widths. Computing them takes 1/20 of the time of TensorBoard's default bins.
        """

        def add(writer: "SummaryWriter") -> None:
            for name, tensor in tensors.items():
                values = tensor.detach().float().cpu().flatten().numpy()
                counts, edges = np.histogram(values, bins=BINS)
                _bars(writer, name, step, counts, edges, (values.size, values.sum(), values.dot(values)))

        self._write(add)

    def counts(self, step: int, tensors: Mapping[str, "Tensor"]) -> None:
        """Add counts (n,) to TensorBoard as histograms of the values 0 to n - 1."""

        def add(writer: "SummaryWriter") -> None:
            for name, tensor in tensors.items():
                counts = tensor.cpu().numpy()
                level = np.arange(len(counts))
                sums = (float(counts.sum()), float(counts @ level), float(counts @ (level * level)))
                _bars(writer, name, step, counts, np.arange(len(counts) + 1) - 0.5, sums)

        self._write(add)

    def figure(self, step: int, name: str, figure: "Figure") -> None:
        """Add a matplotlib figure to TensorBoard."""
        self._write(lambda writer: writer.add_figure(name, figure, step))

    def begin(
        self,
        hparams: Mapping[str, bool | int | float | str],
        first: Sequence[str],
        metrics: Sequence[str],
        layout: "Mapping[str, Mapping[str, Chart]]",
        texts: Mapping[str, str],
    ) -> None:
        """Add hyper-parameters, the tags of the final metrics, charts and texts to TensorBoard.

        All of these entries are written to the event file of this run. TensorBoard's `add_hparams` is not used, because
        it would add a second run.

        Args:
            hparams: names and values of the hyper-parameters.
            first: names of the hyper-parameters that TensorBoard shows by default.
            metrics: tags of the final metrics.
            layout: charts by category and title. TensorBoard merges equal layouts of several runs.
            texts: plain texts by title.
        """

        def add(writer: "SummaryWriter") -> None:
            from torch.utils.tensorboard.summary import custom_scalars, text
            from torch.utils.tensorboard.summary import hparams as summaries

            experiment, start, _ = summaries(dict(hparams), dict.fromkeys(metrics, 0.0))
            _show_first(experiment, first)
            plain = [text(title, _as_code(content)) for title, content in texts.items()]
            for summary in (experiment, start, custom_scalars(layout), *plain):
                writer.file_writer.add_summary(summary)

        self._write(add)

    def end(self) -> None:
        """Mark the run as finished."""

        def add(writer: "SummaryWriter") -> None:
            from torch.utils.tensorboard.summary import hparams

            writer.file_writer.add_summary(hparams({}, {})[2])

        self._write(add)

    def close(self) -> None:
        """Flush and close the event file.

        Raises:
            ResourceError: a part of the event file could not be written to disk.
        """
        self._write(lambda writer: writer.flush())
        self.abandon()

    def abandon(self) -> None:
        """Close the event file. Errors in writing a part of it are ignored."""
        if self._writer:
            with suppress(OSError):
                self._writer.close()
            self._writer, threading.excepthook = None, self._hook

    def _write(self, action: Callable[["SummaryWriter"], None]) -> None:
        if writer := self._writer:
            files.convert_os_errors(lambda: action(writer), self.path)


class SilentLogger(MetricsLogger):
    """Replaces the logger in a process that does not write, because another process of the same run writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.lost = path, 0
        self._metrics, self._writer = path / "metrics.jsonl", None

    def records(self, records: Sequence[Record]) -> None:
        """Do nothing."""


def _print_unless_os_error(args: threading.ExceptHookArgs) -> None:
    """Print the error that ended a thread, unless it is an OSError, which `flush` raises again."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def append_text(path: Path, text: str) -> None:
    """Append lines to log.txt. Each line starts with the current time."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
    buffer = io.StringIO()
    for line in text.splitlines() or [""]:
        buffer.write(f"{stamp}{line}\n")

    def append() -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(buffer.getvalue())

    files.convert_os_errors(append, path, len(text))


def _bars(
    writer: "SummaryWriter",
    name: str,
    step: int,
    counts: NDArray[np.integer],
    edges: NDArray[np.floating],
    sums: tuple[float, float, float],
) -> None:
    """Add a histogram with n counts between n + 1 edges.

    `sums` contains the number of values, their sum, and the sum of their squares.
    """
    writer.add_histogram_raw(name, edges[0], edges[-1], *sums, edges[1:], counts, step)


def _show_first(experiment: "Summary", names: Sequence[str]) -> None:
    """Mark hyper-parameters as different between runs, because TensorBoard shows such hyper-parameters first."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in names
    plugin.content = data.SerializeToString()


def _as_code(content: str) -> str:
    """Return text as a Markdown code block. Bytes that are not UTF-8, which command lines can contain, are escaped."""
    return indent(content.encode(errors="backslashreplace").decode(), "    ")


def _writer(path: Path, step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=step + 1 if step else None)
