"""Loads the network, data and validation images of a finished run for analysis."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from qbench.data.spec import dataset_from_format
from qbench.errors import CheckpointError, ConfigError
from qbench.experiment.builders import images_sha256
from qbench.experiment.data_check import check_same_data
from qbench.experiment.device import HALF_TYPES
from qbench.experiment.run import PROBE_IMAGES
from qbench.experiment.setup import ExperimentSetup, assemble
from qbench.experiment.trained_network import LAYERS, load_weights, other_outputs, stored_run
from qbench.models.normalization import batch_norms
from qbench.quant.probe import Batch
from qbench.runs.result import Result, load_result


class FinishedRun(NamedTuple):
    """The result, the setup and the network of a finished run. The network is in eval mode and on the run's device.

    `changed` is the warning of `other_outputs`. It is empty if the network has the outputs of the network that was
    trained.
    """

    result: Result
    setup: ExperimentSetup
    model: nn.Module
    changed: str


def load_finished_run(
    run: str | Path, weights: str = "last", device: str = "auto", *, images: bool = True
) -> FinishedRun:
    """Load a finished run, with the weights of the last epoch or of the epoch with the best validation accuracy.

    Args:
        run: the directory of the run.
        weights: `last` or `best`.
        device: the device on which the network is placed, a value of `runtime.device`.
        images: whether the setup needs the images of the data set. If false, the data set may be missing.

    Raises:
        CheckpointError: the run is not done, or a file is missing or damaged.
        ConfigError: `weights` is `best`, but no epoch was selected on validation images.
        DataError: the run's data set is missing.
    """
    run = Path(run)
    result = load_result(run)
    if result is None and not (run / "config.yaml").exists():
        raise CheckpointError(
            f"{run} is not a run directory, because it has no config.yaml\nto list runs, type: qbench list runs"
        )
    if result is None and not (run / "result.json").exists():
        raise CheckpointError(
            f"{run} is not finished, because it has no result.json\n"
            "to continue the run, repeat the command that started it"
        )
    if result is not None and result.status != "done":
        raise CheckpointError(
            f"{run} has no trained network, because its status is {result.status}: {result.reason}".splitlines()[0]
        )
    if result is not None and weights == "best" and result.best is None:
        raise ConfigError(
            f'{run} has no best epoch, because {_why_no_best(result)}\ntype --weights last (in Python: weights="last")'
        )
    setup, model, changed = load_finished_network(run, weights=weights, device=device, images=images)
    if result is None:  # `load_finished_network` has already raised an error if result.json is damaged
        raise CheckpointError(f"{run / 'result.json'} is missing")
    return FinishedRun(result, setup, model.to(setup.device).eval(), changed)


def _why_no_best(result: Result) -> str:
    if result.final is None or result.final.val is None:
        return "the run has no validation split (dataset.val=0)"
    return "nothing was trained" if result.final.epoch is None else "no epoch was selected on validation images"


def validation_batches(setup: ExperimentSetup, images: int) -> tuple[list[Batch], str]:
    """Return batches of a sample of the validation images, and a note that names the split of these images.

    If the run has no validation split, the batches contain training images.
    """
    split = "val" if len(setup.data.val) else "train"
    batches = list(setup.loader().sample(split, images))
    count = sum(len(labels) for _, labels in batches)
    if split == "val":
        return batches, f"measured on {count} validation images; the test split is not used"
    return batches, f"measured on {count} training images, because the run has no validation split (dataset.val=0)"


def probe_batches(setup: ExperimentSetup) -> list[Batch]:
    """Return batches of the probe, a fixed set of training images on which methods measure statistics.

    Batch normalization statistics are also recomputed on these images.
    """
    return list(setup.loader().sample("train", PROBE_IMAGES))


def bn_notes(model: nn.Module, training: Sequence[Batch]) -> list[str]:
    """Return a note that says how a network's batch normalization statistics were found, if it has such statistics.

    `training` are the batches on which the statistics are recomputed; empty if they are kept.
    """
    if not batch_norms(model):
        return []
    images = sum(len(labels) for _, labels in training)
    return [f"batch normalization statistics: {f'recomputed on {images} training images' if images else 'kept'}"]


def half_precision_note(finished: FinishedRun, weights: str = "last") -> list[str]:
    """Return a note that the run was evaluated in half precision, with its accuracy. Other runs have no such note.

    `load_finished_run` returns a network that computes in float32. Its accuracy can therefore differ from the accuracy
    that the run measured in half precision.
    """
    evaluation = finished.result.final if weights == "last" else finished.result.best
    precision = finished.setup.runtime.precision
    if precision not in HALF_TYPES or evaluation is None:
        return []
    name = str(HALF_TYPES[precision]).removeprefix("torch.")
    return [
        f"measured in float32; the run's own test top-1 of {weights}.pt, {evaluation.test.top1:.2f} %, was measured in "
        f"{name} (runtime.precision={precision})"
    ]


def load_finished_network(
    run: Path, *, weights: str = "best", device: str = "cpu", images: bool = True
) -> tuple[ExperimentSetup, nn.Module, str]:
    """Return the setup of a finished run, its quantized network, on the CPU, and the warning of `other_outputs` or "".

    Args:
        run: the directory of the run.
        weights: `best` for the weights with the best validation accuracy, `last` for the weights of the last epoch.
        device: the value of `runtime.device` in the returned setup's configuration.
        images: whether the setup needs the images of the data set. If false, and if the checkpoint contains the format
            of the images, the setup gets a data set of two images in this format.

    Raises:
        CheckpointError: a file is missing or damaged, or the images of the data set have changed since training.
        DataError: the run's data set is missing.
    """
    config, state = stored_run(run, str(run), weights, device)
    if not images and "input" in state.get(LAYERS, {}):
        setup = assemble(config, stand_in=dataset_from_format(state[LAYERS]["input"]))
    else:
        setup = assemble(config)
        check_same_data(run, images_sha256(setup.data), setup.data.name)
    setup.restore_layers(state)
    named = f"{run}: {weights}.pt"
    model = load_weights(setup.install(setup.float_model()), state, named)
    return setup, model, other_outputs(model, state.get(LAYERS, {}), named)
