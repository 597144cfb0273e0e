"""What a run writes down while it works: metrics.jsonl for machines, TensorBoard for people, log.txt for both."""

import io
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qbench.system import files

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter


BINS = 64
"""Of a histogram."""

Layout = dict[str, dict[str, list[Any]]]
"""Category -> chart -> ["Multiline", regular expressions of tags]; equal ones of several runs are one."""


class MetricsLogger:
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
            self._writer = files.convert_os_errors(lambda: _writer(path, step), path)

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl, for the checkpoint."""
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line `{"kind": ..., "step": ..., **values}`; numbers go to TensorBoard as `kind/name`."""
        self.records([(kind, step, values)])

    def records(self, records: Sequence[tuple[str, int, Mapping[str, Any]]]) -> None:
        """Append several lines at once, (kind, step, values) each; see `record`."""
        whole = [{"kind": kind, "step": step} | dict(values) for kind, step, values in records]
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in whole).encode()

        def append() -> None:
            with open(self._metrics, "ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

        files.convert_os_errors(append, self._metrics, len(text))
        for kind, step, values in records:
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            self.scalars(step, {f"{kind}/{n}": value for n, value in numbers.items() if n not in ("epoch", "images")})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers to TensorBoard alone, under these tags."""

        def add(writer: "SummaryWriter") -> None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            writer.file_writer.add_summary(Summary(value=found), step)

        self._show(add)

    def histograms(self, step: int, tensors: Mapping[str, "Tensor"]) -> None:
        """Add a histogram of each tensor to TensorBoard, in even bins: its own would cost twenty times as much."""

        def add(writer: "SummaryWriter") -> None:
            for name, tensor in tensors.items():
                values = tensor.detach().float().cpu().flatten().numpy()
                counts, edges = np.histogram(values, bins=BINS)
                _bars(writer, name, step, counts, edges, (values.size, values.sum(), values.dot(values)))

        self._show(add)

    def counts(self, step: int, tensors: Mapping[str, "Tensor"]) -> None:
        """Add counts (n,) to TensorBoard as histograms of 0 to n - 1."""

        def add(writer: "SummaryWriter") -> None:
            for name, tensor in tensors.items():
                counts = tensor.cpu().numpy()
                at = np.arange(len(counts))
                sums = (counts.sum(), counts @ at, counts @ (at * at))
                _bars(writer, name, step, counts, np.arange(len(counts) + 1) - 0.5, sums)

        self._show(add)

    def figure(self, step: int, name: str, figure: Any) -> None:
        """Add a matplotlib figure to TensorBoard."""
        self._show(lambda writer: writer.add_figure(name, figure, step))

    def begin(
        self,
        hparams: Mapping[str, bool | int | float | str],
        first: Sequence[str],
        metrics: Sequence[str],
        layout: Layout,
    ) -> None:
        """Add hyper-parameters, those in `first` to be shown first, which metrics will follow, and the charts of the
        custom-scalars tab.

        They stand in this same event file: `add_hparams` would add a false run.
        """

        def add(writer: "SummaryWriter") -> None:
            from torch.utils.tensorboard.summary import custom_scalars
            from torch.utils.tensorboard.summary import hparams as summaries

            experiment, start, _ = summaries(dict(hparams), dict.fromkeys(metrics, 0.0))
            _in_front(experiment, first)
            for summary in (experiment, start, custom_scalars(layout)):
                writer.file_writer.add_summary(summary)

        self._show(add)

    def end(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics that `begin` has named, and that the run has ended well."""

        def add(writer: "SummaryWriter") -> None:
            from torch.utils.tensorboard.summary import hparams

            writer.file_writer.add_summary(hparams({}, {})[2])

        self._show(add)
        self.scalars(0, metrics)

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
            files.convert_os_errors(lambda: action(writer), self.path)


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

    files.convert_os_errors(append, path, len(text))


def _bars(writer: "SummaryWriter", name: str, step: int, counts: Any, edges: Any, sums: tuple[Any, ...]) -> None:
    """Add counts (n,) between edges (n + 1,); `sums` are the values' count, sum and sum of squares."""
    writer.add_histogram_raw(name, edges[0], edges[-1], *sums, edges[1:], counts, step)


def _in_front(experiment: Any, names: Sequence[str]) -> None:
    """Say that hyper-parameters differ between runs: of all, TensorBoard shows five at first, these before others."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in names
    plugin.content = data.SerializeToString()


def _writer(path: Path, step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=step + 1 if step else None)
