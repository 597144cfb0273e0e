"""Exports a finished run to one file, and evaluates such a file.

An export is verified against the run on all test images before the file is written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qbench.analysis import verify_export
from qbench.analysis.evaluate import Expected, measure, other_dataset, table
from qbench.analysis.finished_run import FinishedRun, load_finished_run
from qbench.analysis.overrides import override_dataset
from qbench.data.dataset_check import dataset_notes, other_class_names
from qbench.data.loader import Loader
from qbench.deploy import packed
from qbench.deploy.about import About
from qbench.deploy.agreement import Agreement
from qbench.deploy.container import SUFFIX, kind_of
from qbench.deploy.integer_convert import to_integers
from qbench.deploy.integer_file import pack_integers, unpack_integers
from qbench.deploy.kernel_runtime import in_numba
from qbench.deploy.onnx_file import to_onnx
from qbench.deploy.runtimes import RUNTIMES, about_onnx
from qbench.deploy.trace import NotExportable, trace
from qbench.errors import CheckpointError, ConfigError
from qbench.experiment.builders import images_sha256
from qbench.report.tables.table import Table
from qbench.runs.directory import PACKED_FILE
from qbench.runs.result import load_result
from qbench.system import files
from qbench.training.digests import weights_sha256
from qbench.training.initial_weights import load_published


class Export(NamedTuple):
    """The path of an exported file, how well its outputs agree with the run's, and lines of text for the user."""

    path: Path
    agreement: Agreement
    lines: tuple[str, ...]


def export(run: Path, to: str = "packed", out: Path | None = None, *, weights: str = "last") -> Export:
    """Export a finished run to a file. The export is verified on the run's test images before the file is written.

    Args:
        run: the directory of the run.
        to: the form of the file, such as `packed` or `onnx`; see docs/guides/export.md.
        out: the path of the file. By default, the file is in the run's directory and has a name from `DEFAULT_NAMES`.
        weights: the run's checkpoint, `last` or `best`.

    Raises:
        NotExportable: the run cannot be exported to this form.
        CheckpointError: the run is damaged or not finished, or the exported network and the run compute different
            values.
    """
    finished = load_finished_run(run, weights, "cpu")
    if finished.changed:
        raise NotExportable(f"{finished.changed}\nto train the run again, add rerun=true to its command")
    if to == "integer" and finished.setup.data.train.dtype != torch.uint8:
        raise NotExportable(
            f"a file of the form integer takes 8-bit images, but {finished.setup.data.name} has float images\n"
            "choose another form, such as --to int8"
        )
    path = out or run / DEFAULT_NAMES[to]
    network, about = trace(finished.model, verify_export.first_images(finished, 5)), _about(finished, weights, to)
    verify_export.verify_trace(finished, network)
    if to == "packed":
        data = packed.pack_network(network, about)
        agreement, how = verify_export.verify_packed(finished, data, path)
    elif to == "integer":
        converted = to_integers(network, about)
        data = pack_integers(converted.network, about)
        agreement, how = verify_export.verify_integers(finished, network, converted, data, path)
    else:
        data = to_onnx(network, about)
        agreement, how = verify_export.verify_onnx(finished, about, network, data, path)
    files.write(path, data)
    cost = finished.result.cost
    sizes = f"; ideal {cost.bytes_ideal:,.0f}, float {cost.bytes_float:,}" if cost else ""
    how = [*how, *verify_export.accuracy_lines(finished, weights, agreement)]
    return Export(path, agreement, (f"wrote {path}: {len(data):,} bytes{sizes}", *how))


DEFAULT_NAMES: Mapping[str, str] = {
    "packed": PACKED_FILE, "onnx": "network.onnx", "int8": "network-int8.onnx",
    "qonnx": "network-qonnx.onnx", "integer": f"network-integer{SUFFIX}",
}  # fmt: skip
"""Form of an export -> default name of the file in the run's directory."""


def _about(finished: FinishedRun, weights: str, form: str) -> About:
    setup, result = finished.setup, finished.result
    data, config = setup.data, setup.config
    return About(
        form=form, title=f"{result.method} {result.widths}, {result.model} trained on {result.dataset}",
        identity=result.identity, weights=weights, dataset=dict(config.dataset), shape=data.shape,
        classes=data.classes, mean=data.mean, std=data.std, white=data.white,
        threads=config.runtime.threads, data_sha256=None if config.debug else result.data_sha256,
        debug=config.debug, class_names=data.class_names, weights_sha256=weights_sha256(finished.model.state_dict()),
    )  # fmt: skip


class _Exported(nn.Module):
    """An exported network as a module, in float32 on the CPU."""

    def __init__(self, function: Callable[[Tensor], Tensor], about: About) -> None:
        super().__init__()
        self.function, self.shape = function, about.shape

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of N images, of shape (N, classes).

        Raises:
            ConfigError: the shape of the images is not the shape that the network was trained on.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ConfigError(
                f"the images have shape {tuple(images.shape)}; the network in the file needs (N, {wanted})"
            )
        return self.function(images)


def load_exported(file: Path, runtime: str | None = None) -> tuple[nn.Module, About]:
    """Return the network of an exported file, and the network's description, which the file contains.

    The input of the network is a batch of N normalized images, of shape (N, C, H, W); see `About`.

    Args:
        runtime: `onnxruntime` (the default) or `openvino` for ONNX files, `numba` for packed files. Packed files run in
            torch by default. Files of the form qonnx always run in the package qonnx, and integer files always run in
            NumPy.

    Raises:
        CheckpointError: the file is missing, damaged or not an exported file.
        ConfigError: the runtime is not installed, or it does not run files of this form.
    """
    try:
        data = files.read(file)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    if file.suffix == ".onnx":
        if runtime == "numba":
            raise ConfigError(f"{file}: numba runs packed files, not ONNX files\ntype: qbench export RUN --to packed")
        about = about_onnx(data, str(file))
        if about.form == "qonnx" and runtime not in (None, "qonnx"):
            raise ConfigError(
                f"{file}: --runtime {runtime}: a file that was exported with --to qonnx runs only in the package qonnx"
            )
        runtime = runtime or ("qonnx" if about.form == "qonnx" else "onnxruntime")
        return _Exported(RUNTIMES[runtime](data, about, str(file)), about), about
    if kind_of(data) == "integer":
        if runtime:
            raise ConfigError(f"{file}: integer files run in NumPy only\nremove --runtime {runtime}")
        integers = unpack_integers(data, str(file))
        return _Exported(integers.function(), integers.about), integers.about
    if runtime not in (None, "numba"):
        raise ConfigError(
            f"{file}: {runtime} runs ONNX files; packed files run in torch, or with --runtime numba\n"
            "for an ONNX file: qbench export RUN --to int8"
        )
    content = packed.unpack_network(data, str(file))
    function = in_numba(content.network, content.about) if runtime else content.network.function()
    return _Exported(function, content.about), content.about


def evaluate_file(
    file: Path, words: Sequence[str] = (), *, predictions: Path | None = None, runtime: str | None = None
) -> Table:
    """Evaluate an exported file on the test split of a data set, and return a table with one row.

    Args:
        words: overrides (`KEY=VALUE`) that name another data set. If empty, the run's own data set is used.
        predictions: see `qbench.analysis.evaluate.evaluate`.
        runtime: see `load_exported`.

    Raises:
        CheckpointError: the file is damaged, or the images of the run's data set have changed since training.
        ConfigError: the data set does not fit the network in the file, or a package is missing.
    """
    model, about = load_exported(file, runtime)
    name = str(about.dataset.get("name", ""))
    if ":" in name and not any(word.startswith("dataset=") for word in words):
        raise ConfigError(
            f"{file}: the run's data set is your function {name}, and the file does not contain the function's code\n"
            f"to run that code, type dataset={name}"
        )
    node = override_dataset(about.dataset, words) if words else about.dataset
    own = Expected(about.shape, about.classes, about.mean, about.std, about.white, "file")
    data = other_dataset(own, node)
    if not words and about.data_sha256 not in (None, images_sha256(data)):
        raise CheckpointError(
            f"{file}: the images of dataset={name} have changed since the run was trained\n"
            f"restore the old images; to evaluate on the new ones, type dataset={name}"
        )
    with _threads(about.threads):
        batches = Loader(data, 1, 0, torch.device("cpu"), 0).unaugmented("test")
        measured = measure(model, model, batches, predictions)
    made = table(file, about.title, about.weights, data, measured, other=bool(words), debug=about.debug)
    if words:
        problems = [*dataset_notes(data), *other_class_names(about.class_names, data)]
        made.notes += [f"warning: {problem}" for problem in problems]
        made.notes.append(
            "the file does not contain the training images, so it is not known whether some of these test images are "
            "among them; to find out, evaluate the run: qbench evaluate RUN KEY=VALUE"
        )
    made.notes += [f"warning: {problem}" for problem in _other_weights(file, about)]
    verified = verify_export.VERIFIED_IN.get(about.form, ("torch",))
    if runtime in verified[1:]:  # the export needs the first of these packages alone
        made.notes.append(f"the export was verified in {runtime} only if this package was installed then")
    if runtime is None or runtime in verified:
        return made
    note = f"the export was verified in {' and '.join(verified)}, not in {runtime}, whose results may differ"
    return replace(made, notes=[*made.notes, note])


def _other_weights(file: Path, about: About) -> list[str]:
    """Return a warning if an exported file lies in the directory of its run and the run has other weights by now."""
    run = file.parent
    result = load_result(run)
    if result is None or result.identity != about.identity or about.weights_sha256 is None:
        return []
    try:
        now = weights_sha256(load_published(run, f"{about.weights}.pt")["model"])
    except (OSError, CheckpointError):
        return []
    if now == about.weights_sha256:
        return []
    return [
        f"the run was trained again after this file had been exported, so {run}/{about.weights}.pt contains other "
        f"weights; to replace the file, type: qbench export {run} --to {about.form}"
    ]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use as many threads as the export's verification.

    The last bits of sums depend on the number of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
