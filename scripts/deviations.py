#!/usr/bin/env python3
"""What does a bug cost? Trains every known public deviation beside the faithful method and compares them seed by seed.

Usage, after `scripts/test` made the environment:

    .venv/bin/python scripts/deviations.py                 # 10 seeds on glyphs; writes docs/deviations.md anew
    .venv/bin/python scripts/deviations.py --seeds 20      # more; runs that are stored are not run again
    .venv/bin/python scripts/deviations.py --quick         # on digits; prints the table, as it does with further keys
    .venv/bin/python scripts/deviations.py --seeds 2 experiment=smoke dataset=digits out=/tmp/smoke
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from qbench.config.fields import parse_bits
from qbench.deviations.registry import deviations
from qbench.report.statistics.differences import Difference, paired
from qbench.report.statistics.hypothesis_tests import holm
from qbench.report.tables.table import Table, markdown
from qbench.runs.reader import DONE, RunRecord, read
from qbench.runs.result import Result

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (ROOT / "qbench/deviations").glob("[a-z]*.py") if path.stem != "registry")
GLYPHS = ("dataset=glyphs", "model.width=8", "model.stem_stride=2", "epochs=4", "runtime.tensorboard=false")
WITH_FAILURES = 8  # exit status of a sweep of which some runs failed
HEAD = (
    "method", "widths", "deviation", "top-1 %", "points lost", "95 % interval", "p (Holm)", "n", "without a figure",
    "what it does", "source",
)  # fmt: skip

Cell = dict[int, RunRecord]
"""Runs by seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, from 0 on")
    parser.add_argument("--quick", action="store_true", help="digits in place of glyphs")
    parser.add_argument("keys", nargs="*", help="further keys of qbench, such as out=DIRECTORY")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds {given.seeds}: allowed is 1 or more")
    common = {word.partition("=")[0]: word for word in (*([] if given.quick else GLYPHS), *given.keys)}
    common.setdefault("out", "out=outputs/deviations" + ("-quick" if given.quick else ""))
    out = ROOT / common["out"].partition("=")[2]
    lines = list(commands(given.seeds, common.values()))
    began = time.perf_counter()
    for words in lines:
        print("qbench", *words, file=sys.stderr)
        status = subprocess.run([sys.executable, "-m", "qbench", *words], cwd=ROOT, stdout=sys.stderr).returncode
        if status not in (0, WITH_FAILURES):
            raise SystemExit(f"qbench ended with status {status}")
    print(f"{time.perf_counter() - began:.0f} s now", file=sys.stderr)
    text = document(table(read([str(out)]), given.seeds), [f"qbench {' '.join(words)}" for words in lines], out)
    if given.quick or given.keys:
        print(text)
    else:
        (ROOT / "docs/deviations.md").write_text(text, encoding="utf-8")


def commands(seeds: int, common: Iterable[str]) -> Iterable[list[str]]:
    """Yield the words of one sweep for every method and widths: all deviations that are to be seen there, and none."""
    for method, bits, names in groups():
        yield [
            "-m", f"method={method}", f"bits={bits}", f"method.deviation={','.join(['none', *names])}",
            f"seed={','.join(map(str, range(seeds)))}", *common, "hydra/launcher=joblib",
        ]  # fmt: skip


def groups() -> Iterable[tuple[str, str, list[str]]]:
    """Yield every method with widths and the deviations measured at these."""
    for method in METHODS:
        by_bits: dict[str, list[str]] = defaultdict(list)
        for name, deviation in deviations(method).items():
            by_bits[deviation.bits].append(name)
        for bits, names in by_bits.items():
            yield method, bits, names


def table(found: Sequence[RunRecord], seeds: int) -> Table:
    """Return the table of all deviations, from runs of one protocol; runs without a figure are counted and named.

    A point lost is one of test top-1 after the last epoch, the faithful method's minus the deviation's, over the seeds
    in which both have a figure. A run that is not there at all counts as missing.
    """
    runs = [run for run in found if run.result is not None and run.result.seed < seeds]
    kinds = {(r.result.dataset, r.result.model, r.result.protocol.hash) for r in runs if not _is_float(r)}
    if len(kinds) != 1:
        raise SystemExit(f"the runs are of {len(kinds)} protocols or data sets; read a folder that holds one")
    ((dataset, model, _),) = kinds
    cells: dict[tuple[str, str, str], Cell] = defaultdict(dict)
    for run in runs:
        result = run.result
        cells[result.method, result.widths, result.options.get("deviation", "none")][result.seed] = run
    made = Table(HEAD, title=f"{model} on {dataset}")
    compared: list[tuple[int, Difference]] = []
    for method, bits, names in groups():
        widths = "".join(f"{key}{width or 32}" for key, width in parse_bits(bits).items())
        faithful = cells[method, widths, "none"]
        _add(made, method, bits, "none", faithful, None, seeds)
        for name in names:
            cell = cells[method, widths, name]
            both = [s for s in range(seeds) if s in _figures(faithful) and s in _figures(cell)]
            arms = [[_figures(c)[s] for s in both] for c in (faithful, cell)]
            difference = paired(arms[0], arms[1]) if both else None
            if silent := _never_acted(cell, faithful):
                made.notes.append(f"{method} {bits} {name} {silent}")
            elif difference and difference.n > 1:
                compared.append((len(made.rows), difference))
            _add(made, method, bits, name, cell, difference, seeds)
    for (i, _), p in zip(compared, holm([d.p for _, d in compared]), strict=True):
        made.rows[i] = tuple(f"{p:.2g}" if key == "p (Holm)" else v for key, v in zip(HEAD, made.rows[i], strict=True))
    return made


def _add(made: Table, method: str, bits: str, name: str, cell: Cell, difference: Difference | None, seeds: int) -> None:
    """Add a row, and a note on the runs that have no figure."""
    figures = list(_figures(cell).values())
    without = Counter(cell[s].status if s in cell else "missing" for s in range(seeds) if s not in _figures(cell))
    known = deviations(method).get(name)
    sure = difference is not None and difference.n > 1
    made.rows.append(
        (
            method, bits, name,
            f"{mean(figures):.2f}" if figures else "-",
            f"{difference.mean:+.2f}" if difference else "-",
            f"{difference.low:+.2f} to {difference.high:+.2f}" if difference and sure else "-",
            "-",
            str(difference.n if difference else len(figures) if name == "none" else 0),
            ", ".join(f"{count} {status}" for status, count in sorted(without.items())) or "-",
            known.what if known else "as the paper has it",
            known.source if known else "-",
        )
    )  # fmt: skip
    for seed, run in sorted(cell.items()):
        if run.status != DONE:
            reason = run.reason.partition("\n")[0]
            made.notes.append(f"{method} {bits} {name}, seed {seed}: {run.status}: {reason}")


def _never_acted(cell: Cell, faithful: Cell) -> str:
    """Say so where a deviation left every pair of runs the same to the last bit."""
    digests = [
        {
            s: run.result.weights_sha256
            for s, run in one.items()
            if run.status == DONE and run.result and run.result.weights_sha256
        }
        for one in (cell, faithful)
    ]
    both = digests[0].keys() & digests[1].keys()
    same = sum(digests[0][s] == digests[1][s] for s in both)
    return f"never acted: the same weights in {same} of {len(both)} seeds" if both and same == len(both) else ""


def _figures(cell: Cell) -> dict[int, float]:
    return {s: run.result.final.test.top1 for s, run in cell.items() if run.status == DONE and run.result.final}


def _is_float(run: RunRecord) -> bool:
    result: Result | None = run.result
    return result is not None and result.method == "float"


def document(made: Table, lines: Sequence[str], out: Path) -> str:
    """Return the page: what was measured, how, where, and the table."""
    manifests = list(out.rglob("manifest.json"))
    results = list(out.rglob("result.json"))
    if not manifests or not results:
        raise SystemExit(f"{out}: no finished run")
    manifest = json.loads(manifests[0].read_text())
    trained = sum(json.loads(path.read_text())["wall_seconds"] or 0 for path in results)
    torch = manifest["versions"]["torch"]
    machine = f"{os.cpu_count()} cores, {manifest['processor']}, {platform.system()}, torch {torch}"
    listed = "\n".join(f"    {line}" for line in lines)
    return f"""\
# What does a bug cost?

Known deviations of public code from the papers, run as `method.deviation=NAME` and compared seed by seed with the
faithful method at the same widths, everything else equal. Points lost: test top-1 in percent after the last epoch, the
faithful method's minus the deviation's; the interval is Student's for paired differences, one row by itself; p is
two-sided against no loss, adjusted for the number of rows (Holm). Runs without a figure are counted, never replaced:
where runs diverged, the points are those of the seeds that did not. Where points are negative, the flaw does better
here than the paper's formula. With `affine_norm` the float parent has scale and shift too. What is lost on this data
set with this recipe need not be what is lost on another.

`scripts/deviations.py` makes this page anew. {len(results)} runs, float parents included, {trained:.0f} s of work, one
thread a run ({machine}):

{listed}

{markdown([made])}
"""


if __name__ == "__main__":
    main()
