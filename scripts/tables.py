#!/usr/bin/env python3
"""Rebuild the tables in the documents: run the command in each marker, and write its output below the marker.

A table is between the markers `<!-- table: COMMAND -->` and `<!-- end -->`. If COMMAND is a sweep, the table is the
output of `qbench compare` for the sweep's folder `out`, without conclusions. `qbench compare RECORD ...` and the
scripts in this folder print their tables themselves. Stored runs are not repeated.

    .venv/bin/python scripts/tables.py [WORD ...]     # only the tables whose command contains one of the words
    .venv/bin/python scripts/tables.py --from-records # runs nothing: writes the tables from docs/records
    .venv/bin/python scripts/tables.py --check        # runs nothing: compares the tables with docs/records

docs/records contains the results behind the tables, so that everybody can rebuild and examine the tables.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qbench.cli.compare import run_compare
from qbench.report.comparison.compare import compare
from qbench.report.tables.table import markdown
from qbench.runs.reader import dump_records, load_records, read

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "docs/guides/export.md",
    *(f"docs/{name}.md" for name in ("performance", "reliability", "results", "unified")),
)
MARKER = re.compile(r"(<!-- table: ((?:qbench|scripts/).*?) -->\n).*?(<!-- end -->)", re.DOTALL)
RECORDS = ROOT / "docs" / "records"
RECORDED = ("qbench", "scripts/cifar10.py", "scripts/every_method.py", "scripts/export_table.py", "scripts/unified.py")
"""Prefixes of commands whose tables contain results of runs. Other tables contain timings and counts."""


def record_path(command: str) -> Path:
    """Return the path of the record with the results behind a command's table."""
    match = re.search(r"out=\S*?([^/\s]+)(?:\s|$)", command)
    return RECORDS / f"{match[1] if match else Path(command.split()[0]).stem}.json"


def table_from_record(record: Path) -> str:
    """Return the table of a sweep from its record."""
    return f"{markdown(compare(load_records(record)))}\n\n{json.loads(record.read_text())['note']}\n"


def table_from_sweep(command: str) -> str:
    """Run a sweep, store its results, and return its table."""
    words = command.split()[1:]
    out = next(word.removeprefix("out=") for word in words if word.startswith("out="))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "qbench", *words], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    print(f"{command}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    runs = read([out])
    seconds = sum(run.result.wall_seconds or 0 for run in runs if run.result)
    manifest = json.loads(next(Path(out).rglob("manifest.json")).read_text())
    torch = manifest["versions"]["torch"]
    machine = f"{os.cpu_count()} cores, {manifest['processor']}, {platform.system()}, torch {torch}"
    note = (
        f"`{command}`: {len(runs)} runs, which include float baselines and unsupported runs. "
        f"Sum of the times of the runs: {seconds:.0f} s, "
        f"with one thread per run ({machine})."
    )
    record = record_path(command)
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps(json.loads(dump_records(runs)) | {"note": note}, separators=(",", ":")) + "\n")
    return table_from_record(record)


def script_output(command: str, *more: str) -> str:
    """Return what a script prints."""
    words = [sys.executable, *command.split(), *more]
    return subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def table_text(command: str, stored: bool) -> str | None:
    """Return the text of a command's table. With `stored`, make it from a record, or return None without a record."""
    record = record_path(command)
    if command.startswith("qbench compare "):
        return run_compare(command.split()[2:]) + "\n"
    if not command.startswith(RECORDED):
        return None if stored else script_output(command)
    if command.startswith("qbench"):
        return table_from_record(record) if stored else table_from_sweep(command)
    return script_output(command, "--from" if stored else "--record", str(record))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only the tables whose command contains a WORD")
    parser.add_argument("--from-records", action="store_true", help="run nothing: write the tables from docs/records")
    parser.add_argument("--check", action="store_true", help="run nothing: compare the tables with docs/records")
    options = parser.parse_args(arguments)
    check, words, stored = options.check, options.words, options.check or options.from_records
    os.chdir(ROOT)
    changed: list[str] = []

    def rebuild(match: re.Match[str]) -> str:
        command = match[2]
        text = None if words and not any(word in command for word in words) else table_text(command, stored)
        if text is None:
            return match[0]
        if f"{match[1]}{text}{match[3]}" != match[0]:
            changed.append(command)
        return f"{match[1]}{text}{match[3]}"

    for document in (ROOT / name for name in DOCUMENTS):
        text = MARKER.sub(rebuild, document.read_text(encoding="utf-8"))
        if not check:
            document.write_text(text, encoding="utf-8")
    for command in changed if check else ():
        print(f"differs from its record: {command}; run scripts/tables.py --from-records", file=sys.stderr)
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
