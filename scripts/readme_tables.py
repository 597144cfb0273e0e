#!/usr/bin/env python3
"""Makes the documents' tables anew: runs the command in each marker and writes what came of it below.

A marker is `<!-- table: COMMAND -->`, its end `<!-- end -->`. Of a sweep the table is that of `qbench compare` over the
command's `out=`, without conclusions; a script of ours prints its own. Runs that are stored are not run again.

    .venv/bin/python scripts/readme_tables.py [WORD ...]     # only the tables whose command holds one of the words
    .venv/bin/python scripts/readme_tables.py --check        # runs nothing: tables of results against docs/records

docs/records holds what the tables of results were made from, so that anybody can make them again and look behind them.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qbench.report.comparison.compare import compare
from qbench.report.tables.table import markdown
from qbench.runs.reader import dump_records, load_records, read

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = "README.md", "docs/performance.md", "docs/reliability.md", "docs/unified.md"
MARKER = re.compile(r"(<!-- table: ((?:qbench|scripts/).*?) -->\n).*?(<!-- end -->)", re.DOTALL)
RECORDS = ROOT / "docs" / "records"
RECORDED = ("qbench", "scripts/every_method.py", "scripts/unified.py")
"""What tables of results begin with; the others are of timings and counts."""


def record_of(command: str) -> Path:
    """Return where the figures behind a command's table are kept."""
    named = re.search(r"out=\S*?([^/\s]+)(?:\s|$)", command)
    return RECORDS / f"{named[1] if named else Path(command.split()[0]).name}.json"


def shown(record: Path) -> str:
    """Return the table of a sweep, from its record."""
    return f"{markdown(compare(load_records(record)))}\n\n{json.loads(record.read_text())['note']}\n"


def table(command: str) -> str:
    """Run a sweep, keep its figures, return its table."""
    words = command.split()[1:]
    out = next(word.removeprefix("out=") for word in words if word.startswith("out="))
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "qbench", *words], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    print(f"{command}: {time.perf_counter() - began:.0f} s now", file=sys.stderr)
    os.chdir(ROOT)
    found = read([out])
    trained = sum(run.result.wall_seconds or 0 for run in found if run.result)
    written = [*Path(out).rglob("manifest.json"), *Path(out).rglob("result.json")]
    times = [path.stat().st_mtime for path in written]
    manifest = json.loads(next(Path(out).rglob("manifest.json")).read_text())
    where = (
        f"{os.cpu_count()} cores, {manifest['processor']}, {platform.system()}, torch {manifest['versions']['torch']}"
    )
    note = (
        f"`{command}`: {len(found)} runs, float parents and unsupported cells included; "
        f"{max(times) - min(times):.0f} s from first to last and {trained:.0f} s of work, one thread a run ({where})."
    )
    record = record_of(command)
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps(json.loads(dump_records(found)) | {"note": note}, separators=(",", ":")) + "\n")
    return shown(record)


def printed(command: str, *more: str) -> str:
    """Return what a script prints."""
    words = [sys.executable, *command.split(), *more]
    return subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def made(command: str, check: bool) -> str | None:
    """Return the text of a command's table; with `check` from its record, None for tables that have none."""
    record = record_of(command)
    if not command.startswith(RECORDED):
        return None if check else printed(command)
    if command.startswith("qbench"):
        return shown(record) if check else table(command)
    return printed(command, "--from" if check else "--record", str(record))


def main(wanted: Sequence[str]) -> int:
    check = "--check" in wanted
    wanted, stale = [word for word in wanted if word != "--check"], []

    def anew(found: re.Match[str]) -> str:
        command = found[2]
        text = None if wanted and not any(word in command for word in wanted) else made(command, check)
        if text is not None and f"{found[1]}{text}{found[3]}" != found[0]:
            stale.append(command)
        return found[0] if text is None else f"{found[1]}{text}{found[3]}"

    for document in (ROOT / name for name in DOCUMENTS):
        text = MARKER.sub(anew, document.read_text(encoding="utf-8"))
        if not check:
            document.write_text(text, encoding="utf-8")
    for command in stale if check else ():
        print(f"not as its record has it: {command}; run scripts/readme_tables.py", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
