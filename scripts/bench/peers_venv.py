"""The peers' own virtual environment: none of them is among the project's requirements.

`enter(VENV)` at the top of a script's `main` makes it on first use (minutes, 2 GB) and runs the script again in there.
pip is asked as the user has configured it: PIP_FIND_LINKS, PIP_INDEX_URL, pip.conf. What does not install is skipped.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-peers"
# setuptools before 81: Brevitas asks for it. ninja: QPyTorch compiles itself at its first import.
PEERS = ("brevitas", "qtorch ninja", "kmeans1d", "ckwrap", "ckmeans-1d-dp")


def enter(path: Path, packages: Sequence[str] = PEERS) -> None:
    """Run this script again, with its arguments, under the interpreter in `path`; return where it already does."""
    if Path(sys.prefix).resolve() == path.resolve():
        return
    python = ensure(path, packages)
    sys.stdout.flush()
    os.execv(python, [str(python), *sys.argv])


def ensure(path: Path, packages: Sequence[str] = PEERS) -> Path:
    """Make an environment with this clone of the project and every peer that installs; return its interpreter.

    Each of `packages` (names, parted by spaces, that belong together) is tried once: a file in `path` tells how it
    went; without it there is another try. Raises SystemExit where torch or the project itself do not install.
    """
    python = path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        tell(f"making {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
        subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    failure = install_once(path, python, "qbench", ["-e", str(ROOT)])
    if failure:
        (path / "qbench.tried").unlink()
        raise SystemExit(f"the peers' environment cannot be made: {failure}")
    for package in packages:
        failure = install_once(path, python, package, package.split())
        if failure:
            tell(f"skipped: {package} does not install: {failure}")
    return python


def install_once(path: Path, python: Path, name: str, arguments: Sequence[str]) -> str:
    """Return "" or why pip could not install; an answer that stands already is given again."""
    answer = path / f"{name.replace(' ', '_')}.tried"
    if not answer.exists():
        tell(f"installing {name}")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*pip, "-c", str(ROOT / "constraints.txt"), *arguments], capture_output=True, text=True, check=False
        )
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        answer.write_text("" if done.returncode == 0 else (errors or ["pip failed"])[-1])
    return answer.read_text()


def tell(line: str) -> None:
    """Write progress beside the table, not into it."""
    print(line, file=sys.stderr, flush=True)
