"""Times commands until their output is printed, and the default run until its first training step.

    .venv/bin/python scripts/bench/start.py [--rounds 11]

The script measures the wall time of whole processes, which other programs on the machine can increase. The column
`imports` lists the large packages that a process has loaded.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import machine, markdown

HEAVY = "torch", "torchvision", "sklearn", "matplotlib", "tensorboard"
ANSWERS = {
    "--help": ["--help"],
    "--cfg job": ["method=dorefa", "bits.w=2", "--cfg", "job"],
    "list methods": ["list", "methods"],
    "a finished run's repeat": ["method=dorefa", "bits.w=2", "epochs=1", "pretrain.epochs=1"],
}
QUICK = "import sys; from qbench.cli.main import main; main(sys.argv[1:]); {report}"
FIRST = """
import sys
from qbench.training import loop
def stop(task, state, callbacks):
    {report}
    sys.stdout.flush()
    import os; os._exit(0)
loop.train_epoch = stop
from qbench.cli.main import main
main(sys.argv[1:])
"""
REPORT = f"print('HEAVY', *[name for name in {HEAVY} if name in sys.modules])"


def timed(script: str, words: list[str], folder: str) -> tuple[float, str]:
    """Return the run time of a process in seconds, and the large packages that it loaded."""
    began = time.perf_counter()
    command = [sys.executable, "-c", script.format(report=REPORT), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    return seconds, next((line[6:] for line in done.stdout.splitlines() if line.startswith("HEAVY")), "")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        timed(QUICK, ANSWERS["a finished run's repeat"], folder)
        cases = [(name, QUICK, words, 0.4) for name, words in ANSWERS.items()]
        for name, script, words, target in [*cases, ("first training step of the default run", FIRST, [], 3.0)]:
            measured = [timed(script, [*words, *fresh(name, folder, turn)], folder) for turn in range(options.rounds)]
            times = sorted(seconds for seconds, _ in measured)
            spread = f"{statistics.median(times):.2f} s ({times[0]:.2f}-{times[-1]:.2f})"
            rows.append((name, spread, f"{target} s", measured[0][1] or "none"))
    print(f"{machine()}, {options.rounds} rounds\n")
    print(markdown(("from the command to", "median (min-max)", "target", "imports of " + ", ".join(HEAVY)), rows))


def fresh(name: str, folder: str, turn: int) -> list[str]:
    """Return an override that selects a new output folder, so that a run finds no stored result."""
    return [f"out={Path(folder) / str(turn)}"] if name.startswith("first") else []


if __name__ == "__main__":
    main()
