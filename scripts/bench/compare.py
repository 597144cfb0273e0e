"""Times `qbench compare` over many results, step by step and as a whole command.

    .venv/bin/python scripts/bench/compare.py [--runs 10000] [--rounds 3] [--predictions 0]

The results are synthetic. They belong to 20 methods at 5 widths and 5 seeds under 20 protocols, and
have no logs. With --predictions N, each run also has predictions for N test images. The command then
reads these predictions.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

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
from qbench.runs.reader import read
from qbench.runs.result import (
    Accuracy,
    BaselineResult,
    Evaluation,
    Protocol,
    Result,
    TrainingSpeed,
    store_result,
)

METHODS, WIDTHS, SEEDS = 20, ((1, 1), (1, 2), (2, 2), (3, 3), (4, 4)), range(5)


def plant(folder: Path, runs: int, images: int) -> None:
    """Write small and complete results in the format of real runs."""
    (config,) = compose.configurations(["method=dorefa", f"out={folder}"])
    template = planned_run(config).directory.new_result("done")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, images)
    settings = product(range(1, -(-runs // (METHODS * len(WIDTHS) * len(SEEDS))) + 1), range(METHODS), WIDTHS, SEEDS)
    for epochs, method, (w, a), seed in islice(settings, runs):
        path = folder / "digits-resnet8" / f"m{method}-w{w}a{a}g32-s{seed}-{epochs:08x}"
        path.mkdir(parents=True)
        hits = rng.random(images) < 0.9 + method / 400
        top1 = 100 * float(hits.mean()) if images else 90 + method / 4 + float(rng.normal())
        store_result(path, _result(template, f"m{method}", {"w": w, "a": a, "g": 32}, seed, epochs, top1))
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
        identity=f"{method}{bits}{seed}{epochs}", levels=4, wall_seconds=3.0,
        verified={f"layer{i}.conv{j}": layer for i in range(1, 4) for j in (1, 2)},
        cost=NetworkCost(
            params=19000, macs=189000, bitops=5780000, bytes_float=76300, bytes_ideal=7180, bytes_packed=7200,
            bits_per_weight=2.0,
        ),
        speed=TrainingSpeed(images_per_second=9000.0, seconds_per_epoch=0.2, peak_bytes=500000000),
    )  # fmt: skip


def timed(folder: Path) -> dict[str, float]:
    """Return the seconds that each step takes, and the seconds that the whole command takes in its own process."""
    times: dict[str, float] = {}
    clock = time.perf_counter

    def step(name: str, began: float) -> float:
        times[name] = clock() - began
        return clock()

    began = clock()
    runs = read([str(folder)])
    began = step("reading", began)
    tables = compare(runs)
    began = step("grouping", began)
    conclude(tables)
    began = step("statistics", began)
    text(tables)
    began = step("as text", began)
    as_json(tables)
    step("as JSON", began)
    began = clock()
    subprocess.run([sys.executable, "-m", "qbench", "compare", str(folder)], stdout=subprocess.DEVNULL, check=True)
    step("the whole command", began)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--predictions", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plant(Path(folder), options.runs, options.predictions)
        rounds = [timed(Path(folder)) for _ in range(options.rounds)]
    rows = []
    for name in rounds[0]:
        times = sorted(one[name] for one in rounds)
        rows.append((name, f"{statistics.median(times):.2f} s ({times[0]:.2f}-{times[-1]:.2f})"))
    predictions = f", predictions for {options.predictions:,} test images each" if options.predictions else ""
    print(f"{machine()}, {options.runs:,} results{predictions}, {options.rounds} rounds\n")
    print(markdown(("step", "median (min-max)"), rows))


if __name__ == "__main__":
    main()
