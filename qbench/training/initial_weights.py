"""Float weights to start from: a run's published ones, a checkpoint file of one's own."""

from pathlib import Path
from typing import Any

from torch import nn

from qbench.errors import CheckpointError
from qbench.runs.result import load_result
from qbench.system import files
from qbench.training.checkpoint import is_sealed, is_zip, load_float, load_plain, unpack


def is_intact(file: Path, identity: str) -> bool:
    """Whether a run's published weights are there, undamaged, and of this run."""
    try:
        return unpack(files.read(file), str(file)).get("identity") == identity
    except (OSError, CheckpointError):
        return False


def published(run: Path, name: str = "best.pt") -> dict[str, Any]:
    """Return what a finished run's best.pt holds, or its last.pt.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it is damaged, or not of the run that the result beside it tells of.
    """
    file = run / name
    state = unpack(files.read(file), str(file))
    result = load_result(run)
    if result is None and (run / "result.json").exists():
        raise CheckpointError(f"{run / 'result.json'} is damaged; the command that made the run makes it whole again")
    if result and result.identity != state.get("identity"):
        raise CheckpointError(f"{file} and result.json beside it are of two runs")
    return state


def load_initial_weights(model: nn.Module, path: Path, identity: str | None = None) -> str:
    """Load float weights from a checkpoint file or a run's best.pt; return what was loaded, skipped, left new.

    Args:
        identity: what the checkpoint must say of itself, where it is known.

    Raises:
        CheckpointError: damaged, of another run or of another network.
    """
    file = path / "best.pt" if path.is_dir() else path
    notes = []
    try:
        if path.is_dir():
            state = published(path)
        else:
            data = files.read(file)
            state = unpack(data, str(file)) if is_sealed(data) else load_plain(data, str(file))
            notes = [] if is_zip(data) else ["in a format without checksums: nobody can tell whether they are damaged"]
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; the weights to start from are gone") from None
    if identity is not None and state.get("identity") != identity:
        raise CheckpointError(f"{file} belongs to another run; train the parent anew with rerun=true")
    weights = state.get("model", state)
    if not isinstance(weights, dict):
        raise CheckpointError(f"{file}: its key `model` holds a {type(weights).__name__}, not a state_dict")
    skipped, new = load_float(model, weights, str(file))
    notes += [f"{len(skipped)} skipped ({', '.join(skipped[:3])}, ...)"] if skipped else []
    notes += [f"{len(new)} new ({', '.join(new[:3])}, ...)"] if new else []
    return f"weights from {file}: {len(weights) - len(skipped)} tensors loaded" + "".join(f", {n}" for n in notes)
