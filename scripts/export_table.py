#!/usr/bin/env python3
"""Trains every method on digits, exports each run to every form, and prints tables of sizes and of times.

This takes some minutes.

    .venv/bin/python scripts/export_table.py [KEY=VALUE ...]

Methods that quantize activations have widths that the forms with integer arithmetic accept. Other methods have their
default widths. If a form refuses a run, the record states the reason. Stored runs are not repeated. The table shows `?`
for forms whose package is not installed.

Times are processor times for a batch of 64 images in one thread. They are relative to ONNX Runtime with the file `onnx`
of the float run. A time is a median over rounds in which all runtimes take turns.

`--run DIR` adds a row for a finished run with another network or data set. `--record FILE` stores the results.
`--from FILE` prints the tables of stored results and runs nothing. `--short` prints one table of some runs.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

from qbench.bits import Bits  # noqa: E402
from qbench.config import compose, groups  # noqa: E402

if TYPE_CHECKING:
    from qbench.runs.result import Result

FORMS = ("packed", "onnx", "int8", "qonnx", "integer")
OUT = "outputs/readme/export"
WORDS = ("epochs=10", "pretrain.epochs=20", f"out={OUT}", "runtime.tensorboard=false")
BITS = {
    "dorefa": ("w2a2", "w8a8"), "pact": ("w4a4",), "lsq": ("w2a2", "w8a8"), "gupta": ("w8a8g8",), "float": ("w32",),
}  # fmt: skip
"""Method -> widths in the table, for methods that are not run at their default widths."""
TIMED = (("packed", "numba"), ("onnx", "onnxruntime"), ("int8", "onnxruntime"), ("int8", "openvino"))
"""Forms and the runtimes in which they are timed."""
SHORT = ("dorefa w2a2", "xnor w1a1")
"""Rows of the short table."""
BATCH, ROUNDS, REPEAT = 64, 31, 5


@dataclass(frozen=True, kw_only=True)
class FormResult:
    """The result of an export: a file, or the reason why there is no file.

    `same_class` is the number of test images for which the file predicts the run's class. `times` has the relative time
    in each runtime; see the module's docstring.
    """

    bytes: int | None = None
    same_class: int | None = None
    reason: str = ""
    times: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: ideal bytes, bytes of the float network, number of test images, and the exported files by form.

    `network` names the network and the data set. It is empty for resnet8 on digits.
    """

    method: str
    bits: str
    ideal: float
    float_size: int
    images: int
    forms: Mapping[str, FormResult]
    network: str = ""


def measured_row(words: Sequence[str]) -> tuple[Path, Row]:
    """Train a run, if it is not stored, and export it to every form. Return its directory, which has the files."""
    import torch

    from qbench.experiment.context import RunContext
    from qbench.experiment.planned_run import planned_run
    from qbench.experiment.run import run

    torch.set_num_threads(1)
    (config,) = compose.configurations([*WORDS, *words])
    planned = planned_run(config)
    result = run(planned, RunContext())
    return planned.path, exported_row(planned.path, result)


def exported_row(directory: Path, result: "Result") -> Row:
    """Export a finished run to every form."""
    if result.cost is None:
        raise SystemExit(f"{directory}: {result.status}: {result.reason}")
    found = {form: form_result(directory, form) for form in FORMS}
    return Row(
        method=result.method, bits=str(Bits(**result.bits)), ideal=result.cost.bytes_ideal,
        float_size=result.cost.bytes_float, images=max(one.same_class or 0 for one in found.values()), forms=found,
    )  # fmt: skip


def other_row(directory: Path) -> Row:
    """Export a finished run whose data set is not digits. Its row names the network and the data, and has no times."""
    from qbench.runs.result import load_result

    result = load_result(directory)
    if result is None:
        raise SystemExit(f"{directory}: not a finished run")
    return replace(exported_row(directory, result), network=f"{result.model} on {result.dataset}")


def form_result(directory: Path, form: str) -> FormResult:
    """Export a run to one form."""
    from qbench.analysis.export import DEFAULT_NAMES, export
    from qbench.deploy.trace import NotExportable
    from qbench.errors import ConfigError

    try:
        done = export(directory, form, directory / DEFAULT_NAMES[form])
    except NotExportable as reason:
        return FormResult(reason=str(reason).partition("\n")[0])
    except ConfigError as missing:
        return FormResult(reason=f"? {missing}".partition("\n")[0])
    return FormResult(bytes=done.path.stat().st_size, same_class=done.agreement.same_class)


def timed_row(row: Row, directory: Path, float_directory: Path) -> Row:
    """Return a row with the relative times of its files."""
    import torch
    from measure import interleaved

    from qbench.analysis.export import DEFAULT_NAMES, load_exported
    from qbench.errors import ConfigError

    reference, about = load_exported(float_directory / DEFAULT_NAMES["onnx"], "onnxruntime")
    images = torch.randn(BATCH, *about.shape, generator=torch.Generator().manual_seed(0))
    contenders = {"reference": lambda: reference(images)}
    for form, runtime in TIMED:
        if row.forms[form].bytes is not None:
            try:
                network, _ = load_exported(directory / DEFAULT_NAMES[form], runtime)
            except ConfigError:  # no kernels for these widths, or the package is missing
                continue
            contenders[f"{form} {runtime}"] = lambda network=network: network(images)
    with torch.no_grad():
        ratios = interleaved(contenders, ROUNDS, repeat=REPEAT, clock=time.process_time)
    times = {name: round(ratio.median, 3) for name, ratio in ratios.items()}
    forms = {
        form: replace(found, times={r: times[f"{form} {r}"] for f, r in TIMED if f == form and f"{form} {r}" in times})
        for form, found in row.forms.items()
    }
    return replace(row, forms=forms)


def size_table(rows: Sequence[Row]) -> str:
    """Return a table with one row per run, which states the ideal bytes and the bytes of the file of each form."""
    lines = [
        f"| method | W A | float | ideal | {' | '.join(FORMS)} | same class |",
        f"| --- | --- | ---: | ---: |{' ---: |' * (len(FORMS) + 1)}",
    ]
    for row in rows:
        cells = [_size(row.forms[form]) for form in FORMS]
        agreeing = {one.same_class for one in row.forms.values() if one.same_class is not None}
        same = f"{min(agreeing)} of {row.images}" if agreeing else "-"
        numbers = f"{row.float_size:,} | {row.ideal:,.0f}"
        name = f"{row.method}, {row.network}" if row.network else row.method
        lines.append(f"| {name} | {_widths(row)} | {numbers} | {' | '.join(cells)} | {same} |")
    return "\n".join(lines)


def time_table(rows: Sequence[Row]) -> str:
    """Return a table with one row per run: the relative time of its files in each runtime."""
    lines = [
        f"| method | W A | {' | '.join(f'{form}: {runtime}' for form, runtime in TIMED)} |",
        f"| --- | --- |{' ---: |' * len(TIMED)}",
    ]
    for row in (row for row in rows if not row.network):
        cells = [_time(row, form, runtime) for form, runtime in TIMED]
        lines.append(f"| {row.method} | {_widths(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(rows: Sequence[Row]) -> str:
    """Return one table of sizes and times of the rows in `SHORT`."""
    lines = [
        "| method | W A | float | ideal | packed | int8 | same class | time: numba | onnx | int8 | int8, OpenVINO |",
        f"| --- | --- |{' ---: |' * 9}",
    ]
    for row in rows:
        if not row.network and f"{row.method} {row.bits.partition('g')[0]}" in SHORT:
            agreeing = [one.same_class for one in row.forms.values() if one.same_class is not None]
            numbers = (
                f"{row.float_size:,} | {row.ideal:,.0f} | {_size(row.forms['packed'])} | {_size(row.forms['int8'])}"
            )
            cells = " | ".join(_time(row, form, runtime) for form, runtime in TIMED)
            lines.append(f"| {row.method} | {_widths(row)} | {numbers} | {min(agreeing)} of {row.images} | {cells} |")
    return "\n".join(lines)


def _widths(row: Row) -> str:
    return " ".join(row.bits.partition("g")[0].removeprefix("w").split("a"))


def _time(row: Row, form: str, runtime: str) -> str:
    found = row.forms[form].times.get(runtime)
    return "-" if found is None else f"{found:.2f}"


def _size(found: FormResult) -> str:
    if found.bytes is not None:
        return f"{found.bytes:,}"
    return "?" if found.reason.startswith("?") else "-"


def tables(rows: Sequence[Row], note: str) -> str:
    """Return the tables of sizes and, if they were measured, of times, with what was run."""
    timed = any(form.times for row in rows for form in row.forms.values())
    return "\n\n".join([size_table(rows), *([time_table(rows)] if timed else []), note])


def note(rows: Sequence[Row]) -> str:
    """Return what was run."""
    from measure import processor, versions

    return (
        f"`scripts/export_table.py`: {sum(not row.network for row in rows)} runs on digits with resnet8, in bytes. A "
        "dash is a refused form. `same class`: test images for which the exported files predict the run's class, the "
        f"lowest number of all forms ({platform.system()}, {platform.machine()}, torch {version('torch')}). Second "
        f"table: processor time for {BATCH} images in one thread, relative to ONNX Runtime with the file `onnx` of the "
        f"float run, medians of {ROUNDS} interleaved rounds "
        f"({processor()}, {versions('onnxruntime', 'openvino', 'numba')}). A dash is a runtime that does not run the "
        "file."
    )


def loaded_rows(values: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of a record."""
    return [Row(**row | {"forms": {k: FormResult(**v) for k, v in row["forms"].items()}}) for row in map(dict, values)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="more overrides for all runs, such as model.width=4")
    parser.add_argument("--run", type=Path, action="append", default=[], metavar="DIR", help="add this finished run")
    parser.add_argument("--record", type=Path, metavar="FILE", help="store the results in FILE")
    parser.add_argument("--from", dest="stored", type=Path, metavar="FILE", help="print the table of stored results")
    parser.add_argument("--short", action="store_true", help="print one table of some runs")
    options = parser.parse_args()
    if options.stored:
        stored = json.loads(options.stored.read_text())
        found = loaded_rows(stored["rows"])
        print(short_table(found) if options.short else tables(found, stored["note"]))
        return 0
    os.chdir(ROOT)
    measured = []
    for method in groups.option_names("method"):
        for bits in BITS.get(method, ("",)):
            measured.append(measured_row([f"method={method}", *([f"bits={bits}"] if bits else []), *options.keys]))
    (float_directory,) = (directory for directory, row in measured if row.method == "float")
    rows = [timed_row(row, directory, float_directory) for directory, row in measured]
    rows += map(other_row, options.run)
    print(short_table(rows) if options.short else tables(rows, note(rows)))
    if options.record:
        record = {"rows": [asdict(row) for row in rows], "note": note(rows)}
        options.record.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
