"""Exports a finished run to one file, and evaluates such a file.

An export is verified against the run on all test images before the file is written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qbench.analysis.evaluate import Expected, measure, other_dataset, table
from qbench.analysis.finished_run import FinishedRun, load_finished_run
from qbench.analysis.overrides import override_dataset
from qbench.data.dataset import Loader
from qbench.deploy import packed
from qbench.deploy.about import About
from qbench.deploy.agreement import Agreement, compare
from qbench.deploy.trace import NotExportable, trace
from qbench.errors import CheckpointError, ConfigError
from qbench.quant.probe import Batch
from qbench.report.tables.table import Table
from qbench.system import files


class Export(NamedTuple):
    """A written file, how it agrees with its run, and both in words."""

    path: Path
    agreement: Agreement
    lines: tuple[str, ...]


def export(run: Path, to: str = "packed", out: Path | None = None, *, weights: str = "last") -> Export:
    """Export a finished run to a file, and verify it on the run's test images.

    Args:
        run: the directory of the run.
        to: the form; see docs/export.md.
        out: the file to write; by default `network` with the form's ending, in the run's directory.
        weights: the run's checkpoint, `last` or `best`.

    Raises:
        NotExportable: the run cannot be exported to this form.
        CheckpointError: the run is not finished or damaged, or the export computes something else.
    """
    finished = load_finished_run(run, weights, "cpu")
    batches = list(finished.setup.loader().unaugmented("test"))
    path = out or run / DEFAULT_NAMES[to]
    network = trace(finished.model, _examples(batches))
    data = packed.pack_network(network, _about(finished, weights))
    read = packed.unpack_network(data, str(path))
    agreement = compare(finished.model, read.network.function(), batches)
    if not agreement.identical:
        raise NotExportable(
            f"{run}: the packed network does not compute the same logits as the run (difference {agreement.largest:g})"
        )
    files.write(path, data)
    cost = finished.result.cost
    ideal = f"; the ideal size is {cost.bytes_ideal:,.0f}, the float network's {cost.bytes_float:,}" if cost else ""
    parts = ", ".join(f"{size:,} {name}" for name, size in read.sizes.items())
    return Export(path, agreement, (
        f"wrote {path}: {len(data):,} bytes ({parts}{ideal})",
        f"verified on {agreement.images} test images: all logits have the same bits as those of the run",
    ))  # fmt: skip


DEFAULT_NAMES: Mapping[str, str] = {"packed": f"network{packed.SUFFIX}"}
"""Form -> the name of its file in the run's directory."""


def _examples(batches: Sequence[Batch]) -> Tensor:
    """Return five test images, from which functions and shapes are recorded. No values are."""
    images = batches[0][0][:5]
    return images.repeat(5, *[1] * (images.dim() - 1))[:5] if len(images) < 5 else images


def _about(finished: FinishedRun, weights: str) -> About:
    setup, result = finished.setup, finished.result
    data, config = setup.data, setup.config
    return About(
        title=f"{result.method} {result.widths}, {result.model} trained on {result.dataset}",
        identity=result.identity, weights=weights, dataset=dict(config.dataset), shape=data.shape,
        classes=data.classes, mean=data.mean, std=data.std, batch_size=config.optim.batch_size,
        threads=config.runtime.threads,
    )  # fmt: skip


class _Exported(nn.Module):
    """An exported network as a module, in float32 on the CPU."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        return self.function(images)


def load_exported(file: Path) -> tuple[nn.Module, About]:
    """Return the network of an exported file, and what the file says of it.

    The network takes normalized images (N, C, H, W); see `About`.

    Raises:
        CheckpointError: the file is missing, damaged or not an exported file.
    """
    try:
        data = files.read(file)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    content = packed.unpack_network(data, str(file))
    return _Exported(content.network.function()), content.about


def evaluate_file(file: Path, words: Sequence[str] = (), *, predictions: Path | None = None) -> Table:
    """Return a table with one row, the results of an exported file on the test split of a data set.

    Args:
        words: overrides that name another data set. If empty, the run's own data set is used.
        predictions: see `qbench.analysis.evaluate.evaluate`.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: the data set does not fit the file's network.
    """
    model, about = load_exported(file)
    name = str(about.dataset.get("name", ""))
    if ":" in name and not any(word.startswith("dataset=") for word in words):
        raise ConfigError(f"{file}: its data set {name} is code that is not in the file\ntype dataset={name} to run it")
    node = override_dataset(about.dataset, words) if words else about.dataset
    own = Expected(about.shape, about.classes, about.mean, about.std, "file")
    data = other_dataset(own, node)
    with _threads(about.threads):
        batches = Loader(data, about.batch_size, 0, torch.device("cpu"), 0).unaugmented("test")
        measured = measure(model, model, batches, predictions)
    return table(file, about.title, about.weights, data, measured, other=bool(words))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use as many threads as the verification of the export did, because sums may depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
