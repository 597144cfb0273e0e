"""Times how soon the command line answers, and how soon the default run takes its first training step.

    .venv/bin/python scripts/bench/start.py [--rounds 11]

Wall time of whole processes; what the machine does beside counts. `imports` names heavy packages that were loaded.
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
QUICK = "import sys; from qbench.cli.main import main; main(sys.argv[1:]); {told}"
FIRST = """
import sys
from qbench.training import loop
def stop(task, state, watch):
    {told}
    sys.stdout.flush()
    import os; os._exit(0)
loop.train_epoch = stop
from qbench.cli.main import main
main(sys.argv[1:])
"""
TOLD = f"print('HEAVY', *[name for name in {HEAVY} if name in sys.modules])"


def timed(script: str, words: list[str], folder: str) -> tuple[float, str]:
    """Return the seconds that a process takes and the heavy packages that it names."""
    began = time.perf_counter()
    command = [sys.executable, "-c", script.format(told=TOLD), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    took = time.perf_counter() - began
    return took, next((line[6:] for line in done.stdout.splitlines() if line.startswith("HEAVY")), "")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        timed(QUICK, ANSWERS["a finished run's repeat"], folder)
        cases = [(name, QUICK, words, 0.4) for name, words in ANSWERS.items()]
        for name, script, words, bar in [*cases, ("first training step of the default run", FIRST, [], 3.0)]:
            found = [timed(script, [*words, *fresh(name, folder, turn)], folder) for turn in range(asked.rounds)]
            times = sorted(took for took, _ in found)
            spread = f"{statistics.median(times):.2f} s ({times[0]:.2f}-{times[-1]:.2f})"
            rows.append((name, spread, f"{bar} s", found[0][1] or "none"))
    print(f"{machine()}, {asked.rounds} rounds\n")
    print(markdown(("from the command to", "median (least-most)", "bar", "imports of " + ", ".join(HEAVY)), rows))


def fresh(name: str, folder: str, turn: int) -> list[str]:
    """Return where a run that must not be stored already is written."""
    return [f"out={Path(folder) / str(turn)}"] if name.startswith("first") else []


if __name__ == "__main__":
    main()
