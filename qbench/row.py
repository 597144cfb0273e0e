"""The row a person reads at the end of a run: float, quantized, difference, widths, size, BitOps, time."""

from collections.abc import Sequence

from qbench.record.run import Result

HEAD = (
    "method",
    "W",
    "A",
    "G",
    "levels",
    "bits/weight",
    "float",
    "quantized",
    "diff",
    "size",
    "BitOps",
    "time",
)


def table(results: Sequence[Result]) -> str:
    """Return a table of results, one line each, and under it where the runs lie and what to bear in mind."""
    rows = [HEAD, *(cells(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for result in results:
        lines.append(f"run   {result.run}")
        lines += [f"      {line}" for line in _remarks(result)]
    return "\n".join(lines)


def cells(result: Result) -> tuple[str, ...]:
    """Return the cells of a result, as `HEAD` names them; top-1 of the test split at the last epoch in percent."""
    bits = [str(result.bits[key]) for key in "wag"]
    if result.final is None or result.cost is None or result.wall_seconds is None:
        return (result.method, *bits, *[""] * 7, result.status)
    own, cost = result.final["test"]["top1"], result.cost
    base = result.float["final"]["test"]["top1"] if result.float else None
    parent = result.method == "float" and base is None
    return (
        result.method,
        *bits,
        str(result.levels or "-"),
        f"{cost['bits_per_weight']:.2f}",
        f"{own:.2f} %" if parent else "-" if base is None else f"{base:.2f} %",
        "-" if parent else f"{own:.2f} %",
        "-" if base is None else f"{own - base:+.2f}",
        f"{_short(cost['bytes_ideal'])}B of {_short(cost['bytes_float'])}B",
        f"{_short(cost['bitops'])} of {_short(cost['macs'] * 32 * 32)}",
        f"{result.wall_seconds:.1f} s",
    )


def _remarks(result: Result) -> list[str]:
    remarks = [result.reason] if result.reason else []
    remarks.append(f"{result.model} on {result.dataset}, seed {result.seed}: test top-1 after the last epoch")
    if result.made_data:
        remarks[-1] += "; made data, not for comparison with papers"
    return remarks + result.notes


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            return f"{number:.3g} {unit}".rstrip() if unit else f"{number:.3g} "
        number /= 1000
    raise AssertionError
