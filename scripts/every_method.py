#!/usr/bin/env python3
"""Runs every method at every legal width on digits, three seeds, and prints the table: one command, some minutes.

Every width of weights, activations and gradients that a method knows is run alone, the others at 32 bits; every run is
verified, and the exit status says whether all were. Runs that are stored are not run again. Usage, after scripts/test
made the environment: .venv/bin/python scripts/every_method.py [KEY=VALUE ...]

`--record FILE` keeps the figures, `--from FILE` prints the table of those kept and runs nothing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from qbench.config import groups

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qbench.bits import FLOAT, Bits  # noqa: E402
from qbench.config import compose  # noqa: E402
from qbench.experiment.builders import build_method  # noqa: E402
from qbench.runs.reader import DONE, read  # noqa: E402
from qbench.runs.result import Result  # noqa: E402

OUT = "outputs/readme/every"
WORDS = [
    "epochs=10",
    "pretrain.epochs=30",
    "seed=0,1,2",
    f"out={OUT}",
    "hydra/launcher=joblib",
    "runtime.tensorboard=false",
]
KINDS = {"w": "weights", "a": "activations", "g": "gradients"}


def widths(method: str) -> list[str]:
    """Return every legal width of each kind alone."""
    (config,) = compose.configurations([f"method={method}"])
    legal = build_method(config.method, config.activation, config.bits.resolved()).supported_bits
    single = (Bits(**{key: k}) for key in "wag" for k in range(1, FLOAT) if k in legal.get(key, ()))
    return [str(bits) for bits in single]


def run(method: str, more: list[str]) -> None:
    known = widths(method)
    words = ["-m", f"method={method}", *([f"bits={','.join(known)}"] if known else []), *WORDS, *more]
    done = subprocess.run([sys.executable, "-m", "qbench", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        print(f"{method}: qbench ended with status {done.returncode}", file=sys.stderr)


def figures(results: list[Result]) -> list[list[Any]]:
    """Return of each run method, network, widths and test top-1, which is all that the table is made from."""
    return [[r.method, r.network, r.bits, r.top1] for r in results if r.final]


def table(rows: list[list[Any]]) -> str:
    """Return the matrix: a row for what a method quantizes, a column for every width, mean test top-1 in each cell."""
    cells: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    parents: dict[str, list[float]] = defaultdict(list)
    for method, network, bits, top1 in rows:
        if method == "float":
            parents["float " + " ".join(f"{k}={v}" for k, v in network.items())].append(top1)
            continue
        (key,) = [key for key in "wag" if bits[key] < FLOAT]
        cells[method, KINDS[key]][bits[key]].append(top1)
    columns = sorted({width for row in cells.values() for width in row})
    lines = ["| method | quantized | " + " | ".join(map(str, columns)) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(columns))
    for (method, what), row in sorted(cells.items()):
        shown = [f"{mean(row[c]):.1f}" if c in row else "" for c in columns]
        lines.append(f"| {method} | {what} | " + " | ".join(shown) + " |")
    floats = "; ".join(f"{name.strip()} {mean(top1):.1f} (n = {len(top1)})" for name, top1 in sorted(parents.items()))
    counts = {len(values) for row in cells.values() for values in row.values()}
    return "\n".join([*lines, "", f"Mean test top-1 in percent, n = {', '.join(map(str, sorted(counts)))}. {floats}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="further keys of qbench, such as model.width=4")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--from", dest="kept", type=Path)
    asked = parser.parse_args()
    if asked.kept:
        kept = json.loads(asked.kept.read_text())
        print(f"{table(kept['rows'])}\n\n{kept['note']}")
        return 0
    more = asked.keys
    for method in groups.option_names("method"):
        run(method, more)
    found = read([str(ROOT / OUT)])
    done = [run.result for run in found if run.status == DONE and run.result is not None]
    unverified = [r.run for r in done if r.method != "float" and not r.verified]
    broken = [f"{run.path}: {run.status}: {run.reason}" for run in found if run.status not in (DONE, "unsupported")]
    seconds = sum(r.wall_seconds or 0 for r in done)
    layers = sum(len(r.verified or {}) for r in done)
    written = [*(ROOT / OUT).rglob("manifest.json"), *(ROOT / OUT).rglob("result.json")]
    times = [path.stat().st_mtime for path in written]
    note = (
        f"`scripts/every_method.py`: {len(done)} runs, float parents included, {layers} quantized layers verified; "
        f"{max(times) - min(times):.0f} s from first to last and {seconds:.0f} s of work, one thread a run "
        f"({os.cpu_count()} cores, {platform.machine()}, {platform.system()}, torch {version('torch')})."
    )
    rows = figures(done)
    print(f"{table(rows)}\n\n{note}")
    if asked.record:
        asked.record.write_text(json.dumps({"rows": rows, "note": note}, separators=(",", ":")) + "\n")
    for line in [*(f"not verified: {path}" for path in unverified), *broken]:
        print(line)
    return 1 if unverified or broken else 0


if __name__ == "__main__":
    sys.exit(main())
