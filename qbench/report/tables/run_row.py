"""Formats the row that a run prints at its end: accuracies, widths, size, BitOps and time."""

from collections.abc import Sequence
from pathlib import Path

from qbench.report.tables.escape import printable
from qbench.report.tables.table import Table, text
from qbench.report.tables.units import si_format
from qbench.runs.result import Result, load_result

DEVIATIONS = ("deviation", "activation.deviation")
HEAD = ("method", "W", "A", "G", "levels", "bits/weight", "float", "quantized", "diff", "size", "BitOps", "time")


def row(results: Sequence[Result], width: int | None = None) -> str:
    """Return a table with one line per result, followed by the directories of the runs and remarks.

    If the table is wider than `width` characters, the result has one line per cell instead.
    """
    remarks = [line for result in results for line in _remarks(result)]
    table = text([Table(HEAD, [cells(result) for result in results])])
    if width is not None and max(map(len, table.splitlines())) > width:
        table = "\n\n".join(
            "\n".join(f"{name:<13}{printable(cell)}" for name, cell in zip(HEAD, cells(result), strict=True))
            for result in results
        )
    return "\n".join([table, *map(printable, remarks)])


def cells(result: Result) -> tuple[str, ...]:
    """Return the cells of a result's row, in the order of `HEAD`.

    Accuracies are test top-1 in percent after the last epoch.
    """
    bits = [str(result.bits[key]) for key in "wag"]
    if result.top1 is None or result.cost is None or result.wall_seconds is None:
        return (result.method, *bits, *[""] * 7, result.status)
    top1, cost, base = result.top1, result.cost, result.baseline_top1
    is_baseline = result.method == "float" and base is None
    return (
        result.method,
        *bits,
        str(result.levels or "-"),
        f"{cost.bits_per_weight:.2f}",
        f"{top1:.2f} %" if is_baseline else "-" if base is None else f"{base:.2f} %",
        "-" if is_baseline else f"{top1:.2f} %",
        "-" if base is None else f"{top1 - base:+.2f}",
        f"{si_format(cost.bytes_ideal)}B of {si_format(cost.bytes_float)}B",
        f"{si_format(cost.bitops)} of {si_format(cost.macs * 32 * 32)}",
        f"{result.wall_seconds:.1f} s",
    )


def _remarks(result: Result) -> list[str]:
    """Return remarks on a run: its directory, and either what the accuracy measures or why there is no accuracy."""
    trained = result.final is not None and result.final.epoch is not None
    when = "after the last epoch" if trained else "without training"
    top1 = f"{result.model} on {result.dataset}, seed {result.seed}: test top-1 {when}"
    if result.synthetic:
        top1 += "; synthetic data, not comparable with papers"
    remarks = result.reason.splitlines() if result.reason else [top1]
    remarks += [f"{key}={value}: not the paper's method" for key, value in result.options.items() if key in DEVIATIONS]
    remarks += result.notes + [f"warning: {warning}" for warning in result.warnings]
    remarks += [f"warning: float baseline: {text}" for text in _baseline_warnings(result)]
    return [f"run   {result.run}", *(f"      {line}" for line in remarks)]


def _baseline_warnings(result: Result) -> list[str]:
    """Return the warnings of a run's float baseline that the run does not have itself.

    For example, the baseline may have few training steps because of its own batch size.
    """
    if result.baseline is None or result.baseline.pretrained:
        return []
    baseline = load_result(Path(result.run).parent / Path(result.baseline.run).name)
    return [text for text in baseline.warnings if text not in result.warnings] if baseline else []
