"""Records the software versions, commit, machine and data of a run."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.system import files
from qbench.system.files import Json

if TYPE_CHECKING:
    import torch

EQUAL_UNDER = ("commit", "torch build", "kind of device", "threads", "precision")
"""If all these values are equal, two runs of the same configuration give bit-identical results."""
PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf", "scikit-learn", "tensorboard")


@cache
def versions() -> dict[str, str | None]:
    """Return the versions of Python and of `PACKAGES`, without importing the packages."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def commit() -> str | None:
    """Return the commit of the git clone that contains this package, or None if the package is an installed wheel."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    return _git(root, "rev-parse", "HEAD")


@cache
def changed() -> bool | None:
    """Return whether the git clone had uncommitted changes at the first call. Return None outside a clone."""
    root = Path(__file__).parents[2]
    status = _git(root, "status", "--porcelain", "--untracked-files=no") if commit() else None
    return None if status is None else bool(status)


def code_version() -> str | None:
    """Return the commit, followed by `+changes` if there were uncommitted changes. Return None outside a clone."""
    own = commit()
    return f"{own}+changes" if own and changed() else own


def code_versions(path: Path) -> list[str]:
    """Return the code versions that trained a run, oldest first, as recorded in its manifest."""
    return _recorded(path, "commits")


def devices(path: Path) -> list[str]:
    """Return the kinds of devices that trained a run, oldest first, as recorded in its manifest."""
    return _recorded(path, "devices")


def _recorded(path: Path, key: str) -> list[str]:
    stored = (files.read_json(path) or {}).get(key)
    return [word for word in stored if isinstance(word, str)] if isinstance(stored, list) else []


def _followed_by(recorded: list[str], current: str | None) -> list[str]:
    return [*recorded, *([current] if current and current not in recorded[-1:] else [])]


def write(
    path: Path,
    *,
    numerics: Mapping[str, Json],
    device: "torch.device",
    data: Mapping[str, Json],
    speed: Mapping[str, Json] | None = None,
    resumed: bool = False,
    rerun: bool = False,
    processes: int = 1,
) -> None:
    """Write manifest.json.

    The file lists the conditions for bit-identical results (`EQUAL_UNDER`) under the key `equal_under`.

    Args:
        path: the file to write.
        numerics: the configuration keys below `runtime` that can change numerical results.
        device: the device on which the run computes.
        data: the data set's fingerprint.
        speed: settings that change only the speed and the memory.
        resumed: whether the run continues an interrupted run. If true, the code versions and the devices in the old
            manifest are kept.
        rerun: whether the run was started over, with `rerun=true`.
        processes: number of processes that compute the run together.
    """
    import torch

    files.write_json(
        path,
        {
            "commit": commit(),
            "commits": _followed_by(code_versions(path) if resumed else [], code_version()),
            "uncommitted_changes": changed(),
            "versions": versions(),
            "platform": platform.platform(),
            "processor": platform.machine(),
            "device": device.type,
            "devices": _followed_by(devices(path) if resumed else [], device.type),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "processes": processes,
            "rerun": rerun,
            "precision": "fp32",
            **numerics,
            **(speed or {}),
            "equal_under": EQUAL_UNDER,
            "data": data,
            "command": sys.argv[1:],
        },
    )


def changed_since(path: Path, device: str | None = None) -> list[str]:
    """Return one message for each change of commit, torch version or device since a manifest was written.

    Args:
        path: the manifest.
        device: the kind of the current device. None means that devices are not compared.
    """
    stored = files.read_json(path) or {}
    found = stored.get("versions")
    versions_then = found if isinstance(found, dict) else {}
    pairs = [
        ("commit", stored.get("commit"), commit()),
        ("torch", versions_then.get("torch"), versions()["torch"]),
        ("device", stored.get("device"), device),
    ]
    return [f"{what} {then} (now {now})" for what, then, now in pairs if then and now and then != now]


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
