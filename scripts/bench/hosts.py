"""Times a sweep that one process trains, and the same sweep shared by two processes in one folder.

    .venv/bin/python scripts/bench/hosts.py [--rounds 3]

The two processes stand for two hosts on one file system: both execute the same command line, without
a launcher. The sweep has 8 runs with 4 float baselines. The script checks that no run is done twice,
and that all weights are equal. The time of a sweep is measured from the first configuration to the last result. It does
not include the start of processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import machine, markdown

WORDS = ["-m", "method=dorefa,ttq", "bits.w=2", "seed=0,1,2,3", "epochs=6", "pretrain.epochs=3"]
WORDS += ["runtime.tensorboard=false"]


def timed(hosts: int, folder: Path) -> tuple[float, dict[str, str], int]:
    """Return the seconds of a sweep, the sha256 of each run's weights, and the number of recorded epochs."""
    words = [sys.executable, "-m", "qbench", *WORDS, f"out={folder}"]
    processes = [subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(hosts)]
    if any(process.wait() for process in processes):
        sys.exit(f"a process has failed; see {folder}")
    began = min(path.stat().st_mtime for path in folder.rglob("config.yaml"))
    seconds = max(path.stat().st_mtime for path in folder.rglob("result.json")) - began
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("result.json")}
    epochs = sum(path.read_text().count('"kind": "epoch"') for path in folder.rglob("metrics.jsonl"))
    return seconds, {name: result["weights_sha256"] for name, result in results.items()}, epochs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ratios, times, equal = [], [], True
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            one, weights, epochs = timed(1, Path(folder) / "one")
            two, others, again = timed(2, Path(folder) / "two")
        ratios.append(one / two)
        times.append((one, two))
        equal &= weights == others and len(weights) == 12 and epochs == again == 8 * 6 + 4 * 3
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    seconds = [f"{statistics.median(column):.0f} s" for column in zip(*times, strict=True)]
    row = (spread, "1.2", "equal, none twice" if equal else "NOT EQUAL", *seconds)
    print(f"{machine()}, {os.cpu_count()} cores, {options.rounds} rounds\n")
    print(markdown(("throughput of two processes / one", "target", "runs", "one", "two"), [row]))


if __name__ == "__main__":
    main()
