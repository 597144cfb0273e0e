"""Loads the float weights that a run starts from: those of another run or of a checkpoint file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qbench.errors import CheckpointError
from qbench.runs.result import load_result
from qbench.system import files
from qbench.training.checkpoint import has_digest, is_zip, load_float_weights, load_torch_file, unpack
from qbench.training.digests import weights_sha256


def is_intact(file: Path, identity: str) -> bool:
    """Whether a weights file exists, is undamaged, and belongs to the run with this identity."""
    try:
        return unpack(files.read(file), str(file)).get("identity") == identity
    except (OSError, CheckpointError):
        return False


def load_published(run: Path, name: str = "best.pt") -> dict[str, Any]:
    """Return the content of a finished run's best.pt or last.pt.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: the file is damaged, or result.json in its folder belongs to another run
            or to other weights.
    """
    file = run / name
    state = unpack(files.read(file), str(file))
    result = load_result(run)
    if result is None and (run / "result.json").exists():
        raise CheckpointError(f"{run / 'result.json'} is damaged; to restore it, repeat the command of that run")
    if result and result.identity != state.get("identity"):
        raise CheckpointError(f"{file} and the result.json next to it belong to different runs")
    if result and name == "last.pt" and result.weights_sha256 not in (None, weights_sha256(state["model"])):
        raise CheckpointError(f"{file} does not hold the weights of the result.json next to it")
    return state


def load_initial_weights(model: nn.Module, path: Path, identity: str | None = None) -> str:
    """Load float weights. Return a message with the numbers of loaded, skipped and new tensors.

    Args:
        path: a checkpoint file, or a run's directory with best.pt.
        identity: the identity that the checkpoint must have. None allows any identity.

    Raises:
        CheckpointError: the file is missing, damaged, or belongs to another run or network.
    """
    file = path / "best.pt" if path.is_dir() else path
    state, notes = _read(path, file)
    if identity is not None and state.get("identity") != identity:
        raise CheckpointError(f"{file} belongs to another run; to train the float baseline again, add rerun=true")
    weights = state.get("model", state)
    if not isinstance(weights, dict):
        raise CheckpointError(f"{file}: its key `model` contains a {type(weights).__name__}, not a state_dict")
    skipped, new = load_float_weights(model, weights, str(file))
    notes += [f"{len(skipped)} skipped ({', '.join(skipped[:3])}, ...)"] if skipped else []
    notes += [f"{len(new)} new ({', '.join(new[:3])}, ...)"] if new else []
    return f"weights from {file}: {len(weights) - len(skipped)} tensors loaded" + "".join(f", {n}" for n in notes)


def _read(path: Path, file: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Return the content of a weights file, and notes on its format."""
    try:
        if path.is_dir():
            return load_published(path), []
        data = files.read(file)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; the initial weights are missing") from None
    state = unpack(data, str(file)) if has_digest(data) else load_torch_file(data, str(file))
    return state, [] if is_zip(data) else ["the format has no checksums, so damage would not be noticed"]
