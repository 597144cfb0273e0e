"""Makes a separate virtual environment for the peers, which are not requirements of the project.

A script calls `enter(VENV)` at the beginning of its `main`. On first use, this call makes the environment, which takes
minutes and 2 GB. The call then runs the script again in the environment. pip uses the user's configuration
(PIP_FIND_LINKS, PIP_INDEX_URL, pip.conf). Packages that pip cannot install are skipped.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-peers"
# Brevitas requires setuptools before 81. QPyTorch compiles itself with ninja when it is first
# imported.
PEERS = ("brevitas", "qtorch ninja", "kmeans1d", "ckwrap", "ckmeans-1d-dp")


def enter(path: Path, packages: Sequence[str] = PEERS) -> None:
    """Run this script again, with the same arguments, under the interpreter of the environment `path`.

    If the script already runs under this interpreter, do nothing.
    """
    if Path(sys.prefix).resolve() == path.resolve():
        return
    python = ensure(path, packages)
    sys.stdout.flush()
    os.execv(python, [str(python), *sys.argv])


def ensure(path: Path, packages: Sequence[str] = PEERS) -> Path:
    """Make an environment with this clone of the project, the extra `fast` and the peers. Return its interpreter.

    Each package is tried only once, and a file in `path` stores whether the installation succeeded. To try again,
    delete this file. Peers that pip cannot install are left out.

    Args:
        path: the folder of the environment.
        packages: texts with one or more names of packages, separated by spaces. Packages in one text are installed
            together.

    Raises:
        SystemExit: torch or the project itself cannot be installed.
    """
    python = path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        progress(f"making {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
        subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    project = f"{ROOT}[fast]"
    failure = install_once(path, python, "qbench_fast", ["-e", project])
    if failure:
        (path / "qbench_fast.tried").unlink()
        raise SystemExit(f"the peers' environment cannot be made: {failure}")
    for package in packages:
        failure = install_once(path, python, package, package.split())
        if failure:
            progress(f"skipped: {package} does not install: {failure}")
    return python


def install_once(path: Path, python: Path, name: str, arguments: Sequence[str]) -> str:
    """Install with pip, unless a result is stored. Return the reason of a failure, or an empty text."""
    stored = path / f"{name.replace(' ', '_')}.tried"
    if not stored.exists():
        progress(f"installing {name}")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*pip, "-c", str(ROOT / "constraints.txt"), *arguments], capture_output=True, text=True, check=False
        )
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        stored.write_text("" if done.returncode == 0 else (errors or ["pip failed"])[-1])
    return stored.read_text()


def progress(line: str) -> None:
    """Print a line to stderr. Only the table goes to stdout."""
    print(line, file=sys.stderr, flush=True)
