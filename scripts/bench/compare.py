"""Measures processor time and memory of `qbench compare` on many results: of each step, and of the whole command.

    .venv/bin/python scripts/bench/compare.py [--runs 10000] [--rounds 3] [--predictions 0] [--folder DIR]

The results are synthetic. They have no logs. They belong to 20 methods at 5 widths and 5 seeds, under as many protocols
as necessary. With --predictions N, each run also has predictions for N test images. The command then reads these
predictions. With --folder, the results are written to DIR and kept. Results that are in DIR already are reused.

Times are processor times, because other programs may use the machine. There is no index file at the first reading.
"""

import argparse
import gc
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice, product
from pathlib import Path
from typing import TypeVar

import numpy as np
from measure import machine, markdown

from qbench.bits import LevelCount
from qbench.config import compose
from qbench.config.identity import digest
from qbench.cost.network_cost import NetworkCost
from qbench.experiment.planned_run import planned_run
from qbench.report.comparison.compare import compare
from qbench.report.comparison.pairs import conclude
from qbench.report.tables.table import as_json, text
from qbench.runs.index import INDEX
from qbench.runs.reader import read
from qbench.runs.result import (
    Accuracy,
    BaselineResult,
    Evaluation,
    Protocol,
    Result,
    TrainingSpeed,
    with_checksum,
)

T = TypeVar("T")

COMMAND = """
import sys, time
from pathlib import Path
from qbench.cli.main import main
status = main(sys.argv[1:])
peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**10
print(time.process_time(), peak, file=sys.stderr)
sys.exit(status)
"""
"""Runs a command of qbench, and prints its processor time in seconds and its peak memory in MiB."""

METHODS, WIDTHS, SEEDS = 20, ((1, 1), (1, 2), (2, 2), (3, 3), (4, 4)), range(5)


def plant(folder: Path, runs: int, images: int) -> None:
    """Write synthetic results, which are small but complete, in the format of real runs."""
    (config,) = compose.configurations(["method=dorefa", f"out={folder}"])
    template = planned_run(config).directory.new_result("done")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, images)
    settings = product(range(1, -(-runs // (METHODS * len(WIDTHS) * len(SEEDS))) + 1), range(METHODS), WIDTHS, SEEDS)
    for epochs, method, (w, a), seed in islice(settings, runs):
        identity = digest({"epochs": epochs, "method": method, "bits": [w, a], "seed": seed})
        path = folder / "digits-resnet8" / f"m{method}-w{w}a{a}g32-s{seed}-{identity[:8]}"
        path.mkdir(parents=True)
        hits = rng.random(images) < 0.9 + method / 400
        top1 = 100 * float(hits.mean()) if images else 90 + method / 4 + float(rng.normal())
        (path / ".lock").touch()
        bits = {"w": w, "a": a, "g": 32}
        values = asdict(replace(_result(template, f"m{method}", bits, seed, epochs, top1), identity=identity))
        del values["run"]
        (path / "result.json").write_text(json.dumps(with_checksum(values), indent=2))  # `store_result` would sync
        if images:
            buffer = io.BytesIO()
            np.save(buffer, np.stack([labels, np.where(hits, labels, (labels + 1) % 10)], 1).astype(np.int16))
            (path / "predictions.npy").write_bytes(buffer.getvalue())


def _result(template: Result, method: str, bits: dict[str, int], seed: int, epochs: int, top1: float) -> Result:
    accuracy = Accuracy(top1=top1, top5=99.0, loss=0.3)
    evaluation = Evaluation(test=accuracy, val=accuracy, epoch=epochs - 1)
    float_accuracy = Accuracy(top1=98.0, top5=99.9, loss=0.1)
    layer = {"w": LevelCount(4, 4), "a": LevelCount(4, 4)}
    keys = template.protocol.keys | {"epochs": epochs}
    return replace(
        template, method=method, options={}, bits=bits, seed=seed, final=evaluation, best=evaluation,
        baseline=BaselineResult(run=f"float-s{seed}-{epochs}", final=Evaluation(test=float_accuracy)),
        protocol=Protocol(hash=digest(keys), keys=keys),
        levels=4, wall_seconds=3.0,
        verified={f"layer{i}.conv{j}": layer for i in range(1, 4) for j in (1, 2)},
        cost=NetworkCost(
            params=19000, macs=189000, bitops=5780000, bytes_float=76300, bytes_ideal=7180, bytes_packed=7200,
            bits_per_weight=2.0,
        ),
        speed=TrainingSpeed(images_per_second=9000.0, seconds_per_epoch=0.2, peak_bytes=500000000),
    )  # fmt: skip


def timed(folder: Path) -> dict[str, float]:
    """Return the processor time of each step and of the whole command in seconds, and the command's peak memory."""
    times: dict[str, float] = {}
    clock = time.process_time

    def step(name: str, work: Callable[[], T]) -> T:
        gc.collect()
        began = clock()
        result = work()
        times[name] = clock() - began
        return result

    (folder / INDEX).unlink(missing_ok=True)
    step("first reading", lambda: read([str(folder)]))
    runs = step("second reading", lambda: read([str(folder)]))
    tables = step("grouping", lambda: compare(runs))
    tables = step("conclusions", lambda: conclude(tables))
    step("as text", lambda: text(tables))
    step("as JSON", lambda: as_json(tables))
    command = [sys.executable, "-c", COMMAND, "compare", str(folder)]
    for name in ("the whole command, without an index file", "the whole command"):
        if name.endswith("file"):
            (folder / INDEX).unlink(missing_ok=True)
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
        times[name], times[f"{name}: peak memory"] = map(float, done.stderr.split())
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--predictions", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not any(folder.glob("*/*/result.json")):
            plant(folder, options.runs, options.predictions)
        rounds = [timed(folder) for _ in range(options.rounds)]
    rows = []
    for name in rounds[0]:
        values = sorted(one[name] for one in rounds)
        digits, unit = (0, "MiB") if name.endswith("memory") else (2, "s")
        middle, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), values[0], values[-1]))
        rows.append((name, f"{middle} {unit} ({low}-{high})"))
    predictions = f", predictions for {options.predictions:,} test images each" if options.predictions else ""
    print(f"{machine()}, {options.runs:,} results{predictions}, {options.rounds} rounds\n")
    print(markdown(("processor time of a step", "median (min-max)"), rows))


if __name__ == "__main__":
    main()
