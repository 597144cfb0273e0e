"""A finished run on its test split, or on other data: accuracy with its interval, calibration, predictions."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbench.analysis.finished_run import load_finished_run, loader
from qbench.analysis.overrides import dataset_node
from qbench.config import registry
from qbench.data.dataset import Dataset
from qbench.errors import ConfigError
from qbench.report.tables.table import Table
from qbench.system import files
from qbench.training.evaluation import evaluate as evaluate_model

HEAD = ("data", "weights", "n", "top-1 %", "95 % interval", "top-5 %", "loss", "ECE %")
BINS = 15
FIELDS = np.dtype([("index", "<i8"), ("label", "<i8"), ("predicted", "<i8"), ("probability", "<f4")])


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error in percent (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Args:
        confidence: (n,), the probability of the class that was predicted, in [0, 1].
        right: (n,), bool, whether it was the label.
        bins: of equal width, each open below and closed above.
    """
    place = (confidence.double() * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right.double() - confidence.double())
    return 100 * gaps.abs().sum().item() / len(confidence)


def interval(right: int, count: int) -> tuple[float, float]:
    """Return the exact 95 % interval (Clopper and Pearson 1934) of a share, in percent."""
    from scipy.stats import binomtest

    low, high = binomtest(right, count).proportion_ci(0.95, method="exact")
    return 100 * float(low), 100 * float(high)


def evaluate(
    run: Path, words: Sequence[str] = (), *, weights: str = "last", predictions: Path | None = None,
    device: str = "auto",
) -> Table:  # fmt: skip
    """Return one row: a finished run on the test split of its own data, or of the data set that words name.

    Args:
        predictions: a file to write, .csv or .npy: index, label, predicted class and its probability, of every image.

    Raises:
        ConfigError: the other data has another shape or other classes.
    """
    found = load_finished_run(run, weights, device)
    parts, data = found.parts, found.parts.data
    if words:
        data = _other(data, dataset_node(parts.config.dataset, words))
    answers: list[Tensor] = []
    confidence: list[Tensor] = []
    compute = parts.forward(found.model)

    def forward(images: Tensor) -> Tensor:
        logits = compute(images)
        confidence.append(logits.float().softmax(1).amax(1))
        return logits

    metrics = evaluate_model(found.model, loader(parts, data).unaugmented("test"), forward, answers)
    labels, predicted = torch.cat(answers).cpu().unbind(1)
    sure, right = torch.cat(confidence).cpu(), labels == predicted
    if predictions:
        write(predictions, labels, predicted, sure)
    assert metrics is not None  # the test split has images
    figures = {"n": len(labels), **asdict(metrics), "ece": calibration_error(sure, right)}
    return _table(run, weights, data, figures, interval(int(right.sum()), len(labels)), found.result, bool(words))


def _other(own: Dataset, node: Mapping[str, Any]) -> Dataset:
    """Return other data as the network knows its own: normalized alike."""
    data = registry.create("dataset", node)
    if not isinstance(data, Dataset):
        raise ConfigError(f"dataset={node['name']}: returned a {type(data).__name__}, not a Dataset")
    if (data.shape, data.classes) != (own.shape, own.classes):
        raise ConfigError(
            f"dataset={node['name']} has {data.classes} classes of {data.shape} images; the run knows {own.classes} "
            f"classes of {own.shape}\nallowed: data of the same shape and classes"
        )
    if not len(data.test):
        raise ConfigError(f"dataset={node['name']}: its test split is empty")
    return replace(data, mean=own.mean, std=own.std)


def _table(
    run: Path, weights: str, data: Dataset, figures: dict[str, Any], bounds: tuple[float, float], result: Any,
    other: bool,
) -> Table:  # fmt: skip
    low, high = bounds
    table = Table(HEAD, title=f"{run}: {result.method} {result.widths}, {result.model} trained on {result.dataset}")
    table.rows.append(
        (
            f"{data.name} test", weights, str(figures["n"]), f"{figures['top1']:.2f}", f"{low:.2f}-{high:.2f}",
            f"{figures['top5']:.2f}", f"{figures['loss']:.4f}", f"{figures['ece']:.2f}",
        )
    )  # fmt: skip
    table.values.append({"run": str(run), "data": data.name, "weights": weights, **figures, "low": low, "high": high})
    table.notes += [
        "this is the test split: not for selection; choose among runs by validation",
        "interval: Clopper-Pearson, of drawing these test images; other seeds are not in it",
        f"ECE: expected calibration error, {BINS} bins of equal width",
    ]
    if other:
        table.notes.append("normalized as the run's own data; class i here is taken for class i there")
    if data.synthetic:
        table.notes.append("made data: not for comparison with papers' tables")
    return table


def write(path: Path, labels: Tensor, predicted: Tensor, probability: Tensor) -> None:
    """Write predictions: a CSV with a head, or an array of records that numpy.load reads."""
    rows = np.empty(len(labels), FIELDS)
    rows["index"] = np.arange(len(labels))
    rows["label"], rows["predicted"], rows["probability"] = labels.numpy(), predicted.numpy(), probability.numpy()
    if path.suffix == ".npy":
        binary = io.BytesIO()
        np.save(binary, rows)
        files.write(path, binary.getvalue())
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS.names or ())
    writer.writerows((int(i), int(y), int(k), f"{p:.6g}") for i, y, k, p in rows.tolist())
    files.write(path, text.getvalue().encode())
