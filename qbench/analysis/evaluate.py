"""Evaluates a finished run on the test split of its data set or of another data set.

The module computes accuracy, calibration error and predictions.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qbench.analysis.finished_run import load_finished_run
from qbench.analysis.overrides import override_dataset
from qbench.config.schema import Node
from qbench.data.dataset import Dataset
from qbench.data.dataset_check import dataset_notes, other_class_names, trained_images
from qbench.errors import ConfigError
from qbench.experiment.builders import build_dataset
from qbench.experiment.setup import image_warnings
from qbench.quant.probe import Batch
from qbench.report.tables.table import Table
from qbench.runs.result import Accuracy
from qbench.system import files
from qbench.training.evaluation import evaluate as evaluate_model

HEAD = ("data", "weights", "n", "top-1 %", "95 % interval", "top-5 %", "loss", "ECE %")
BINS = 15
PREDICTION_FIELDS = np.dtype([("index", "<i8"), ("label", "<i8"), ("predicted", "<i8"), ("probability", "<f4")])


@dataclass(frozen=True)
class EvaluatedSplit:
    """Results of a network on n test images.

    `low` and `high` are the ends of the 95 % confidence interval of top-1. `low`, `high` and `calibration_error` are in
    percent.
    """

    n: int
    accuracy: Accuracy
    low: float
    high: float
    calibration_error: float


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error in percent (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Args:
        confidence: probability of the predicted class for n images, of shape (n,), in [0, 1].
        correct: whether the predicted class equals the label, bool of shape (n,).
        bins: number of bins of equal width. A bin includes its upper end but not its lower end.
    """
    index = (confidence.double() * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, correct.double() - confidence.double())
    return 100 * gaps.abs().sum().item() / len(confidence)


def proportion_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the lower and upper end of the exact 95 % confidence interval of a proportion, in percent.

    Source: Clopper and Pearson 1934.
    """
    from scipy.stats import binomtest

    low, high = binomtest(correct, count).proportion_ci(0.95, method="exact")
    return 100 * float(low), 100 * float(high)


def evaluate(
    run: Path, words: Sequence[str] = (), *, weights: str = "last", predictions: Path | None = None,
    device: str = "auto",
) -> Table:  # fmt: skip
    """Evaluate a finished run on a test split, and return a table with one row.

    Args:
        run: the directory of the run.
        words: command-line overrides (`KEY=VALUE`) that name another data set. If empty, the run's data set is used.
        weights: `best` or `last`, the checkpoint that is evaluated.
        predictions: a .csv or .npy file to write, or None. For every image, the file contains the index, the label,
        the predicted class and the probability of this class.

    Raises:
        ConfigError: the other data set has a different image shape or different classes.
    """
    finished = load_finished_run(run, weights, device)
    setup, data, result = finished.setup, finished.setup.data, finished.result
    if words:
        own = Expected(data.shape, data.classes, data.mean, data.std, data.white, "run")
        data = other_dataset(own, override_dataset(setup.config.dataset, words))
    batches = setup.loader(data).unaugmented("test")
    measured = measure(finished.model, setup.forward(finished.model), batches, predictions)
    problems = []
    if words:
        classes = other_class_names(setup.data.class_names, data)
        problems = [*dataset_notes(data), *trained_images(setup.data, data), *classes]
    trained = f"{result.method} {result.widths}, {result.model} trained on {result.dataset}"
    debug = setup.config.debug
    evaluated = table(run, trained, weights, data, measured, other=bool(words), debug=debug)
    problems += [*image_warnings(result), *filter(None, [finished.changed])]
    evaluated.notes += [f"warning: {problem}" for problem in problems]
    stored = result.final if weights == "last" else result.best
    if not words and stored and stored.test.top1 != measured.accuracy.top1:
        evaluated.notes.append(
            f"result.json has {stored.test.top1:.2f} % for these weights and images; the difference can come from "
            "another device or software version, or from a network whose output depends on more than its weights"
        )
    return evaluated


class Expected(NamedTuple):
    """The properties that a data set must have to fit a network; see `Dataset`.

    `owner` says where the network comes from, for messages: `run` or `file`.
    """

    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: int
    owner: str


def other_dataset(own: Expected, node: Node) -> Dataset:
    """Return the data set that `node` names.

    The images are normalized with the constants of the network's training data.

    Raises:
        ConfigError: the data set has a different image shape or different classes, or no test images.
    """
    data = build_dataset(dict(node))
    if (data.shape, data.classes) != (own.shape, own.classes):
        raise ConfigError(
            f"dataset={node['name']} has {data.classes} classes and images of shape {data.shape}; the {own.owner} has "
            f"{own.classes} classes and images of shape {own.shape}\nallowed: data sets with the same shape and classes"
        )
    if data.white != own.white:
        kinds = {255: "8-bit images", 1: "float images"}
        raise ConfigError(
            f"dataset={node['name']} has {kinds[data.white]}; the {own.owner} was trained on {kinds[own.white]}; "
            "the two kinds need different normalization"
        )
    if not len(data.test):
        raise ConfigError(f"dataset={node['name']}: the test split is empty; choose another data set")
    return replace(data, mean=own.mean, std=own.std)


def measure(
    model: nn.Module, compute: Callable[[Tensor], Tensor], batches: Iterable[Batch], predictions: Path | None
) -> EvaluatedSplit:
    """Return a network's results on the test images in `batches`.

    If `predictions` is a path, write the predictions to this path.
    """
    answers: list[Tensor] = []
    batch_confidences: list[Tensor] = []

    def forward(images: Tensor) -> Tensor:
        logits = compute(images)
        batch_confidences.append(logits.float().softmax(1).amax(1))
        return logits

    accuracy = evaluate_model(model, batches, forward, answers)
    labels, predicted = torch.cat(answers).cpu().unbind(1)
    confidence, correct = torch.cat(batch_confidences).cpu(), labels == predicted
    if predictions:
        write_predictions(predictions, labels, predicted, confidence)
    assert accuracy is not None  # the test split has images
    low, high = proportion_interval(int(correct.sum()), len(labels))
    return EvaluatedSplit(len(labels), accuracy, low, high, calibration_error(confidence, correct))


def table(
    place: Path, trained: str, weights: str, data: Dataset, measured: EvaluatedSplit, *, other: bool, debug: bool
) -> Table:  # fmt: skip
    """Return the table of one network's results.

    Args:
        place: the path of the run or of the exported file.
        trained: a text that names the method, the widths, the network and its training data set.
        other: whether `data` is not the data set of the run.
        debug: whether the run had debug=true.
    """
    accuracy, ece = measured.accuracy, measured.calibration_error
    table = Table(HEAD, title=f"{place}: {trained}")
    table.rows.append(
        (
            f"{data.name} test", weights, str(measured.n), f"{accuracy.top1:.2f}",
            f"{measured.low:.2f}-{measured.high:.2f}", f"{accuracy.top5:.2f}" if data.classes > 5 else "-",
            f"{accuracy.loss:.4f}", f"{ece:.2f}",
        )
    )  # fmt: skip
    table.values.append(
        {"run": str(place), "data": data.name, "weights": weights, "n": measured.n}
        | asdict(accuracy)
        | {"ece": ece, "low": measured.low, "high": measured.high}
    )
    table.notes += [
        "these are test results: select runs by validation accuracy, not by this table",
        "95 % interval: Clopper-Pearson confidence interval over test images, without the variation between seeds",
        f"ECE: expected calibration error, {BINS} bins of equal width",
    ]
    if other:
        table.notes.append(
            "images are normalized with the constants of the run's data set; class i of this data set counts as class "
            "i of the run's data set"
        )
    if debug:
        table.notes.append("warning: with debug=true, training has only one step, so the accuracy means nothing")
    if data.synthetic:
        table.notes.append("synthetic data: not comparable with papers' tables")
    return table


def write_predictions(path: Path, labels: Tensor, predicted: Tensor, probability: Tensor) -> None:
    """Write predictions as a CSV file with a header, or as a structured array for numpy.load."""
    rows = np.empty(len(labels), PREDICTION_FIELDS)
    rows["index"] = np.arange(len(labels))
    rows["label"], rows["predicted"], rows["probability"] = labels.numpy(), predicted.numpy(), probability.numpy()
    if path.suffix == ".npy":
        binary = io.BytesIO()
        np.save(binary, rows)
        files.write(path, binary.getvalue())
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(PREDICTION_FIELDS.names or ())
    writer.writerows((int(i), int(y), int(k), f"{p:.6g}") for i, y, k, p in rows.tolist())
    files.write(path, text.getvalue().encode())
