"""Reads, compares and loads finished runs from Python, as the command line does."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.api.host import exclusive_call, torch_settings_restored
from qbench.api.words import Value, command_words
from qbench.cli.compare import build_tables, parse, write_files
from qbench.config.foreign_code import refuse_foreign_code
from qbench.errors import CheckpointError, ConfigError
from qbench.report.comparison.filters import matching_runs
from qbench.report.comparison.naming import run_keys
from qbench.report.tables.table import Table, numeric_columns, text
from qbench.runs.reader import RunRecord, read, with_baselines
from qbench.runs.result import Result

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from qbench.analysis.finished_run import FinishedRun

logger = logging.getLogger("qbench")

WEIGHTS = ("last", "best")


class Runs(tuple[RunRecord, ...]):
    """An immutable sequence of runs. The attribute `result` of an unfinished run is None."""

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one flat dictionary per run: status, method, bits, accuracies in percent, and costs.

        `top1` is the test accuracy after the last epoch. Keys such as `final.val.top1` and `best.test.top1` state the
        epoch (last or best) and the split. A dictionary also contains the configuration keys whose values differ
        between the runs, such as `optim.lr`. A run without a result has only `status`, `reason` and `run`.
        """
        keys = [run_keys(run.result) if run.result else {} for run in self]
        found = [known for known in keys if known]
        names = sorted({name for known in found for name in known})
        differing = [name for name in names if len({known.get(name) for known in found}) > 1]
        rows = []
        for run, known in zip(self, keys, strict=True):
            row = _row(run)
            row |= {name: json.loads(known.get(name, "null")) for name in differing if name not in row}
            rows.append(row)
        return rows

    def to_frame(self) -> "pandas.DataFrame":
        """Return a pandas table with one row per run. The columns are the keys of `to_dicts`.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise ConfigError(
                "to_frame needs pandas, which is not installed\nto install it: pip install pandas"
            ) from None
        return pandas.DataFrame(self.to_dicts())

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "no runs"


def absolute_paths(runs: Iterable[RunRecord]) -> Runs:
    """Return runs with absolute paths, which stay valid if the program changes its working directory."""
    return Runs(run if run.recorded else _absolute(run) for run in runs)


def _absolute(run: RunRecord) -> RunRecord:
    path = run.path.absolute()
    return replace(run, path=path, result=replace(run.result, run=str(path)) if run.result else None)


class Tables(tuple[Table, ...]):
    """The tables of a comparison, which print as text and are shown as HTML in a notebook."""

    def __str__(self) -> str:
        return text(self) if self else "no runs found"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(map(_html, self)) or "no runs found"


def load(*words: str | Path, **keys: Value) -> Runs:
    """Return the runs that are stored in directories or in record files, sorted by path.

    Example:
        >>> runs = qbench.load("outputs")
        >>> runs = qbench.load("outputs", "method=dorefa,lsq", "bits.w=2")

    Args:
        words: directories, record files (written by `qbench compare --format record`), and filters `KEY=VALUE,...` as
            typed for `qbench compare`.
        keys: filters as keyword arguments: key -> value or values.

    Raises:
        ConfigError: a directory does not exist, or a filter names a key or value that no run has.
    """
    options = parse(command_words("load", words, keys))
    if not options.directories:
        raise ConfigError('load needs a directory of runs, such as: qbench.load("outputs")')
    runs, notes = matching_runs(read(options.directories), options.where)
    for note in notes:
        logger.warning(note)
    return absolute_paths(runs)


def compare(
    *places: str | Path | Result | RunRecord | Iterable[RunRecord],
    by: str | Sequence[str] = (),
    sort: str = "",
    columns: str | Sequence[str] = (),
    margin: float | None = None,
    published: bool = False,
    html: str | Path | None = None,
    plot: str | Path | None = None,
    **keys: Value,
) -> Tables:
    """Return the tables that `qbench compare` prints, with notes on significant differences.

    Example:
        >>> tables = qbench.compare("outputs", "method=dorefa,lsq", columns="accuracy")
        >>> tables = qbench.compare(runs)

    Args:
        places: directories, record files, filters `KEY=VALUE,...`, and runs as `run`, `sweep` and `load` return them.
            The float baselines of runs are read too.
        by: configuration keys. There is one table for each combination of their values.
        sort: the column by which rows are sorted.
        columns: names of sets of columns, such as `accuracy`.
        margin: two settings (rows of a table) are equivalent if their top-1 differs by less than this number of points.
        published: whether to add the published result of each setting.
        html: a .html file to which the comparison is written as one page.
        plot: a .png, .pdf or .svg file to which plots are written.
        keys: filters as keyword arguments: key -> value or values.

    Raises:
        ConfigError: a directory, key or value does not exist, or there are no runs.
    """
    names: list[str | Path] = []
    records: list[RunRecord] = []
    for place in places:
        if isinstance(place, str | Path):
            names.append(place)
        elif isinstance(place, Result):
            records += read([place.run])
        else:
            records += [place] if isinstance(place, RunRecord) else place
    words = command_words("compare", names, keys)
    flags = {"by": by, "sort": sort, "columns": columns, "margin": margin, "html": html, "plot": plot}
    for flag, value in flags.items():
        if value not in (None, "", (), []):
            typed = value if isinstance(value, str | Path | float | int) else ",".join(value or ())
            words.append(f"--{flag}={typed}")
    options = parse([*words, *(["--published"] if published else [])])
    made, runs = build_tables(options, with_baselines(records))
    write_files(options, made, runs)
    return Tables(made)


def load_model(
    run: str | Path | RunRecord | Result, *, weights: str = "last", device: str = "auto", trust: bool = False
) -> "nn.Module":
    """Return the quantized network of a finished run in eval mode. `qbench evaluate` uses the same network.

    The network computes with quantized weights and activations. Its input is a batch of images with the shape of the
    run's images, whose pixel values are scaled to [0, 1] and then normalized:

        (images / 255 - network.image_mean) / network.image_std

    Float images of a user's data set are not divided by 255. The attributes `image_mean` and `image_std`, of shape
    (C, 1, 1), are the constants of the run's data set. The attribute `image_shape` is (C, H, W). The attribute
    `class_names` contains the name of each class, and is empty if the data set has no names. The function
    `network.prepare(image)` reads a file or a PIL image, and returns the input of the network, (1, C, H, W). It
    resizes, crops and normalizes the image as the run does with its test images. If the data set is not part of qbench,
    only its own code knows how images are resized, so the image must have H x W pixels already. If the run's images are
    floats, or do not have one or three channels, there is no such function. The data set itself is not needed.

    Args:
        run: a run, its result or its directory.
        weights: `last` for the weights of the last epoch, `best` for the weights with the best validation accuracy.
        device: where the network is placed: `auto`, `cpu`, `cuda` or `cuda:1`.
        trust: whether to allow code outside qbench that the run's configuration names.

    Raises:
        ConfigError: an argument is not valid, the run names code that is not trusted, or the run has no best epoch.
        CheckpointError: the run is not finished, a file is missing or damaged, or the directory does not contain the
            weights of the given result.
    """
    with exclusive_call(), torch_settings_restored(training=False):
        import torch

        from qbench.data import svhn
        from qbench.data.images import prepare_image
        from qbench.experiment.device import HALF_TYPES, as_half_network

        finished = _finished_run(run, weights, device, trust, images=False)
        data, network = finished.setup.data, finished.model
        constants = torch.tensor([data.mean, data.std], device=finished.setup.device)[:, :, None, None]
        network.image_mean, network.image_std = constants
        network.image_shape, network.class_names = data.shape, list(data.class_names)  # type: ignore[assignment]
        if data.white != 1 and data.shape[0] in (1, 3):
            node = finished.setup.config.dataset  # a user's function may have an argument `resize` of another meaning
            # code that is not part of qbench, or SVHN, which is made smaller without averaging pixels
            shrunk = node["name"] == "svhn" and node["size"] < svhn.SIDE
            own = str(node["name"]) if "source" in node or shrunk else ""
            side = None if own else node.get("resize")
            prepare = partial(
                prepare_image, shape=data.shape, side=side, mean=constants[0], std=constants[1], prepared_by=own
            )
            network.prepare = prepare  # type: ignore[assignment]
        dtype = HALF_TYPES.get(finished.setup.runtime.precision)
        return network if dtype is None else as_half_network(network, dtype)


def load_finished_run(
    run: str | Path | RunRecord | Result, *, weights: str = "last", device: str = "auto", trust: bool = False
) -> "FinishedRun":
    """Return the result, the setup and the network of a finished run, for analyses of your own.

    In contrast to `load_model`, the images of the run's data set are needed. `setup.loader().unaugmented("test")`
    returns batches of them, as the network reads them. The network computes in float32. The arguments and errors are
    those of `load_model`.

    Raises:
        DataError: the run's data set is missing.
    """
    with exclusive_call(), torch_settings_restored(training=False):
        return _finished_run(run, weights, device, trust, images=True)


def _finished_run(
    run: str | Path | RunRecord | Result, weights: str, device: str, trust: bool, *, images: bool
) -> "FinishedRun":
    """Return a finished run; see `load_model` for the arguments and errors."""
    from qbench.analysis import finished_run

    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights}: must be {' or '.join(WEIGHTS)}")
    path = run.path if isinstance(run, RunRecord) else Path(run.run if isinstance(run, Result) else run)
    if not trust:
        refuse_foreign_code(path, str(path), "to run that code: trust=True")
    finished = finished_run.load_finished_run(path, weights, device, images=images)
    expected = run.result if isinstance(run, RunRecord) else run if isinstance(run, Result) else finished.result
    if expected is not None and expected.weights_sha256 != finished.result.weights_sha256:
        raise CheckpointError(
            f"{path} contains other weights than the result that was passed, because the run was repeated or the "
            "working directory was changed\npass the directory of the run, as an absolute path"
        )
    if finished.changed:
        logger.warning("%s", finished.changed)
    return finished


def _row(run: RunRecord) -> dict[str, object]:
    """Return the values of a run that are in every row of `to_dicts`."""
    result = run.result
    row: dict[str, object] = {"status": run.status, "reason": run.reason or None, "run": str(run.path)}
    if result is None:
        return row
    row |= {"method": result.method, "bits": result.widths, **{f"bits.{key}": result.bits[key] for key in "wag"}}
    row |= {"dataset": result.dataset, "model": result.model, "seed": result.seed}
    row |= {"top1": result.top1, "baseline_top1": result.baseline_top1}
    for name, evaluation in (("final", result.final), ("best", result.best)):
        for split in ("test", "val"):
            if accuracy := getattr(evaluation, split, None):
                row |= {f"{name}.{split}.{key}": value for key, value in asdict(accuracy).items()}
    return row | (asdict(result.cost) if result.cost else {}) | {"wall_seconds": result.wall_seconds}


def _html(table: Table) -> str:
    """Return a table as HTML with its title and notes."""
    parts = [f"<p><b>{escape(table.title)}</b></p>"] if table.title else []
    if table.rows:
        aligned = [f' style="text-align: {"right" if numeric else "left"}"' for numeric in numeric_columns(table)]
        lines = [("th", table.head), *(("td", row) for row in table.rows)]
        cells = [
            "".join(f"<{tag}{style}>{escape(cell)}</{tag}>" for cell, style in zip(row, aligned, strict=True))
            for tag, row in lines
        ]
        parts.append(f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>")
    return "".join([*parts, *(f"<p>{escape(note)}</p>" for note in table.notes)])
