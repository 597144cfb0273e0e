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
from qbench.bits import FLOAT
from qbench.data.dataset import Loader
from qbench.deploy import packed
from qbench.deploy.about import About
from qbench.deploy.agreement import Agreement, batch_noise, compare
from qbench.deploy.container import SUFFIX
from qbench.deploy.onnx_file import to_onnx
from qbench.deploy.runtimes import RUNTIMES, about_onnx
from qbench.deploy.trace import NotExportable, trace
from qbench.errors import CheckpointError, ConfigError
from qbench.quant.layers import quantized_layers
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
        to: the form; see docs/guides/export.md.
        out: the file to write; by default `network` with the form's ending, in the run's directory.
        weights: the run's checkpoint, `last` or `best`.

    Raises:
        NotExportable: the run cannot be exported to this form.
        CheckpointError: the run is not finished or damaged, or the export computes something else.
    """
    finished = load_finished_run(run, weights, "cpu")
    path = out or run / DEFAULT_NAMES[to]
    network, about = trace(finished.model, _test_images(finished, 5)), _about(finished, weights, to)
    if to == "packed":
        data = packed.pack_network(network, about)
        agreement, how = _verify_packed(finished, data, path)
    else:
        data = to_onnx(network, about)
        agreement, how = _verify_onnx(finished, about, data, path)
    files.write(path, data)
    cost = finished.result.cost
    sizes = f"; ideal {cost.bytes_ideal:,.0f}, float {cost.bytes_float:,}" if cost else ""
    return Export(path, agreement, (f"wrote {path}: {len(data):,} bytes{sizes}", *how))


DEFAULT_NAMES: Mapping[str, str] = {
    "packed": f"network{SUFFIX}", "onnx": "network.onnx", "int8": "network-int8.onnx",
}  # fmt: skip
"""Form -> the name of its file in the run's directory."""

NARROW, NARROW_TOLERANCE, WIDE_TOLERANCE = 4, 2e-5, 2e-2
"""Largest width in bits of the first tolerance; tolerances of logits in ONNX files, relative to the largest logit."""

NOISE_IMAGES = 64


def _verify_packed(finished: FinishedRun, data: bytes, path: Path) -> tuple[Agreement, list[str]]:
    """Compare a packed file with its run, and return the agreement, also in words.

    Raises:
        NotExportable: some logits have other bits.
    """
    content = packed.unpack_network(data, str(path))
    agreement = compare(finished.model, content.network.function(), _test_batches(finished))
    if not agreement.identical:
        raise NotExportable(
            f"the packed network does not compute the same logits as the run; the largest difference is "
            f"{agreement.largest:.2g}"
        )
    parts = ", ".join(f"{size:,} of {name}" for name, size in content.sizes.items())
    verified = f"verified on {agreement.images} test images: all logits have the same bits as those of the run"
    return agreement, [f"bytes: {parts}", verified]


def _verify_onnx(finished: FinishedRun, about: About, data: bytes, path: Path) -> tuple[Agreement, list[str]]:
    """Compare an ONNX file with its run in each runtime, and return the worst agreement, also in words.

    Raises:
        NotExportable: a predicted class differs, or logits differ by more than the tolerance.
    """
    widths = [width for layer in quantized_layers(finished.model).values() for width in layer.bits[:2] if width < FLOAT]
    tolerance = NARROW_TOLERANCE if max(widths, default=0) <= NARROW else WIDE_TOLERANCE
    noise = batch_noise(finished.model, _test_images(finished, NOISE_IMAGES))
    agreements: list[Agreement] = []
    lines = []
    for name in VERIFIED_IN[about.form]:
        try:
            function = RUNTIMES[name](data, about, str(path))
        except ConfigError as missing:
            if not agreements:
                raise
            lines.append(f"not verified in {name}: {missing}".replace("\n", "; "))
            continue
        found = compare(finished.model, function, _test_batches(finished))
        allowed = max(tolerance * max(1.0, found.magnitude), noise)
        if found.same_class < found.images or not found.largest <= allowed:
            raise NotExportable(
                f"{name} predicts the run's class for {found.same_class} of {found.images} test images; the largest "
                f"difference of logits is {found.largest:.2g}, allowed {allowed:.2g}\n"
                "try: qbench export RUN --to packed"
            )
        agreements.append(found)
        lines.append(
            f"verified in {name} on {found.images} test images: the same classes; logits differ by at most "
            f"{found.largest:.2g} (allowed {allowed:.2g}; torch itself by {noise:.2g} between batch sizes)"
        )
    return max(agreements, key=lambda agreement: agreement.largest), lines


VERIFIED_IN: Mapping[str, Sequence[str]] = {"onnx": ("onnxruntime",), "int8": ("onnxruntime", "openvino")}
"""Form -> the runtimes in which a file is verified."""


def _test_batches(finished: FinishedRun) -> Iterator[Batch]:
    return finished.setup.loader().unaugmented("test")


def _test_images(finished: FinishedRun, count: int) -> Tensor:
    """Return `count` test images, which repeat if there are fewer."""
    images = torch.cat([images for images, _ in finished.setup.loader().unaugmented("test", count)])
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def _about(finished: FinishedRun, weights: str, form: str) -> About:
    setup, result = finished.setup, finished.result
    data, config = setup.data, setup.config
    return About(
        form=form, title=f"{result.method} {result.widths}, {result.model} trained on {result.dataset}",
        identity=result.identity, weights=weights, dataset=dict(config.dataset), shape=data.shape,
        classes=data.classes, mean=data.mean, std=data.std, white=data.white,
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


def load_exported(file: Path, runtime: str | None = None) -> tuple[nn.Module, About]:
    """Return the network of an exported file, and what the file says of it.

    The network takes normalized images (N, C, H, W); see `About`.

    Args:
        runtime: for ONNX files, onnxruntime (the default) or openvino.

    Raises:
        CheckpointError: the file is missing, damaged or not an exported file.
        ConfigError: the runtime is missing, or is given for a packed file.
    """
    try:
        data = files.read(file)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    if file.suffix == ".onnx":
        about = about_onnx(data, str(file))
        return _Exported(RUNTIMES[runtime or "onnxruntime"](data, about, str(file))), about
    if runtime:
        raise ConfigError(f"{file}: packed files run in torch; --runtime is for ONNX files")
    content = packed.unpack_network(data, str(file))
    return _Exported(content.network.function()), content.about


def evaluate_file(
    file: Path, words: Sequence[str] = (), *, predictions: Path | None = None, runtime: str | None = None
) -> Table:
    """Return a table with one row, the results of an exported file on the test split of a data set.

    Args:
        words: overrides that name another data set. If empty, the run's own data set is used.
        predictions: see `qbench.analysis.evaluate.evaluate`.
        runtime: see `load_exported`.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: the data set does not fit the file's network, or a package is missing.
    """
    model, about = load_exported(file, runtime)
    name = str(about.dataset.get("name", ""))
    if ":" in name and not any(word.startswith("dataset=") for word in words):
        raise ConfigError(f"{file}: its data set {name} is code that is not in the file\ntype dataset={name} to run it")
    node = override_dataset(about.dataset, words) if words else about.dataset
    own = Expected(about.shape, about.classes, about.mean, about.std, about.white, "file")
    data = other_dataset(own, node)
    with _threads(about.threads):
        batches = Loader(data, 1, 0, torch.device("cpu"), 0).unaugmented("test")
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
