"""The row a person reads at the end of a run: float, quantized, difference, widths, size, BitOps, time."""

from collections.abc import Sequence

from qbench.report.tables.columns import si_format
from qbench.report.tables.table import Table, text
from qbench.runs.result import Result

DEVIATION = ("deviation", "activation.deviation")
HEAD = ("method", "W", "A", "G", "levels", "bits/weight", "float", "quantized", "diff", "size", "BitOps", "time")


def row(results: Sequence[Result], width: int | None = None) -> str:
    """Return a table of results, one line each, and under it where the runs lie and what to bear in mind.

    Where the table is wider than `width` columns, every result's cells stand one below the other.
    """
    notes = [line for result in results for line in _remarks(result)]
    wide = text([Table(HEAD, [cells(result) for result in results])])
    if width is not None and max(map(len, wide.splitlines())) > width:
        wide = "\n\n".join(
            "\n".join(f"{name:<13}{cell}" for name, cell in zip(HEAD, cells(result), strict=True)) for result in results
        )
    return "\n".join([wide, *notes])


def cells(result: Result) -> tuple[str, ...]:
    """Return the cells of a result, as `HEAD` names them; top-1 of the test split after the last epoch in percent."""
    bits = [str(result.bits[key]) for key in "wag"]
    if result.final is None or result.cost is None or result.wall_seconds is None:
        return (result.method, *bits, *[""] * 7, result.status)
    own, cost = result.final.test.top1, result.cost
    base = result.baseline_top1
    parent = result.method == "float" and base is None
    return (
        result.method,
        *bits,
        str(result.levels or "-"),
        f"{cost.bits_per_weight:.2f}",
        f"{own:.2f} %" if parent else "-" if base is None else f"{base:.2f} %",
        "-" if parent else f"{own:.2f} %",
        "-" if base is None else f"{own - base:+.2f}",
        f"{si_format(cost.bytes_ideal)}B of {si_format(cost.bytes_float)}B",
        f"{si_format(cost.bitops)} of {si_format(cost.macs * 32 * 32)}",
        f"{result.wall_seconds:.1f} s",
    )


def _remarks(result: Result) -> list[str]:
    top1 = f"{result.model} on {result.dataset}, seed {result.seed}: test top-1 after the last epoch"
    if result.synthetic:
        top1 += "; made data, not for comparison with papers"
    remarks = [result.reason] if result.reason else [top1]
    remarks += [f"{key}={value}: not the paper's method" for key, value in result.options.items() if key in DEVIATION]
    return [f"run   {result.run}", *(f"      {line}" for line in remarks + result.notes)]
