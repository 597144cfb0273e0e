"""What a run was computed with: versions, commit, machine, data."""

import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.system import files

if TYPE_CHECKING:
    import torch

EQUAL_UNDER = ("commit", "torch build", "kind of device", "threads", "precision")
"""What must be the same for a repeat to give the same bits."""
PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf", "scikit-learn", "tensorboard")


@cache
def versions() -> dict[str, str | None]:
    """Return the versions of Python and the packages that matter, without importing them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def commit() -> str | None:
    """Return the commit of the clone that this package is run from; None where it is installed from a wheel."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    return _git(root, "rev-parse", "HEAD")


@cache
def changed() -> bool | None:
    """Return whether the clone held changes that no commit has, when first asked; None outside a clone."""
    root = Path(__file__).parents[2]
    status = _git(root, "status", "--porcelain", "--untracked-files=no") if commit() else None
    return None if status is None else bool(status)


def write(path: Path, *, numerics: dict[str, Any], device: "torch.device", data: dict[str, Any]) -> None:
    """Write manifest.json; `numerics` is what of the runtime decides the numbers.

    Equality of results is promised for the same commit, torch build, kind of device, thread count and precision.
    """
    import torch

    files.write_json(
        path,
        {
            "commit": commit(),
            "uncommitted_changes": changed(),
            "versions": versions(),
            "platform": platform.platform(),
            "processor": platform.machine(),
            "device": device.type,
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "precision": "fp32",
            **numerics,
            "equal_under": EQUAL_UNDER,
            "data": data,
            "command": sys.argv[1:],
        },
    )


def changed_since(path: Path) -> list[str]:
    """Return what a stored manifest says otherwise than today: commit, torch."""
    stored = files.read_json(path) or {}
    pairs = [
        ("commit", stored.get("commit"), commit()),
        ("torch", (stored.get("versions") or {}).get("torch"), versions()["torch"]),
    ]
    return [f"{what} {then} (now {now})" for what, then, now in pairs if then and now and then != now]


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
