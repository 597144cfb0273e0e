"""A wheel holds the configuration and runs without the repository."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and install it, without its dependencies, into an environment that sees this one's packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    site = next((environment / "lib").glob("python*")) / "site-packages"
    (wheel,) = folder.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    assert subprocess.run([*pip, str(wheel)], capture_output=True, text=True, timeout=300).returncode == 0
    ours = next(p for p in sys.path if p.endswith("site-packages"))
    # Only the installed packages of this environment, not the editable link to the repository.
    (site / "zz_others.pth").write_text(f"import sys; sys.path.append({ours!r})\n")
    return environment


def test_the_wheel_runs_from_anywhere(installed: Path, tmp_path: Path) -> None:
    python = installed / "bin" / "python"
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"HOME": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *words], capture_output=True, text=True, cwd=tmp_path, env=clean, timeout=120)

    where = run("-c", "import qbench.config.compose as c; print(c.__file__); print(c.conf_directory())")
    assert where.returncode == 0, where.stderr
    assert all(str(installed) in line for line in where.stdout.splitlines())
    done = run("-m", "qbench", "experiment=smoke", "method=dorefa", "init=scratch", "runtime.tensorboard=false")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "digits-resnet8").is_dir()
    assert "dorefa" in run("-m", "qbench", "list", "methods").stdout
    assert run("-m", "qbench", "method=dorfa").returncode == 2


def test_the_console_script_is_declared() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="qbench")
    assert script.value == "qbench.cli.main:main"


def test_what_is_installed_fits_together() -> None:
    """`pip check` for our own requirements."""
    from importlib.metadata import requires, version

    from packaging.requirements import Requirement

    for text in requires("qbench-papers") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.specifier.contains(version(requirement.name)), text
