"""Makes a separate virtual environment for the peers, which are not requirements of the project.

`enter(VENV)` at the top of a script's `main` makes it on first use (minutes, 2 GB) and runs the
script again in it. pip is used as the user has configured it: PIP_FIND_LINKS, PIP_INDEX_URL,
pip.conf. What does not install is skipped.
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
    """Run this script again with its arguments under the interpreter in `path`. Return if it already runs there."""
    if Path(sys.prefix).resolve() == path.resolve():
        return
    python = ensure(path, packages)
    sys.stdout.flush()
    os.execv(python, [str(python), *sys.argv])


def ensure(path: Path, packages: Sequence[str] = PEERS) -> Path:
    """Make an environment with this clone of the project and every peer that installs; return its
    interpreter.

    Each of `packages` (names separated by spaces are installed together) is tried once: a file in
    `path` holds the result, and deleting it gives another try. Raises SystemExit if torch or the
    project itself do not install.
    """
    python = path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        progress(f"making {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
        subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    failure = install_once(path, python, "qbench", ["-e", str(ROOT)])
    if failure:
        (path / "qbench.tried").unlink()
        raise SystemExit(f"the peers' environment cannot be made: {failure}")
    for package in packages:
        failure = install_once(path, python, package, package.split())
        if failure:
            progress(f"skipped: {package} does not install: {failure}")
    return python


def install_once(path: Path, python: Path, name: str, arguments: Sequence[str]) -> str:
    """Return "" or the reason why pip could not install. A stored result is reused."""
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
    """Print progress to stderr, because stdout is only for the table."""
    print(line, file=sys.stderr, flush=True)
