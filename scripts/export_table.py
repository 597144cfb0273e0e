#!/usr/bin/env python3
"""Trains every method on digits, exports each run to every form, and prints a table of sizes. This takes some minutes.

    .venv/bin/python scripts/export_table.py [KEY=VALUE ...]

Methods that quantize activations have widths that the forms with integer arithmetic accept; other methods have their
own default widths. A form that refuses a run has the reason in the record. Stored runs are not repeated. Forms whose
package is missing have a `?`.

`--record FILE` stores the results. `--from FILE` prints the table of stored results and runs nothing.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qbench.config import compose, groups  # noqa: E402

FORMS = ("packed", "onnx", "int8", "qonnx", "integer")
OUT = "outputs/readme/export"
WORDS = ("epochs=10", "pretrain.epochs=20", f"out={OUT}", "runtime.tensorboard=false")
BITS = {
    "dorefa": ("w2a2", "w8a8"), "pact": ("w4a4",), "lsq": ("w2a2", "w8a8"), "gupta": ("w8a8g8",), "float": ("w32",),
}  # fmt: skip
"""Method -> its widths in the table, if they are not its default widths."""


@dataclass(frozen=True, kw_only=True)
class FormResult:
    """The file of one form: its bytes, and the test images for which it predicts the run's class; or why there is none.

    More measurements, such as speed, are further fields.
    """

    bytes: int | None = None
    same_class: int | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run with its ideal size in bytes, the size of its float network, its test images, and its files by form."""

    method: str
    bits: str
    ideal: float
    float_size: int
    images: int
    forms: Mapping[str, FormResult]


def measured_row(words: Sequence[str]) -> Row:
    """Train a run, if it is not stored, and export it to every form."""
    import torch

    from qbench.experiment.context import RunContext
    from qbench.experiment.planned_run import planned_run
    from qbench.experiment.run import run

    torch.set_num_threads(1)
    (config,) = compose.configurations([*WORDS, *words])
    planned = planned_run(config)
    result = run(planned, RunContext())
    if result.cost is None:
        raise SystemExit(f"{planned.path}: {result.status}: {result.reason}")
    found = {form: form_result(planned.path, form) for form in FORMS}
    images = max(one.same_class or 0 for one in found.values())
    return Row(
        method=result.method, bits=str(config.bits.resolved()), ideal=result.cost.bytes_ideal,
        float_size=result.cost.bytes_float, images=images, forms=found,
    )  # fmt: skip


def form_result(directory: Path, form: str) -> FormResult:
    """Export a run to one form."""
    from qbench.analysis.export import DEFAULT_NAMES, export
    from qbench.deploy.trace import NotExportable
    from qbench.errors import ConfigError

    with tempfile.TemporaryDirectory() as folder:
        try:
            done = export(directory, form, Path(folder, DEFAULT_NAMES[form]))
        except NotExportable as reason:
            return FormResult(reason=str(reason).partition("\n")[0])
        except ConfigError as missing:
            return FormResult(reason=f"? {missing}".partition("\n")[0])
        return FormResult(bytes=done.path.stat().st_size, same_class=done.agreement.same_class)


def size_table(rows: Sequence[Row]) -> str:
    """Return a table with one row per run: ideal bytes, and for each form the bytes of its file."""
    lines = [
        f"| method | W A | float | ideal | {' | '.join(FORMS)} | same class |",
        f"| --- | --- | ---: | ---: |{' ---: |' * (len(FORMS) + 1)}",
    ]
    for row in rows:
        widths = " ".join(row.bits.partition("g")[0].removeprefix("w").split("a"))
        cells = [_size(row.forms[form]) for form in FORMS]
        agreeing = {one.same_class for one in row.forms.values() if one.same_class is not None}
        same = f"{min(agreeing)} of {row.images}" if agreeing else "-"
        numbers = f"{row.float_size:,} | {row.ideal:,.0f}"
        lines.append(f"| {row.method} | {widths} | {numbers} | {' | '.join(cells)} | {same} |")
    return "\n".join(lines)


def _size(found: FormResult) -> str:
    if found.bytes is not None:
        return f"{found.bytes:,}"
    return "?" if found.reason.startswith("?") else "-"


def note(rows: Sequence[Row]) -> str:
    """Return a sentence that states what was run."""
    return (
        f"`scripts/export_table.py`: {len(rows)} runs on digits with resnet8, in bytes. A dash is a refused form. "
        "`same class`: test images for which the exported files predict the run's class, the fewest of all forms "
        f"({platform.system()}, {platform.machine()}, torch {version('torch')})."
    )


def loaded_rows(values: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of a record."""
    return [Row(**row | {"forms": {k: FormResult(**v) for k, v in row["forms"].items()}}) for row in map(dict, values)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="more overrides for all runs, such as model.width=4")
    parser.add_argument("--record", type=Path, metavar="FILE", help="store the results in FILE")
    parser.add_argument("--from", dest="stored", type=Path, metavar="FILE", help="print the table of stored results")
    options = parser.parse_args()
    if options.stored:
        stored = json.loads(options.stored.read_text())
        print(f"{size_table(loaded_rows(stored['rows']))}\n\n{stored['note']}")
        return 0
    os.chdir(ROOT)
    rows = []
    for method in groups.option_names("method"):
        for bits in BITS.get(method, ("",)):
            rows.append(measured_row([f"method={method}", *([f"bits={bits}"] if bits else []), *options.keys]))
    print(f"{size_table(rows)}\n\n{note(rows)}")
    if options.record:
        record = {"rows": [asdict(row) for row in rows], "note": note(rows)}
        options.record.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
