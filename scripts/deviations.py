#!/usr/bin/env python3
"""Measures how much accuracy each known deviation of public code costs, compared with the paper's method.

Usage, after `scripts/test` made the environment:

    .venv/bin/python scripts/deviations.py                 # 10 seeds on glyphs; writes docs/deviations.md
    .venv/bin/python scripts/deviations.py --seeds 20      # more seeds; stored runs are not repeated
    .venv/bin/python scripts/deviations.py --quick         # on digits; only prints the table
    .venv/bin/python scripts/deviations.py --seeds 2 experiment=smoke dataset=digits out=/tmp/smoke
    .venv/bin/python scripts/deviations.py --record FILE   # also store the runs with the sha256 of their weights
    .venv/bin/python scripts/deviations.py --from FILE     # write docs/deviations.md from such a file; trains nothing

With --quick or with further keys of qbench, the script only prints the table.
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
from qbench.runs.reader import DONE, RunRecord, dump_records, read
from qbench.runs.result import Result

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (ROOT / "qbench/deviations").glob("[a-z]*.py") if path.stem != "registry")
GLYPHS = ("dataset=glyphs", "model.width=8", "model.stem_stride=2", "epochs=4", "runtime.tensorboard=false")
SOME_FAILED = 8  # exit status of a sweep in which some runs failed
HEAD = (
    "method", "widths", "deviation", "top-1 %", "points lost", "95 % CI", "p (Holm)", "n", "not done",
    "what it does", "source",
)  # fmt: skip

SeedRuns = dict[int, RunRecord]
"""Runs by seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, starting at 0")
    parser.add_argument("--quick", action="store_true", help="digits instead of glyphs")
    parser.add_argument("--record", type=Path, metavar="FILE", help="store the runs behind the document")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="read the runs from such a file")
    parser.add_argument("keys", nargs="*", help="further keys of qbench, such as out=DIRECTORY")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: must be 1 or more")
    common = {word.partition("=")[0]: word for word in (*([] if options.quick else GLYPHS), *options.keys)}
    common.setdefault("out", "out=outputs/deviations" + ("-quick" if options.quick else ""))
    out = ROOT / common["out"].partition("=")[2]
    sweeps = list(sweep_words(options.seeds, common.values()))
    start = time.perf_counter()
    for words in sweeps if options.source is None else ():
        print("qbench", *words, file=sys.stderr)
        status = subprocess.run([sys.executable, "-m", "qbench", *words], cwd=ROOT, stdout=sys.stderr).returncode
        if status not in (0, SOME_FAILED):
            raise SystemExit(f"qbench ended with status {status}")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    runs = read([str(options.source or out)])
    machine = json.loads(options.source.read_text("utf-8"))["machine"] if options.source else describe_machine(out)
    if options.record:
        values = json.loads(dump_records(runs)) | {"machine": machine}
        options.record.write_text(json.dumps(values, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
    table = deviations_table(runs, options.seeds)
    text = document(table, [f"qbench {' '.join(words)}" for words in sweeps], runs, machine)
    if options.quick or options.keys:
        print(text)
    else:
        (ROOT / "docs/deviations.md").write_text(text, encoding="utf-8")


def sweep_words(seeds: int, common: Iterable[str]) -> Iterable[list[str]]:
    """Yield the arguments of one sweep per method and widths.

    A sweep runs `deviation=none` and all measured deviations.
    """
    for method, bits, names in groups():
        yield [
            "-m", f"method={method}", f"bits={bits}", f"method.deviation={','.join(['none', *names])}",
            f"seed={','.join(map(str, range(seeds)))}", *common, "hydra/launcher=joblib",
        ]  # fmt: skip


def groups() -> Iterable[tuple[str, str, list[str]]]:
    """Yield (method, widths, deviations), with the deviations that are measured at these widths."""
    for method in METHODS:
        by_bits: dict[str, list[str]] = defaultdict(list)
        for name, deviation in deviations(method).items():
            by_bits[deviation.bits].append(name)
        for bits, names in by_bits.items():
            yield method, bits, names


def deviations_table(records: Sequence[RunRecord], seeds: int) -> Table:
    """Return the table of all deviations, from runs of one protocol.

    Points lost are the test top-1 of the paper's method minus the test top-1 with the deviation, after the last epoch.
    A seed is compared only if both its runs are done. Runs that are not done are counted and named. A run that does not
    exist is reported as missing.
    """
    runs = [run for run in records if run.result is not None and run.result.seed < seeds]
    protocols = {(r.result.dataset, r.result.model, r.result.protocol.hash) for r in runs if not _is_float(r)}
    if len(protocols) != 1:
        raise SystemExit(f"the runs belong to {len(protocols)} protocols or data sets; all runs must have the same")
    ((dataset, model, _),) = protocols
    settings: dict[tuple[str, str, str], SeedRuns] = defaultdict(dict)
    for run in runs:
        result = run.result
        settings[result.method, result.widths, result.options.get("deviation", "none")][result.seed] = run
    table = Table(HEAD, title=f"{model} on {dataset}")
    compared: list[tuple[int, Difference]] = []
    for method, bits, names in groups():
        widths = "".join(f"{key}{width or 32}" for key, width in parse_bits(bits).items())
        faithful = settings[method, widths, "none"]
        _add_row(table, method, bits, "none", faithful, None, seeds)
        for name in names:
            deviating = settings[method, widths, name]
            both = [s for s in range(seeds) if s in _top1(faithful) and s in _top1(deviating)]
            arms = [[_top1(arm)[s] for s in both] for arm in (faithful, deviating)]
            difference = paired(arms[0], arms[1]) if both else None
            if note := _no_effect(deviating, faithful):
                table.notes.append(f"{method} {bits} {name} {note}")
            elif difference and difference.n > 1:
                compared.append((len(table.rows), difference))
            _add_row(table, method, bits, name, deviating, difference, seeds)
    for (i, _), p in zip(compared, holm([d.p for _, d in compared]), strict=True):
        cells = zip(HEAD, table.rows[i], strict=True)
        table.rows[i] = tuple(f"{p:.2g}" if column == "p (Holm)" else cell for column, cell in cells)
    return table


def _add_row(
    table: Table, method: str, bits: str, name: str, runs: SeedRuns, difference: Difference | None, seeds: int
) -> None:
    """Add a row, and a note for each run that is not done."""
    top1 = list(_top1(runs).values())
    failed = Counter(runs[s].status if s in runs else "missing" for s in range(seeds) if s not in _top1(runs))
    known = deviations(method).get(name)
    has_interval = difference is not None and difference.n > 1 and difference.standard_error > 0
    table.rows.append(
        (
            method, bits, name,
            f"{mean(top1):.2f}" if top1 else "-",
            f"{difference.mean:+.2f}" if difference else "-",
            f"{difference.low:+.2f} to {difference.high:+.2f}" if difference and has_interval else "-",
            "-",
            str(difference.n if difference else len(top1) if name == "none" else 0),
            ", ".join(f"{count} {status}" for status, count in sorted(failed.items())) or "-",
            known.what if known else "as in the paper",
            known.source if known else "-",
        )
    )  # fmt: skip
    for seed, run in sorted(runs.items()):
        if run.status != DONE:
            reason = run.reason.partition("\n")[0]
            table.notes.append(f"{method} {bits} {name}, seed {seed}: {run.status}: {reason}")


def _no_effect(deviating: SeedRuns, faithful: SeedRuns) -> str:
    """Return a note if a deviation did not change the weights of any run, otherwise an empty text."""
    digests = [
        {
            s: run.result.weights_sha256
            for s, run in runs.items()
            if run.status == DONE and run.result and run.result.weights_sha256
        }
        for runs in (deviating, faithful)
    ]
    both = digests[0].keys() & digests[1].keys()
    same = sum(digests[0][s] == digests[1][s] for s in both)
    return f"had no effect: identical weights in {same} of {len(both)} seeds" if both and same == len(both) else ""


def _top1(runs: SeedRuns) -> dict[int, float]:
    """Return test top-1 after the last epoch by seed. Runs that are not done are left out."""
    return {s: run.result.final.test.top1 for s, run in runs.items() if run.status == DONE and run.result.final}


def _is_float(run: RunRecord) -> bool:
    result: Result | None = run.result
    return result is not None and result.method == "float"


def describe_machine(out: Path) -> str:
    """Return a text that describes the machine of the runs."""
    manifests = sorted(out.rglob("manifest.json"))
    if not manifests:
        raise SystemExit(f"{out}: no finished run")
    manifest = json.loads(manifests[0].read_text())
    torch = manifest["versions"]["torch"]
    return f"{os.cpu_count()} cores, {manifest['processor']}, {platform.system()}, torch {torch}"


def document(table: Table, commands: Sequence[str], runs: Sequence[RunRecord], machine: str) -> str:
    """Return the page, which explains the measurement and contains the table."""
    results = [run.result for run in runs if run.result]
    seconds = sum(result.wall_seconds or 0 for result in results)
    listed = "\n".join(f"    {line}" for line in commands)
    return f"""\
# What does a bug cost?

The public code of some methods deviates from the papers. This page shows how much accuracy each known deviation costs.
`method.deviation=NAME` trains the method with the deviation. Each run with a deviation is compared with the run of the
same method, widths and seed without the deviation. All other keys are the same. (With `affine_norm`, the batch
normalization of the float baseline also has scale and shift.)

The column `points lost` is the test top-1 without the deviation minus the test top-1 with the deviation, in percentage
points after the last epoch. If `points lost` is negative, the deviation gives a higher accuracy than the paper's
formula. The column `95 % CI` is Student's confidence interval for paired differences. The interval is not adjusted for
the number of rows. The null hypothesis of `p (Holm)` is that the deviation costs nothing. This p-value is two-sided and
adjusted for the number of rows. Failed and diverged runs are listed but not repeated. `points lost` is then a mean over
the seeds for which both runs are done. With another data set or another recipe, a deviation may cost more or less.

`scripts/deviations.py` wrote this page from {len(results)} runs, float baselines included.
The times of all runs add up to {seconds:.0f} s, with one thread per run ({machine}):

{listed}

{markdown([table])}
"""


if __name__ == "__main__":
    main()
