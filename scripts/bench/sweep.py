"""Times a sweep of 24 short runs, first one by one and then with joblib on all cores.

    .venv/bin/python scripts/bench/sweep.py [--rounds 3]

The script also checks that both sweeps have the same results. Each sweep trains its own float
baselines, one per seed. Times include the start of processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import machine, markdown

WORDS = [
    "-m",
    "method=dorefa,ttq",
    "bits.w=2",
    "seed=0,1,2,3",
    "optim.lr=0.001,0.0005,0.0002",
    "epochs=4",
    "pretrain.epochs=4",
]


def timed(words: list[str], folder: Path) -> tuple[float, dict[str, str], int]:
    """Return the seconds of a sweep, the sha256 of each run's weights, and the number of trained float baselines."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "qbench", *WORDS, *words, f"out={folder}"], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - began
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("result.json")}
    baselines = sum(name.startswith("float") for name in results)
    return seconds, {name: result["weights_sha256"] for name, result in results.items()}, baselines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ratios, times, equal, baselines = [], [], True, set()
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            one, weights, trained = timed([], Path(folder) / "one")
            all_cores, others, again = timed(["hydra/launcher=joblib"], Path(folder) / "all")
        ratios.append(one / all_cores)
        times.append((one, all_cores))
        equal &= weights == others and len(weights) == 24 + trained
        baselines |= {trained, again}
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    mean = [statistics.median(column) for column in zip(*times, strict=True)]
    row = (
        spread,
        "1.5",
        "equal" if equal else "NOT EQUAL",
        ", ".join(map(str, baselines)),
        *[f"{t:.0f} s" for t in mean],
    )
    print(f"{machine()}, {os.cpu_count()} workers, {options.rounds} rounds\n")
    print(
        markdown(
            ("throughput of joblib / one by one", "target", "results", "float baselines", "one by one", "joblib"), [row]
        )
    )


if __name__ == "__main__":
    main()
