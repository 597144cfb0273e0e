#!/usr/bin/env python3
"""Runs every method at every supported width on digits with three seeds, and prints a table. This takes some minutes.

    .venv/bin/python scripts/every_method.py [KEY=VALUE ...]

scripts/test makes the environment .venv. Every run quantizes only the weights, only the activations or only the
gradients. Every run checks that its quantized values are allowed levels. The exit status is 1 if a run has failed or
has not made this check. Stored runs are not repeated.

`--record FILE` stores the results. `--from FILE` prints the table of stored results and runs nothing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import NamedTuple

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


class RunAccuracy(NamedTuple):
    """The values of a run in the table: method, keys of the network, widths, and test top-1 in percent."""

    method: str
    network: dict[str, str]
    bits: dict[str, int]
    top1: float


def single_widths(method: str) -> list[str]:
    """Return the values of `bits` in which one of w, a and g has a supported width and the other two have 32 bits."""
    (config,) = compose.configurations([f"method={method}"])
    supported = build_method(config.method, config.activation, config.bits.resolved()).supported_bits
    single = (Bits(**{key: k}) for key in "wag" for k in range(1, FLOAT) if k in supported.get(key, ()))
    return [str(bits) for bits in single]


def run(method: str, keys: Sequence[str]) -> None:
    """Run one method at all its widths with three seeds."""
    widths = single_widths(method)
    common = {word.partition("=")[0]: word for word in (*WORDS, *keys)}
    words = ["-m", f"method={method}", *([f"bits={','.join(widths)}"] if widths else []), *common.values()]
    done = subprocess.run([sys.executable, "-m", "qbench", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        print(f"{method}: qbench ended with status {done.returncode}", file=sys.stderr)


def accuracies(results: Sequence[Result]) -> list[RunAccuracy]:
    return [RunAccuracy(r.method, r.network, r.bits, r.top1) for r in results if r.top1 is not None]


def accuracy_table(runs: Sequence[RunAccuracy]) -> str:
    """Return a table of mean test top-1 in percent.

    It has one row for each method and quantized tensor, and one column for each width.
    """
    rows: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    baselines: dict[str, list[float]] = defaultdict(list)
    for method, network, bits, top1 in runs:
        if method == "float":
            baselines["float " + " ".join(f"{k}={v}" for k, v in network.items())].append(top1)
            continue
        (key,) = [key for key in "wag" if bits[key] < FLOAT]
        rows[method, KINDS[key]][bits[key]].append(top1)
    columns = sorted({width for row in rows.values() for width in row})
    lines = ["| method | quantized | " + " | ".join(map(str, columns)) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(columns))
    for (method, what), row in sorted(rows.items()):
        cells = [f"{mean(row[c]):.1f}" if c in row else "" for c in columns]
        lines.append(f"| {method} | {what} | " + " | ".join(cells) + " |")
    floats = "; ".join(f"{name.strip()} {mean(top1):.1f} (n = {len(top1)})" for name, top1 in sorted(baselines.items()))
    counts = {len(values) for row in rows.values() for values in row.values()}
    return "\n".join([*lines, "", f"Mean test top-1 in percent, n = {', '.join(map(str, sorted(counts)))}. {floats}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="more overrides for all runs, such as model.width=4")
    parser.add_argument("--record", type=Path, metavar="FILE", help="store the results in FILE")
    parser.add_argument("--from", dest="stored", type=Path, metavar="FILE", help="print the table of stored results")
    options = parser.parse_args()
    if options.stored:
        stored = json.loads(options.stored.read_text())
        print(f"{accuracy_table([RunAccuracy(*row) for row in stored['rows']])}\n\n{stored['note']}")
        return 0
    for method in groups.option_names("method"):
        run(method, options.keys)
    records = read([str(ROOT / OUT)])
    done = [record.result for record in records if record.status == DONE and record.result is not None]
    unverified = [r.run for r in done if r.method != "float" and not r.verified]
    broken = [f"{r.path}: {r.status}: {r.reason}" for r in records if r.status not in (DONE, "unsupported")]
    rows, note = accuracies(done), footer(done)
    print(f"{accuracy_table(rows)}\n\n{note}")
    if options.record:
        options.record.write_text(json.dumps({"rows": rows, "note": note}, separators=(",", ":")) + "\n")
    for line in [*(f"not verified: {path}" for path in unverified), *broken]:
        print(line)
    return 1 if unverified or broken else 0


def footer(done: Sequence[Result]) -> str:
    """Return a sentence that states what was run and how long it took."""
    seconds = sum(r.wall_seconds or 0 for r in done)
    layers = sum(len(r.verified or {}) for r in done)
    return (
        f"`scripts/every_method.py`: {len(done)} runs, which include float baselines; {layers} quantized layers were "
        f"verified. Sum of the times of the runs: "
        f"{seconds:.0f} s, with one thread per run ({os.cpu_count()} cores, {platform.machine()}, "
        f"{platform.system()}, torch {version('torch')})."
    )


if __name__ == "__main__":
    sys.exit(main())
