"""A finished run opened again, to be looked at: its network, its data, its validation images."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from qbench.data.dataset import Dataset, Loader
from qbench.errors import CheckpointError
from qbench.experiment.run import PROBE_IMAGES
from qbench.experiment.setup import ExperimentSetup, assemble
from qbench.experiment.trained_network import load_weights, stored_run
from qbench.quant.probe import Batch
from qbench.runs.result import Result, load_result


class FinishedRun(NamedTuple):
    """A run's result, what it is made of, and its network in eval mode on its device."""

    result: Result
    parts: ExperimentSetup
    model: nn.Module


def load_finished_run(run: Path, weights: str = "last", device: str = "auto") -> FinishedRun:
    """Open a finished run with the weights of the `last` epoch, or those `best` on validation.

    Raises:
        CheckpointError: it is not done, or not whole.
        DataError: its data is not at hand.
    """
    result = load_result(run)
    if result is None and not (run / "config.yaml").exists():
        raise CheckpointError(f"{run} is no run's directory: it has no config.yaml\nqbench list runs names some")
    if result is None and not (run / "result.json").exists():
        raise CheckpointError(f"{run} is not done: it has no result.json; the command that began it goes on from there")
    if result is not None and result.status != "done":
        raise CheckpointError(f"{run} is not done but {result.status}: {result.reason}".splitlines()[0])
    parts, model = load_finished_network(run, weights=weights, device=device)
    if result is None:  # `load_finished_network` has refused a damaged one
        raise CheckpointError(f"{run / 'result.json'} is gone")
    return FinishedRun(result, parts, model.to(parts.device).eval())


def loader(parts: ExperimentSetup, data: Dataset | None = None) -> Loader:
    """Return what makes batches of the run's data, or of others, on its device."""
    return parts.loader(data)


def validation(parts: ExperimentSetup, images: int) -> tuple[list[Batch], str]:
    """Return the first validation images, and what is to be said of them; training images where none are held out."""
    split = "val" if len(parts.data.val) else "train"
    batches = list(loader(parts).plain(split, images))
    count = sum(len(labels) for _, labels in batches)
    if split == "val":
        return batches, f"measured on {count} validation images, none of the test split"
    return batches, f"measured on {count} training images, for the run holds none out (dataset.val=0)"


def probe_batches(parts: ExperimentSetup) -> list[Batch]:
    """Return the training images that methods measure on, and normalization where it is measured anew."""
    return list(loader(parts).plain("train", PROBE_IMAGES))


def said_of_norms(anew: bool) -> str:
    """Return what is to be said of normalization."""
    return f"measured anew on {PROBE_IMAGES} training images" if anew else "kept as it is"


def load_finished_network(
    run: Path, *, weights: str = "best", device: str = "cpu"
) -> tuple[ExperimentSetup, nn.Module]:
    """Return what a finished run is made of, and its network, quantized as it is, on the CPU.

    Args:
        weights: those `best` on validation, or those of the `last` epoch.
        device: the value of `runtime.device` in `ExperimentSetup.config`.

    Raises:
        CheckpointError: the run is not whole.
        DataError: its data is not at hand.
    """
    config, state = stored_run(run, str(run), weights, device)
    parts = assemble(config)
    return parts, load_weights(parts.install(parts.float_model()), state, f"{run}: {weights}.pt")
