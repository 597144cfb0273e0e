"""Chooses one bit width per layer, so that the network meets a budget.

An allocation is a choice of one width for each layer. The results are a table of allocations, a table of layers, and a
file with the widths of one allocation. A run can be trained with this file.
"""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from qbench.analysis.bit_allocation import (
    Budget,
    BudgetInfeasible,
    allocate_widths,
    cost_range,
    largest_uniform_width,
    parse_budget,
    sum_over_layers,
)
from qbench.analysis.finished_run import bn_notes
from qbench.analysis.layer_sensitivity import (
    FloatBaseline,
    LayerSensitivity,
    load_float_baseline,
    measure_sensitivity,
)
from qbench.bits import FLOAT
from qbench.errors import ConfigError
from qbench.quant.method import Unsupported
from qbench.report.tables.table import Table
from qbench.report.tables.units import si_format
from qbench.system import files

HEAD = ("widths by", "bits", "bytes", "BitOps", "predicted loss", "measured loss", "top-1 %")
MARK = "# qbench sensitivity "
"""Start of the first line of every file of widths that this module writes."""
ACTIVATIONS = "a width is that of a layer's weights and activations; the run has {}"
MEASURES = {"loss": "loss", "mse": "weight MSE"}
LABELS = MEASURES | {"uniform": "uniform"}

Allocations = dict[str, dict[str, int] | None]
"""Measure or `uniform` -> width of each layer. The value of `uniform` is None if no uniform width meets the budget."""


def choose_widths(sensitivity: LayerSensitivity, budget: Budget) -> Allocations:
    """Return the best allocation by each measure and, for comparison, the best allocation with equal widths.

    Raises:
        ConfigError: no allocation meets the budget. The message states the lowest and the highest useful
            budget.
    """
    costs, rest = sensitivity.costs(budget.kind), sensitivity.rest[budget.kind]
    unit = sum(sensitivity.weights.values()) if budget.kind == "w" else 1
    limit = budget.limit * unit - rest
    try:
        by_loss = allocate_widths(sensitivity.loss, costs, limit)
        by_mse = allocate_widths(sensitivity.mse, costs, limit)
    except BudgetInfeasible:
        low, high = (_compact((rest + bound) / unit) for bound in cost_range(costs))
        raise ConfigError(
            f"--budget {budget}: too small; the lowest cost of these layers and widths is "
            f"{budget.kind}={low}\nallowed: {budget.kind}={low} to {budget.kind}={high} (a larger budget changes "
            f"nothing)"
        ) from None
    return {"loss": by_loss, "mse": by_mse, "uniform": largest_uniform_width(costs, limit)}


def sensitivity(
    run: Path,
    words: Sequence[str] = (),
    *,
    budget: str = "",
    measure: str = "loss",
    widths: Sequence[int] = tuple(range(1, 9)),
    images: int = 500,
    bn_stats: str = "recompute",
    out: str = "bits.yaml",
    device: str = "auto",
) -> list[Table]:
    """Choose one width per layer, write the widths to `out`, and return two tables.

    The first table shows the allocations, and the second table shows the layers.

    Args:
        run: the directory of the run.
        words: command-line overrides (`KEY=VALUE`) that replace the run's method or layer policy. They must name a
            method if the run is a float run.
        budget: `bytes=20k` or `bitops=1G` limits the cost of the whole network, and `w=3` limits the mean number of
            bits per weight. If empty, the limit is the width of the run's weights.
        measure: which allocation is written to the file. `loss` minimizes the sum of the layers' loss increases. The
            loss increase of a layer is measured with only this layer quantized. `mse` minimizes the squared error of
            the weights.
        widths: the allowed widths of a layer, in bits.
        images: number of validation images on which the loss is measured.
        bn_stats: `recompute` recomputes batch normalization statistics after quantization. `keep` keeps the stored
            statistics.
        out: the path of the written file.
        device: the device on which the network is measured, a value of `runtime.device`.
    """
    _check_out(Path(out))
    parsed = parse_budget(budget) if budget else None
    baseline = load_float_baseline(run, words, images=images, recompute_bn=bn_stats == "recompute", device=device)
    limit = parsed or Budget("w", baseline.setup.method.bits.w)
    try:
        measured = measure_sensitivity(baseline, widths)
        chosen = choose_widths(measured, limit)
        tables = [_allocations_table(run, baseline, measured, chosen, limit), _layers_table(measured, chosen)]
    except Unsupported as reason:
        raise ConfigError(str(reason)) from None
    accuracy = measured.float_accuracy
    in_file = ("layers=", "layers.rules")  # the file contains these rules
    added = [f"layers=@{out}", *(word for word in words if not word.lstrip("+").startswith(in_file))]
    tables[0].notes += [
        f"{baseline.images_note}; the float network: loss {accuracy.loss:.4f}, top-1 {accuracy.top1:.2f} %",
        *baseline.notes,
        "predicted: float loss plus the sum of the layers' loss increases; measured: loss with all layers quantized, "
        "without training",
        *bn_notes(baseline.model, baseline.bn_batches),
        *([ACTIVATIONS.format(baseline.setup.method.bits)] if baseline.setup.method.bits.a < FLOAT else []),
        f"the widths chosen by {MEASURES[measure]} are in {out}; to train with them, add {' '.join(added)} to the "
        f"run's command",
    ]
    measured_with = [f"--widths {','.join(map(str, widths))}", f"--images {images}", f"--bn-stats {bn_stats}"]
    command = " ".join([str(run), *words, f"--budget {limit}", f"--measure {measure}", *measured_with])
    files.write(Path(out), _rules_file(command, measure, chosen[measure] or {}, baseline, tables[0]).encode())
    return tables


def _compact(value: float) -> str:
    """Return a number as text that `--budget` accepts, with four digits and an SI prefix, such as 1.234G."""
    return si_format(value, digits=4, gap="")


def _allocations_table(
    run: Path, baseline: FloatBaseline, sensitivity: LayerSensitivity, chosen: Allocations, budget: Budget
) -> Table:
    """Return a table with the costs, the predicted loss and the measured loss of each allocation."""
    table = Table(HEAD, title=f"{run}: {baseline.setup.method_name}, not trained, under the budget {budget}")
    all_weights = sum(sensitivity.weights.values())
    for key, widths in chosen.items():
        if widths is None:
            table.notes.append("uniform: none of the widths that all layers support meets the budget")
            continue
        accuracy = baseline.measure(baseline.quantized(widths))
        bits = sum(k * sensitivity.weights[name] for name, k in widths.items()) / all_weights
        stored_bytes = sensitivity.rest["bytes"] + sum_over_layers(sensitivity.bytes, widths)
        bitops = sensitivity.rest["bitops"] + sum_over_layers(sensitivity.bitops, widths)
        predicted = sensitivity.float_accuracy.loss + sum_over_layers(sensitivity.loss, widths)
        table.values.append(
            {
                "widths_by": key, "bits": bits, "bytes": stored_bytes, "bitops": bitops, "predicted_loss": predicted,
                "measured_loss": accuracy.loss, "top1": accuracy.top1, "widths": widths,
            }
        )  # fmt: skip
        table.rows.append(
            (
                LABELS[key], f"{bits:.2f}", _compact(stored_bytes), _compact(bitops), f"{predicted:.4f}",
                f"{accuracy.loss:.4f}", f"{accuracy.top1:.2f}",
            )
        )  # fmt: skip
    return table


def _layers_table(sensitivity: LayerSensitivity, chosen: Allocations) -> Table:
    """Return a table with one row per layer.

    A row shows the layer's width in each allocation. It also shows the loss increase at each width when only this layer
    is quantized.
    """
    widths = sorted({width for layer in sensitivity.loss.values() for width in layer})
    head = ("layer", "weights", "loss", "MSE", "uniform", *(f"+ at {width}" for width in widths))
    table = Table(
        head, title="layers: chosen bits, and the loss increase at each width when only this layer is quantized"
    )
    for name, losses in sensitivity.loss.items():
        bits = {key: allocation[name] if allocation else None for key, allocation in chosen.items()}
        increases = [f"{losses[width]:+.4f}" if width in losses else "-" for width in widths]
        cells = ["-" if width is None else str(width) for width in bits.values()]
        table.rows.append((name, str(sensitivity.weights[name]), *cells, *increases))
        harm, mse = ({str(k): x for k, x in values[name].items()} for values in (sensitivity.loss, sensitivity.mse))
        table.values.append(
            {"layer": name, "weights": sensitivity.weights[name]} | bits | {"loss_increase": harm, "weight_mse": mse}
        )
    return table


def _check_out(out: Path) -> None:
    """Raise `ConfigError` if the file cannot be written, or if it exists and `sensitivity` has not written it."""
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: no such directory: {out.parent}")
    try:
        if out.exists() and not files.read(out).startswith(MARK.encode()):
            raise ConfigError(
                f"--out {out}: the file exists and was not written by qbench sensitivity, so it is not overwritten\n"
                f"choose another name with --out FILE"
            )
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from None


def _rules_file(command: str, measure: str, widths: Mapping[str, int], baseline: FloatBaseline, table: Table) -> str:
    """Return the text of the file of widths, which has the form of `layers.rules`.

    The chosen widths come first. They are followed by the layer rules of the run, which apply to all other layers.
    """
    criterion = "loss increases of single layers" if measure == "loss" else "squared errors of the weights"
    lines = [
        f"{MARK}{command}",
        f"# One width per layer. These widths have the smallest sum of {criterion} under the budget,",
        f"# measured with {baseline.setup.method_name} without training. For comparison, the widths chosen by",
        *("#   {}: {} bits, {} bytes, {} BitOps, predicted loss {}".format(*row) for row in table.rows),
        "# To train with these widths, add layers=@FILE to the run's command.",
    ]
    if baseline.setup.method.bits.a < FLOAT:
        lines.append(f"# {ACTIVATIONS.format(baseline.setup.method.bits)}")
    rules: dict[str, int | str] = {glob.escape(name): width for name, width in widths.items()}
    rules |= {key: width for key, width in baseline.setup.policy.rules.items() if key not in rules}
    return "\n".join(lines) + "\n" + yaml.safe_dump(rules, sort_keys=False)
