#!/usr/bin/env python3
"""Trains short runs with old and new code, and checks that their final weights are the same.

    scripts/same_weights.py COMMIT

The old code is COMMIT, which is checked out into a temporary worktree. The new code is the working tree. Both versions
of the code train every method on digits (seed 0, 3 float and 3 quantized epochs). Then the `weights_sha256` of their
runs are compared. Checksums depend on the processor, so both versions are trained on this machine. The exit status is 1
if any run differs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("seed=0", "pretrain.epochs=3", "epochs=3", "runtime.tensorboard=false", "runtime.progress=false")
EXTRA = (
    "method=dorefa bits=w2a2g6",
    "method=ttq activation=dorefa bits=w2a2",
    "method=hwgq bits=w1a2",
    "method=dorefa bits=w4a4 distill=kd",
)


def lines(checkout: Path) -> list[str]:
    """Return the command lines of the runs: every method at its default widths, and the command lines in `EXTRA`."""
    return [f"method={path.stem}" for path in sorted((checkout / "conf" / "method").glob("*.yaml"))] + list(EXTRA)


def weights(checkout: Path, line: str, out: Path) -> str:
    """Train the run of a command line with the code in `checkout`.

    Return the sha256 of the run's weights, or the reason why the run has none.
    """
    folder = out / re.sub(r"\W+", "-", line)
    words = [*line.split(), *SHORT, f"out={folder}"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "qbench", *words]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    method = line.split()[0].removeprefix("method=")
    for path in folder.rglob("result.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if path.parent.name.startswith((f"{method}-", f"{method}+")):
            return str(result["weights_sha256"] or result["reason"])
    return f"no result: {done.stderr.strip()}"


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: scripts/same_weights.py COMMIT", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="qbench-weights-") as folder:
        before, out = Path(folder) / "checkout", Path(folder) / "runs"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", before, sys.argv[1]], check=True)
        try:
            different = 0
            for line in lines(ROOT):
                pair = [weights(checkout, line, out / name) for name, checkout in (("a", before), ("b", ROOT))]
                different += pair[0] != pair[1]
                print(
                    f"{'equal' if pair[0] == pair[1] else 'DIFFERENT'}  {line}  {' '.join(x[:12] for x in pair)}",
                    flush=True,
                )
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", before], check=True)
    print(f"{different} of {len(lines(ROOT))} runs have other weights than at commit {sys.argv[1]}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
